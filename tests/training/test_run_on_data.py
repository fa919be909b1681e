"""Runs of agents that sample nothing: what they learn from, how long, and what they leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from rlhf_env.agents.ilql import ILQL
from rlhf_env.errors import ConfigError, DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run
from rlhf_env.training.config import EnvConfig, PipelineConfig, TrainConfig
from rlhf_env.training.pipeline import plan, run_pipeline
from rlhf_env.training.run import run_training
from tests.tiny_files import write_rows
from tests.tiny_pipeline import tiny_pipeline
from tests.tiny_training import tiny_training

SOURCES = {"dpo": "pairs.jsonl", "ilql": "log.jsonl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module", params=SOURCES)
def straight(request, folder, tmp_path_factory) -> tuple[TrainConfig, Run]:
    """Two passes over twelve examples, eight at a time: four gradient steps."""
    config = tiny_training(folder, request.param)
    config = replace(config, updates=None, settings={**config.settings, "epochs": 2})
    out = tmp_path_factory.mktemp("runs") / "straight"
    run_training(config, out)
    return config, Run.open(out)


def test_without_a_budget_it_learns_for_as_long_as_its_settings_say(straight):
    config, run = straight
    assert [row["update"] for row in run.metrics] == [1, 2, 3, 4]
    assert config.data is not None and config.data.endswith(SOURCES[config.agent])


def test_its_rows_tell_of_no_samples(straight):
    _, run = straight
    for row in run.metrics:
        assert (row["episodes"], row["tokens"], row["queries"]) == (0, 0, 0)
        assert "tokens_per_second" not in row and row["seconds"] > 0 and "learning_rate" in row
    assert [row["update"] for row in run.metrics if "eval_score" in row] == [2, 4]


def test_it_leaves_what_every_run_leaves(straight):
    config, run = straight
    summary = run.summary
    assert (summary["updates"], summary["episodes"], summary["tokens"], summary["queries"]) == (4, 0, 0, 0)
    assert "tokens_per_second" not in summary and {"score_before", "score_after", "kl", "best_score"} <= summary.keys()
    card = (run.path / "README.md").read_text(encoding="utf-8")
    assert f"Trained on the data of `{config.data}`: 4 updates in " in card
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "4 updates; score is what was trained on" in page and "sampled tokens" not in page
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-00000003", "step-00000004"}
    CausalLM.from_pretrained(run.path / "model")


def test_a_budget_of_updates_is_one_of_gradient_steps(folder, tmp_path):
    run_training(replace(tiny_training(folder, "dpo"), updates=3), tmp_path / "run")
    assert [row["update"] for row in Run.open(tmp_path / "run").metrics] == [1, 2, 3]


def test_what_it_was_given_decides(folder, tmp_path):
    config = replace(tiny_training(folder, "dpo"), updates=2)
    rows = [json.loads(line) for line in Path(str(config.data)).read_text().splitlines()]
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    for name, data in (("a", config.data), ("b", write_rows(tmp_path / "turned.jsonl", *turned))):
        run_training(replace(config, data=data), tmp_path / name)
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in "ab")
    assert any((a[key] != b[key]).any() for key in a)


@pytest.mark.parametrize("agent", SOURCES)
def test_held_out_means_from_the_data_too(folder, agent, tmp_path):
    config = replace(tiny_training(folder, agent), updates=1, eval_every=0)
    (tmp_path / "eval.txt").write_text("eh\n")
    rows = [json.loads(line) for line in Path(str(config.data)).read_text().splitlines()]
    for prompt, held_out in (("d", True), ("eh", False)):
        data = write_rows(tmp_path / f"{prompt}.jsonl", *rows, rows[0] | {"prompt": prompt})
        given = replace(config, data=data, eval_prompts=str(tmp_path / "eval.txt"))
        assert run_training(given, tmp_path / prompt)["held_out"] is held_out
        card = (tmp_path / prompt / "README.md").read_text(encoding="utf-8")
        assert ("prompts that training never saw" in card) is held_out
        assert ("prompts that training used too" in card) is not held_out


def test_a_policy_is_made_only_where_it_is_measured(folder, tmp_path, monkeypatch):
    def policy(self: ILQL) -> CausalLM:
        made.append(self)
        return real(self)

    made, real = [], ILQL.policy.fget
    monkeypatch.setattr(ILQL, "policy", property(policy))
    run_training(replace(tiny_training(folder, "ilql"), updates=6, eval_every=3), tmp_path / "run")
    assert len(made) == 3  # after updates 3 and 6, and at the end


def test_a_beta_that_only_measures_is_said_to_do_so(command, folder, tmp_path):
    for agent, said in (("dpo", 1), ("ppo", 0)):
        config = replace(tiny_training(folder, agent), updates=1, eval_every=0)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
        words = ["train", "--config", tmp_path / "config.yaml", "--beta", 0.2, "--out", tmp_path / agent]
        code, _, err = command(*words)
        note = "note: dpo learns from data, and --beta only measures it; its own settings: rlhf-env agents dpo\n"
        assert code == 0 and err.count(note) == said and err.count("note:") == said


@pytest.mark.parametrize(
    ("agent", "change", "error", "message"),
    [
        ("dpo", {"data": None}, ConfigError, "dpo samples nothing: it needs data, a file of comparisons"),
        ("ilql", {"data": None}, ConfigError, "ilql samples nothing: it needs data, a file of logged responses"),
        ("ppo", {"data": "x.jsonl"}, ConfigError, "ppo learns from what it samples itself: leave data out"),
        ("dpo", {"updates": None, "tokens": 5}, ConfigError, "so tokens cannot be its budget: give updates"),
        ("kto", {"updates": None, "episodes": 5}, ConfigError, "so episodes cannot be its budget"),
        ("ilql", {"updates": None, "queries": 5}, ConfigError, "so queries cannot be its budget"),
        ("dpo", {"env": EnvConfig(target_kl=1.0)}, ConfigError, "dpo samples nothing, so env.target_kl has no β"),
        ("dpo", {"data": "none.jsonl"}, DataError, "none.jsonl: No such file"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(folder, agent, change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run_training(replace(tiny_training(folder, agent), **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command(command, folder, tmp_path):
    config = tiny_training(folder, "dpo")
    code, shown, err = command(
        "train", "--agent", "dpo", "--data", config.data, "--policy", config.policy, "--prompts", config.prompts,
        "--reward", config.reward, "--max-new-tokens", 6, "--out", tmp_path / "run", "eval_episodes=4",
        "settings.batch_size=6",
    )  # fmt: skip
    assert code == 0, err
    assert "2 updates in " in shown and "tokens" not in shown
    code, _, err = command(
        "train", "--config", tmp_path / "run/config.yaml", "--tokens", 5, "--out", tmp_path / "other"
    )
    assert code == 1 and err.splitlines()[-1].startswith("error: dpo samples nothing, so tokens cannot be its budget")


# --- in a pipeline

GIVEN = {"demonstrations": "d.txt", "gold": "vader"}


@pytest.mark.parametrize(
    ("given", "data"),
    [
        (GIVEN, "out/prefer/comparisons.jsonl"),
        (GIVEN | {"comparisons": "c.jsonl"}, "c.jsonl"),
        (GIVEN | {"reward_model": "vader"}, "out/prefer/comparisons.jsonl"),
        ({"demonstrations": "d.txt", "comparisons": "c.jsonl", "reward_model": "vader"}, "c.jsonl"),
    ],
)
def test_it_learns_from_the_pipelines_comparisons(given, data):
    stages = {stage.name: stage.config for stage in plan(PipelineConfig(**given, train={"agent": "dpo"}), Path("out"))}
    assert stages["train"].data == data and stages["train"].budget == {}
    assert ("prefer" in stages) == data.startswith("out")


def test_or_from_its_own(tmp_path):
    train = {"agent": "dpo", "data": "mine.jsonl"}
    stages = {s.name: s.config for s in plan(PipelineConfig(**GIVEN, reward_model="vader", train=train), tmp_path)}
    assert stages["train"].data == "mine.jsonl" and "prefer" not in stages
    log = {"agent": "ilql", "data": "log.jsonl"}
    stages = {s.name: s.config for s in plan(PipelineConfig(**GIVEN, train=log), tmp_path)}
    assert stages["train"].data == "log.jsonl"


def test_comparisons_must_come_from_somewhere(tmp_path):
    config = PipelineConfig(demonstrations="d.txt", reward_model="vader", train={"agent": "dpo"})
    with pytest.raises(ConfigError, match=r"comparisons \(a file\), gold .* or train\.data"):
        plan(config, tmp_path)


def test_its_file_is_read_before_the_first_stage(tmp_path):
    config = tiny_pipeline(tmp_path)
    for agent in SOURCES:
        wrong = replace(config, train={"agent": agent, "data": str(tmp_path / "none.jsonl")})
        with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
            run_pipeline(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whole_pipeline_without_a_reward_model_of_its_own(tmp_path):
    settings = {"learning_rate": 3e-3, "batch_size": 8, "epochs": 2}
    train = {"agent": "dpo", "eval_episodes": 8, "settings": settings}
    out = tmp_path / "out"
    summary = run_pipeline(replace(tiny_pipeline(tmp_path), reward_model="vader", train=train), out)
    assert list(summary["seconds_by_stage"]) == ["sft", "prefer", "train", "evaluate"]
    assert (summary["agent"], summary["updates"], summary["tokens"], summary["queries"]) == ("dpo", 10, 0, 0)
    assert "tokens_per_second" not in summary and summary["kl"] > 0.01
    assert (out / "report.html").is_file() and "10 updates" in (out / "README.md").read_text(encoding="utf-8")
