"""A grid is the product of what it names, one folder each; it goes on where it was, and is the same wherever it ran."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_env.cli import app
from rlhf_env.errors import ConfigError
from rlhf_env.lab.grid import Cell, GridConfig, cells, results, run_cell, run_here, run_on_ray, table, write_results
from rlhf_env.lab.worlds import WorldConfig, run_in_world
from rlhf_env.records.config import to_dict
from rlhf_env.records.jsonl import read_json, read_jsonl
from rlhf_env.records.run import Run
from rlhf_env.training.config import TrainConfig
from rlhf_env.worlds.enumerable import EnumerableWorld
from rlhf_env.worlds.keywords import KeywordsWorld
from tests.tiny_files import write_letter_files

SMALL = {"vocab_size": 3, "length": 2}
TINY = GridConfig(
    agents={"ppo": {"epochs": 1, "batch_size": 32}, "grpo, scaled": {"agent": "grpo", "batch_size": 32, "scale": True}},
    worlds={"small": {"world": "enumerable", **SMALL}},
    seeds="0-1",
    run={"tokens": 128, "settings": {"learning_rate": 1e-2}},
)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_runs_are_the_product_in_the_order_of_the_file():
    grid = replace(TINY, vary={"beta": [0.5, 1], "settings.learning_rate": [1e-3]})
    found = cells(grid)
    assert [str(cell) for cell in found[:4]] == [
        "ppo in small, beta=0.5, settings.learning_rate=0.001, seed 0",
        "ppo in small, beta=0.5, settings.learning_rate=0.001, seed 1",
        "ppo in small, beta=1, settings.learning_rate=0.001, seed 0",
        "ppo in small, beta=1, settings.learning_rate=0.001, seed 1",
    ]
    assert len(found) == 8 == len({cell.folder for cell in found})
    assert found[0].folder == Path("small", "ppo", "beta=0.5", "settings.learning_rate=0.001", "seed-0")
    assert found[6].config == WorldConfig(
        "enumerable",
        agent="grpo",
        tokens=128,
        seed=0,
        beta=1.0,
        settings={"learning_rate": 1e-3, "batch_size": 32, "scale": True},
        **SMALL,
    )


def test_a_world_may_be_files_and_its_budget_replaces_the_common_one():
    files = {"policy": "folder", "prompts": "prompts.txt", "reward": "vader", "updates": 3, "env": {"beta": 0.2}}
    (cell,) = cells(GridConfig(agents={"rloo": {}}, worlds={"mine": files}, seeds="4", run={"tokens": 10}))
    assert isinstance(cell.config, TrainConfig)
    assert (cell.config.agent, cell.config.seed, cell.config.budget) == ("rloo", 4, {"updates": 3})
    assert cell.config.env.beta == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agents": {}}, "a grid needs agents and worlds"),
        ({"agents": {"…": {}}}, "'…' is no name for an agent"),
        ({"vary": {"beta": 0.5}}, "vary.beta must be a list of values, it is 0.5"),
        ({"vary": {"bta": [1]}}, "vary: there is no setting bta"),
        ({"run": {"tokens": "many"}}, "run: tokens must be"),
        ({"worlds": {"w": {"world": "keyword"}}}, "worlds.w: world must be"),
        ({"worlds": {"w": {"policy": "x"}}}, "the setting prompts is missing"),
        ({"seeds": "4-2"}, "4-2 names no seed"),
        ({"agents": {"a/b": {"agent": "ppo"}, "a:b": {"agent": "ppo"}}}, "two runs of the grid would be in small/a_b"),
        ({"worlds": {"w": {"world": "enumerable", "comparisons": 3}}}, "no learned proxy"),
        ({"run": {"tokens": 1, "updates": 2}}, "a run has one budget"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_it_runs(change, message):
    with pytest.raises(ConfigError, match=message):
        cells(replace(TINY, **change))


def test_a_run_in_the_enumerable_world_is_measured_exactly(tmp_path):
    config = WorldConfig("enumerable", updates=4, seed=3, eval_every=2, settings={"batch_size": 32}, **SMALL)
    summary = run_in_world(config, tmp_path / "run")
    world = EnumerableWorld.make(3, **SMALL)
    assert summary["gold_before"] == pytest.approx(float(world.expected_gold(world.ref_log_probs)), abs=1e-6)
    assert 0 < summary["gain"] < 1 and 0 < summary["kl"] and summary["gold_after"] > summary["gold_before"]
    objective = summary["gold_after"] - world.beta * summary["kl"]
    start = world.objective(world.ref_log_probs)
    assert summary["gain"] == pytest.approx(float((objective - start) / (world.optimal_value() - start)), abs=1e-9)
    assert [row["update"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval_gain" in row] == [2, 4]
    assert summary["tokens"] == 4 * 32 * 2 and summary["updates"] == 4


def test_best_of_n_in_the_enumerable_world_is_its_exact_distribution(tmp_path):
    settings = {"n": 4, "draws": 4, "prompts": 2}
    config = WorldConfig("enumerable", agent="best_of_n", updates=1, settings=settings, **SMALL)
    world = EnumerableWorld.make(0, **SMALL)
    summary = run_in_world(config, tmp_path / "run")
    assert summary["gain"] == pytest.approx(world.gain(world.best_of_n(4)), abs=1e-9)
    assert summary["gold_before"] == pytest.approx(float(world.expected_gold(world.ref_log_probs)), abs=1e-6)


def test_a_run_in_the_keywords_world_maximises_the_proxy_and_measures_gold(tmp_path):
    config = WorldConfig("keywords", updates=1, seed=2, comparisons=50, eval_episodes=256, settings={"batch_size": 64})
    summary = run_in_world(config, tmp_path / "run")
    world = KeywordsWorld.make(2)
    responses = world.sample(20_000)
    score = world.learned_proxy(50).score([""] * len(responses), responses).mean()
    assert summary["score_before"] == pytest.approx(float(score), abs=0.25)  # 4 standard errors of 256 responses
    assert summary["gold_before"] == pytest.approx(0.0, abs=0.25)
    assert summary["score_before"] != summary["gold_before"]


@pytest.mark.parametrize(
    ("agent", "message"),
    [("dpo", "dpo learns from data"), ("sb3:PPO", "wants a language model in a folder"), ("pp", "agent")],
)
def test_agents_that_cannot_live_in_a_world(agent, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_in_world(WorldConfig("enumerable", agent=agent, **SMALL), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_finished_runs_are_kept_and_broken_off_ones_made_again(tmp_path, monkeypatch):
    grid = cells(TINY)
    for cell in grid:
        run_cell(cell, tmp_path)
    whole = results(grid, tmp_path)
    (tmp_path / grid[1].folder / "summary.json").unlink()
    monkeypatch.setattr("rlhf_env.lab.worlds.run_in_world", counted := Counted(run_in_world))
    for cell in grid:
        run_cell(cell, tmp_path)
    assert counted.configs == [grid[1].config]
    assert untimed(results(grid, tmp_path)) == untimed(whole)


class Counted:
    def __init__(self, function: Any) -> None:
        self.function, self.configs = function, []

    def __call__(self, config: Any, out: Path) -> Any:
        self.configs.append(config)
        return self.function(config, out)


@pytest.mark.parametrize("budget", [{"updates": 2}, {}], ids=["its own budget", "the default one"])
def test_a_training_run_goes_on_from_its_checkpoint(budget, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_env.training.config.DEFAULT_TOKENS", 33)  # two updates of 32 tokens
    write_letter_files(tmp_path)
    files = {
        "policy": str(tmp_path / "policy"),
        "prompts": str(tmp_path / "prompts.txt"),
        "reward": "tests.builders:letter_score",
        "env": {"max_new_tokens": 4, "min_new_tokens": 4},
    }
    run = {**budget, "num_envs": 4, "eval_episodes": 4, "checkpoint_every": 1, "settings": {"batch_size": 8}}
    (cell,) = cells(GridConfig(agents={"ppo": {}}, worlds={"letters": files}, seeds="0", run=run))
    first = run_cell(cell, tmp_path / "grid")
    folder = tmp_path / "grid" / cell.folder
    (folder / "summary.json").unlink()
    again = run_cell(cell, tmp_path / "grid")
    assert len(Run(folder).metrics) == 2, "it went on after the last update"
    assert {k: v for k, v in first.items() if "seconds" not in k and "_per_second" not in k} == {
        k: v for k, v in again.items() if "seconds" not in k and "_per_second" not in k
    }


def test_a_folder_of_other_settings_is_refused(tmp_path):
    cell = cells(TINY)[0]
    run_cell(cell, tmp_path)
    other = cells(replace(TINY, run={"tokens": 64, "settings": {"learning_rate": 1e-2}}))[0]
    with pytest.raises(ConfigError, match="holds a run with another tokens: give the grid another --out"):
        run_cell(other, tmp_path)


def test_the_table_has_means_over_seeds_and_their_intervals():
    grid = cells(replace(TINY, vary={"beta": [1]}))
    rows = [{"world": "small", "agent": "ppo", "beta": 1, "seed": s, "gold_after": g} for s, g in ((0, 0.1), (1, 0.3))]
    rows.append({"world": "small", "agent": "grpo, scaled", "beta": 1, "seed": 0, "gold_after": -1.0, "tokens": 12345})
    # t of one degree of freedom is 12.706, and the standard error 0.1.
    assert table(grid, rows) == (
        "| world | agent | beta | seeds | gold_after | tokens |\n|---|---|---|---|---|---|\n"
        "| small | ppo | 1 | 2 | 0.200 [-1.071, 1.471] | – |\n"
        "| small | grpo, scaled | 1 | 1 | -1.000 | 12,345 |\n"
    )


def everything(grid: list[Cell], out: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    rows = untimed(results(grid, out))
    metrics = [
        [{k: v for k, v in row.items() if "second" not in k} for row in Run(out / c.folder).metrics] for c in grid
    ]
    return rows, metrics


@pytest.mark.slow
def test_processes_of_their_own_give_what_one_gives(tmp_path):
    grid = cells(TINY)
    for cell in grid:
        run_cell(cell, tmp_path / "one")
    ended = [cell for cell, found in run_here(grid, tmp_path / "two", 2) if isinstance(found, dict)]
    assert {cell.folder for cell in ended} == {cell.folder for cell in grid}
    assert everything(grid, tmp_path / "two") == everything(grid, tmp_path / "one")


@pytest.mark.slow
def test_ray_gives_what_one_process_gives(tmp_path):
    pytest.importorskip("ray")
    grid = cells(replace(TINY, agents=TINY.agents | {"broken": {"agent": "ppo", "clip": -1}}))
    found = {cell.folder: result for cell, result in run_on_ray(grid, tmp_path / "ray", "local")}
    for cell in grid:
        if cell.agent == "broken":
            assert isinstance(found[cell.folder], ConfigError)
        else:
            run_cell(cell, tmp_path / "one")
    assert everything(grid[:4], tmp_path / "ray") == everything(grid[:4], tmp_path / "one")


@pytest.mark.slow
def test_the_command_names_what_failed_and_keeps_the_rest(tmp_path, capsys):
    grid = to_dict(replace(TINY, agents=TINY.agents | {"broken": {"agent": "ppo", "clip": -1}}, seeds="0"))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match="1 of 3 runs failed"):
        app(["grid", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")], standalone_mode=False)
    said = capsys.readouterr()
    assert "broken in small, seed 0: failed: PPO needs" in said.err
    assert "| small | ppo | 1 |" in said.out
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8") as file:
        assert [row["agent"] for row in csv.DictReader(file)] == ["ppo", "grpo, scaled"]


def test_results_are_written_from_the_folders(tmp_path):
    grid = cells(TINY)[:1]
    run_cell(grid[0], tmp_path)
    summary = read_json(tmp_path / grid[0].folder / "summary.json")
    write_results(grid, tmp_path)
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert json.loads(row["gain"]) == summary["gain"] and row["seed"] == "0"
    assert "| small | ppo | 1 |" in (tmp_path / "table.md").read_text(encoding="utf-8")
