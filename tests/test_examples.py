"""Every example runs as it is typed, with a small budget, and learns what it says it learns."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from sb3_contrib.common.recurrent.type_aliases import RNNStates

from rlhf_env.lab.grid import GridConfig, cells
from rlhf_env.preferences.queries import Rule
from rlhf_env.records.config import build, override_layer, read_layer, to_dict
from rlhf_env.text.demonstrations import load_demonstrations
from rlhf_env.training.config import OnlineConfig, PipelineConfig
from rlhf_env.training.pipeline import plan

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Run one example as a script: the words of each line that it printed."""

    def run(name: str, *arguments: object) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    return run


def percent(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def test_every_example_is_run_by_a_test_here():
    here = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in FOLDER.glob("*.py") if f'example("{path.name}"' not in here] == []


def test_known_optimum_prints_both_agents_below_the_optimum(example, tmp_path):
    lines = example("known_optimum.py", "--worlds", 0, "--updates", 4, "--plot", tmp_path / "optimum.png")
    assert (tmp_path / "optimum.png").stat().st_size > 10_000
    (_, ours, gain, gold, kl, best_gold, best_kl), (_, theirs, *_) = lines[1:]
    assert (ours, theirs) == ("ppo", "sb3:PPO")
    assert 0 < percent(gain) < 1
    best_gold, best_kl = float(best_gold.strip("(,")), float(best_kl.strip(")"))
    # In world 0 at its β of 0.5, gain is the share of the optimum's objective, since the reference's objective is 0.
    own = (float(gold) - 0.5 * float(kl)) / (best_gold - 0.5 * best_kl)
    assert percent(gain) == pytest.approx(own, abs=0.002)


def test_ours_and_sb3_are_measured_alike_on_what_the_package_ships(example, tmp_path):
    lines = example("ours_and_sb3.py", "--out", tmp_path, "--seeds", 0, 1, "--tokens", 4000, "--eval-episodes", 64)
    rows = {" ".join(row[1 : row.index("|", 1)]): row for row in lines if row and row[0] == "|" and len(row) > 12}
    assert {"2 seeds", "ppo", "sb3:PPO", "sb3 − ours"} <= rows.keys()
    runs = {path.name: json.loads((path / "summary.json").read_text()) for path in tmp_path.iterdir()}
    assert sorted(runs) == [f"reviews-{agent}-seed{seed}" for agent in ("ppo", "sb3-PPO") for seed in (0, 1)]
    for agent, name in (("ppo", "ppo"), ("sb3:PPO", "sb3-PPO")):
        objective = [
            runs[f"reviews-{name}-seed{s}"]["score_after"] - 0.1 * runs[f"reviews-{name}-seed{s}"]["kl"] for s in (0, 1)
        ]
        cells = rows[agent][rows[agent].index("|", 1) + 1 :]
        assert float(cells[0]) == pytest.approx(sum(objective) / 2, abs=6e-4)
    assert all(run["tokens"] >= 4000 for run in runs.values())


def test_your_own_algorithm_climbs_from_below_the_reference(example):
    lines = example("your_own_algorithm.py", "--updates", 20)
    assert lines[0][:2] == ["the", "optimum's"]
    gains = [percent(row[-1]) for row in lines[3:]]
    assert [int(row[0]) for row in lines[3:]] == list(range(0, 21, 2))
    assert gains[0] < 0 < gains[-1] < 1  # a uniform network is worse than the reference


def test_forty_lines_suffice_to_climb_above_the_reference(example):
    text = (FOLDER / "forty_lines.py").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= 40
    *rows, optimum = example("forty_lines.py", 41)
    objectives = [float(row[-1]) for row in rows]
    assert [int(row[1]) for row in rows] == [0, 20, 40]
    assert objectives[0] < 0 < objectives[-1] < float(optimum[-1])  # 0 is the reference's


def test_your_own_reward_is_what_the_model_learns(example):
    lines = example("your_own_reward.py", "--updates", 8)
    updates = [int(row[0]) for row in lines[1:9]]
    before, after = float(lines[10][4]), float(lines[10][6])  # score of 256 responses: … before, … after
    assert updates == list(range(1, 9)) and before < 0.2 < 0.5 < after
    assert len(lines[13::2]) == 4 and all("before:" in row for row in lines[13::2])


def test_sb3_ppo_starts_at_the_reference_and_raises_the_score(example):
    lines = example("sb3_ppo.py", "--updates", 8)
    rows = lines[1:6]
    assert [int(row[0]) for row in rows] == [0, 1536, 3072, 4608, 6144]
    assert float(rows[0][4]) == 0 < float(rows[-1][4])  # KL to the reference
    assert float(rows[-1][1]) > float(rows[0][1]) + 0.2
    shown = [float(row[-1].strip("()")) for row in lines[7:]]
    assert len(shown) == 4 and all(-1 <= score <= 1 for score in shown)  # VADER's range


def test_agreement_understands_the_contrary_annotator(example):
    lines = example("agreement.py")
    between = {" ".join(row[2:-3]): [float(x) for x in row[-3:]] for row in lines if row[0] == "Cohen's"}
    assert len(between) == 10 and between["careful 1 & contrary"][2] < 0 < between["careful 1 & careful 2"][1]
    vote, model = (percent(lines[-1][k].rstrip(",")) for k in (4, -1))
    assert 0.75 < vote < model - 0.05 < 1


def test_agreement_reads_a_table_with_gaps(example, tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text('{"ann": 1, "ben": 1}\n{"ann": 2, "ben": 2, "carl": 1}\n{"ann": 2, "ben": null, "carl": 2}\n')
    found = {" ".join(row[:-3]): row[-3:] for row in example("agreement.py", file)[:2]}
    assert float(found["percent agreement"][0]) == pytest.approx((1 + 1 / 3 + 1) / 3, abs=5e-4)


def test_constitution_leaves_demonstrations(example, tmp_path):
    lines = [" ".join(words) for words in example("constitution.py", "--out", tmp_path)]
    written = int(lines[-2].split()[0])
    assert lines[-2:] == [
        f"{written} of 8 revisions are demonstrations",
        "0 of 8 pairs judged; 16 of 16 replies unparsed",  # the model knows no brackets
    ]
    assert len(load_demonstrations(tmp_path / "revisions.jsonl")) == written > 0


@pytest.mark.slow
def test_constitution_runs_a_model_of_ones_own(example, shared_data, tmp_path):
    (tmp_path / "principles.txt").write_text("Be kind.\n")
    model = shared_data / "models" / "stories260k-llama"
    files = ("--principles", tmp_path / "principles.txt", "--out", tmp_path, "--max-new-tokens", 6)
    lines = [" ".join(words) for words in example("constitution.py", "--model", model, *files)]
    assert re.fullmatch(r"\d of 8 pairs judged; \d+ of 16 replies unparsed", lines[-1])


def test_hh_prints_baselines_and_bodies_for_any_comparisons(example, tmp_path):
    rows = [{"prompt": f"{i} ", "chosen": "a good one" + " x" * (i % 3), "rejected": "a bad one"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = example("reward_models/hh.py", tmp_path / "pairs.jsonl", "--folds", 2, "--epochs", 1)
    found = {" ".join(row[:2]): percent(next(word for word in row if word.endswith("%"))) for row in lines[1:]}
    assert list(found) == ["longer wins", "shorter wins", "linear in", "small transformer"]
    assert found["longer wins"] == 1 and found["shorter wins"] == 0 and found["linear in"] > 0.9


def test_tulu_reads_grades_policies_and_labelers(example, tmp_path):
    """Ann prefers what is longer, Ben what is good; the word decides otherwise, and everybody says how much."""
    rows = [
        {"prompt": f"{i} ", "response_a": "a good one" + " x" * (i % 5), "response_b": "a bad one" + " x" * (i % 4)}
        | {"preference": grade, "labeller": who, "model_a": "new", "model_b": "old"}
        for i in range(40)
        for who, grade in (("ann", 2 if i % 5 >= i % 4 else -2), ("ben", 1))
    ]
    (tmp_path / "graded.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = example("reward_models/tulu.py", tmp_path / "graded.jsonl", "--folds", 2)
    assert lines[0][0] == "80" and [row[0] for row in lines if row and row[0] in ("ann", "ben")] == ["ann", "ben"]
    assert [row[0] for row in lines if row][3:7] == ["0.0", "0.25", "0.5", "1.0"]
    none = next(row for row in lines if row and row[0] == "0.0")
    assert none[-3:] == ["0.000", "[0.000,", "0.000]"]  # no margin against itself


def test_mixed_annotators_are_ranked_by_borda(example):
    lines = example("reward_models/mixed_annotators.py", "--populations", 20, "--seeds", 0)
    borda, utility = int(lines[0][5]), int(lines[0][9])
    assert borda == 20 > utility and len(lines) == 2


@pytest.mark.slow
def test_mixed_annotators_are_told_apart(example):
    lines = example("reward_models/mixed_annotators.py", "--populations", 1)
    assert lines[3][:8] == ["seed", "0:", "the", "mixture", "puts", "12", "of", "12"]
    assert lines[-1][-2:] != lines[-2][-2:]


def test_kwise_prints_a_row_for_each_way(example):
    lines = example("reward_models/kwise.py", "--rankings", 40, "--epochs", 1, "--seeds", 0)
    names = [" ".join(row[:3]) for row in lines[2:]]
    assert names[0] == "all pairs of" and names[2:] == ["the best of", "pairs torn apart", "best against worst"]


def test_rules_that_know_what_they_do_not_know_need_fewer_labels(example):
    rows = {(row[3], int(row[5])): row for row in example("query_selection.py", "--seeds", 6, "--scales", 6)[2:]}
    assert len(rows) == 15 and {rule for rule, _ in rows} == {*get_args(Rule)}
    for rule in ("disagreement", "bald"):
        low = float(rows[rule, 96][11].strip("[,"))  # of the accuracy's difference to that of uniform
        assert low > 0 and float(rows[rule, 96][7]) > float(rows["uniform", 192][7])


@pytest.mark.slow
def test_stories_leaves_a_run_for_each_agent(example, shared_data, tmp_path):
    model = shared_data / "models" / "stories260k-llama"
    lines = example("stories.py", "--model", model, "--out", tmp_path, "--beta", 0.1, "--seeds", 0, "--tokens", 1000)
    best = [float(row[3]) for row in lines[:4]]
    assert best == sorted(best)  # the more draws, the better the best
    assert [" ".join(row[:4]) for row in lines[5::2]] == [
        "ppo 0.1 0.0001 0",
        "sb3:PPO 0.1 0.0001 0",
        "ppo 0.0 0.0001 0",
        "ppo 0.0 0.001 0",
    ]
    assert len(list(tmp_path.glob("*/summary.json"))) == 4


@pytest.mark.slow
def test_learned_proxy_prints_a_row_for_each_number_of_comparisons_and_for_gold(example, shared_data, tmp_path):
    model = shared_data / "models" / "stories260k-llama"
    small = ["--seeds", 0, "--tokens", 1000, "--sizes", 60, 30]
    lines = example("learned_proxy.py", "--model", model, "--out", tmp_path, *small)
    rows = [row for row in lines if row[:1] and row[0] in ("60", "30", "gold")]
    assert [row[:2] for row in rows] == [["60", "0"], ["30", "0"], ["gold", "0"]]
    assert len({row[4] for row in rows}) == 1  # gold before: the same reference, prompts and seed in every row
    assert len(list(tmp_path.glob("*/report.html"))) == 3


def planned(file: Path, *overrides: str) -> dict[str, dict]:
    """The settings of every stage of the pipeline that a file describes, by the stage's name."""
    config = build(PipelineConfig, read_layer(file), override_layer(overrides))
    return {stage.name: to_dict(stage.config) for stage in plan(config, Path("out"))}


@pytest.mark.parametrize(
    ("name", "overrides", "stages"),
    [
        ("pipeline.yaml", [], ["sft", "reward", "train", "evaluate"]),
        ("pipeline.yaml", ["comparisons=none", "gold=vader"], ["sft", "prefer", "reward", "train", "evaluate"]),
        ("stories.yaml", ["policy=FOLDER"], ["prefer", "reward", "train", "evaluate"]),
        ("sentences.yaml", ["demonstrations=texts.txt"], ["sft", "prefer", "reward", "train", "evaluate"]),
    ],
)
def test_every_pipeline_plans_its_stages(name, overrides, stages):
    assert list(planned(FOLDER / name, *overrides)) == stages


def test_the_online_loop_goes_round(command, tmp_path):
    small = ("rounds=2", "comparisons=40", "pool=30", "candidates=3", "reward.fit.epochs=1", "reward.normalize_on=32")
    words = ("train.updates=2", "train.eval_episodes=16", "train.settings.batch_size=16", "env.max_new_tokens=8")
    code, shown, err = command("online", FOLDER.joinpath("online.yaml"), "--out", tmp_path / "out", *small, *words)
    assert code == 0, err
    assert "40 labels, pairs chosen by bald" in shown and str(tmp_path / "out/round-1/train/model") in shown
    found = [json.loads(line) for line in (tmp_path / "out/rounds.jsonl").read_text().splitlines()]
    assert [row["asked"] for row in found] == [16, 24] and "accuracy_new_pairs" in found[1]


def test_what_is_commented_out_in_the_online_loop_is_the_default(tmp_path):
    text = FOLDER.joinpath("online.yaml").read_text(encoding="utf-8")
    (tmp_path / "all.yaml").write_text(re.sub(r"^( *)#(?=\w)", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    stated, everything = read_layer(FOLDER.joinpath("online.yaml")), read_layer(tmp_path / "all.yaml")
    assert len(everything.values) > len(stated.values)
    assert build(OnlineConfig, everything) == build(OnlineConfig, stated)


def test_the_grid_has_fifty_runs():
    grid = build(GridConfig, read_layer(FOLDER.joinpath("grid.yaml")))
    assert len(cells(grid)) == 50


def test_every_file_of_settings_is_read_by_a_test_here():
    here = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in FOLDER.glob("*.yaml") if f'("{path.name}"' not in here] == []


def test_what_is_commented_out_in_the_pipeline_is_the_default(tmp_path):
    text = (FOLDER / "pipeline.yaml").read_text(encoding="utf-8")
    (tmp_path / "all.yaml").write_text(re.sub(r"^( *)#(?=\w)", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    assert len(read_layer(tmp_path / "all.yaml").values) > len(read_layer(FOLDER / "pipeline.yaml").values)
    assert planned(tmp_path / "all.yaml") == planned(FOLDER / "pipeline.yaml")


# --- the algorithms of other libraries ---------------------------------------------------------------

THIRD_PARTY = FOLDER / "third_party"
SB3 = ["PPO", "A2C", "TRPO", "MaskablePPO", "RecurrentPPO", "DQN", "QR-DQN"]


@pytest.fixture
def third_party(example, monkeypatch):
    """Run one of the scripts: the row of its JSON that `compare.py` reads."""
    monkeypatch.syspath_prepend(THIRD_PARTY)

    def run(name: str, *arguments: object) -> dict:
        return json.loads(" ".join(example(f"third_party/{name}", *arguments)[-1]))

    yield run
    sys.modules.pop("world", None)


@pytest.fixture
def world(third_party):
    return importlib.import_module("world")


def test_cleanrl_ppo_climbs_to_above_the_reference_and_stays_below_the_optimum(third_party):
    early, late = (third_party("cleanrl_ppo.py", "--steps", steps, "--seed", 1) for steps in (1024, 16_384))
    assert early["gain"] < 0  # a network that begins uniform is worse than the reference
    assert 0.97 < late["gain"] < 1  # with log π = 0 pushed, which rewards certainty, 0.93 is reached
    assert late["tokens"] == 16_384 and late["kl"] > 0


@pytest.mark.parametrize("algorithm", SB3)
def test_sb3_algorithm_leaves_an_exact_row(third_party, world, algorithm):
    row = third_party("sb3_algorithms.py", algorithm, "--steps", 256, "--seed", 3)
    truth = world.make_world(3)
    assert (row["algorithm"], row["seed"], row["tokens"]) == (algorithm, 3, 256)
    of_reference, of_optimum = 0.0, float(truth.optimal_value())  # gold's mean is 0 under the reference
    objective = row["gold"] - world.BETA * row["kl"]
    assert row["gain"] == pytest.approx((objective - of_reference) / (of_optimum - of_reference), abs=1e-6)
    one_response = (truth.gold - row["gold"]).abs() + (-truth.ref_log_probs - row["kl"]).abs()
    assert (one_response.min() < 1e-6) == ("DQN" in algorithm)  # what a deterministic policy writes is one response


def test_a_policy_with_a_memory_is_measured_as_it_acts(third_party, world, monkeypatch):
    monkeypatch.setitem(sys.modules, "sb3_algorithms", None)  # forget it afterwards
    del sys.modules["sb3_algorithms"]
    scripts = importlib.import_module("sb3_algorithms")
    envs = scripts.SB3VecEnv(world.make_vec(0, 1))
    model = scripts.RecurrentPPO("MultiInputLstmPolicy", envs, seed=0, policy_kwargs=scripts.SMALL)
    scripts.attach_sb3(model)
    with torch.no_grad():
        listed = world.make_world(0).from_states(scripts.through_lstm(model.policy, world.make_world(0).observations()))
        observation, total, row = envs.reset(), 0.0, 0
        memory = tuple(torch.zeros(model.policy.lstm_hidden_state_shape)[:, :1] for _ in range(2))
        for t in range(world.LENGTH):
            tensors = model.policy.obs_to_tensor(observation)[0]
            states = RNNStates(memory, memory)
            actions, _, logp, states = model.policy(tensors, states, torch.tensor([float(t == 0)]))
            total, row, memory = total + logp.item(), row * world.VOCAB_SIZE + actions.item(), states.pi
            observation, *_ = envs.step(actions.numpy())
    assert listed[row].item() == pytest.approx(total, abs=1e-5)


def test_the_table_of_compare_has_exact_bounds_and_keeps_what_was_computed(example, third_party, tmp_path):
    arguments = ["--only", "CleanRL-style PPO", "--seeds", "1", "--steps", 1024, "--out", tmp_path]
    lines = example("third_party/compare.py", *arguments)
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert json.loads(rows) | {"seconds": 0} == third_party("cleanrl_ppo.py", "--steps", 1024, "--seed", 1) | {
        "seconds": 0
    }
    gain = {row["algorithm"]: row["gain"] for row in json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))}
    assert gain.pop("CleanRL-style PPO") < 0
    assert list(gain) == ["the reference", "best of 4", "best deterministic policy", "the optimum"]
    assert gain["the reference"] == pytest.approx(0) and gain["the optimum"] == pytest.approx(1)
    assert 0 < gain["best of 4"] < 1 and 0 < gain["best deterministic policy"] < 1
    assert example("third_party/compare.py", *arguments)[-1] == lines[-1]
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == rows


def test_ppo_and_rloo_are_held_against_the_same_optimum(example):
    lines = example("ppo_and_rloo.py", "--tokens", 3000, "--worlds", 0, 1)
    assert lines[0] == ["world", "PPO", "RLOO"]
    gains = [[percent(x) for x in row[1:]] for row in lines[1:3]]
    assert all(0 < gain < 1 for row in gains for gain in row)
    differences = [b - a for a, b in gains]
    assert percent(lines[-1][6]) == pytest.approx(sum(differences) / 2, abs=2e-4)


def test_ilql_reads_a_log_of_walks_in_which_no_shortest_path_is(example):
    lines = example("ilql_from_a_log.py", "--walks", 3000, "--epochs", 1)
    best, shortest = float(lines[-2][-1]), float(lines[-1][-1])
    assert best > shortest >= 1


@pytest.mark.slow
def test_ilql_finds_the_shortest_paths_where_imitation_walks_on(example):
    lines = example("ilql_from_a_log.py", "--seed", 0)
    (imitated, long), (arrived, short) = ((percent(row[-2]), float(row[-1])) for row in lines[-4:-2])
    best, shortest = float(lines[-2][-1]), float(lines[-1][-1])
    assert arrived > 0.95 > imitated and shortest <= short < best - 1 < long


def test_optimism_compares_four_second_rounds(example):
    lines = example("optimism.py", "--worlds", 2, "--comparisons", 20)
    assert [row[3] for row in lines[2:]] == ["the", "bonus", "bonus", "bonus"]


def test_exploration_compares_each_schedule_with_none(example):
    text = [" ".join(words) for words in example("exploration.py", "--worlds", 0, "--tokens", 3000)]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text[2:]]
    golds = ("smooth", "needle, 1 in 1,000", "needle, 1 in 100,000")
    assert [row[0] for row in rows] == [gold for gold in golds for _ in range(6)]
    assert all(row[4] == "0.0%" for row in rows if "entropy_coef 0 →" in row[1] or "explore 1 →" in row[1])
    assert all(percent(row[2]) < 1 for row in rows) and percent(rows[0][2]) > 0.1 > percent(rows[-1][2])


def test_kl_estimators_agree_with_what_is_known_of_them(example):
    lines = example("kl_estimators.py", "--worlds", 0, "--distances", 0.2)
    rows = {row[1]: [float(x) if x != "–" else None for x in row[2:] if x != "|"] for row in lines[2:]}
    kl, bias, _, cos, norm, *loss = rows["k1"]
    assert kl > 0.2 and (bias, cos, norm) == (0, 1, 1) and loss[1] == 0  # exact as a reward, nothing as a loss
    assert rows["k2"][-2:] == [1, 1]  # exact as a loss of whole responses
    assert rows["k3"][1] == 0 and rows["k3"][-2] < 1  # an unbiased number, and another gradient


COMPARE = "compare_agents"


@pytest.fixture
def study(example, monkeypatch):
    """Run one of the two studies; they import what they share by its plain name, as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER / COMPARE))
    yield lambda name, *arguments: example(f"{COMPARE}/{name}", *arguments)
    sys.modules.pop("study", None)


def test_the_study_of_the_optimum_keeps_every_row(study, tmp_path):
    words = ("optimum.py", "--out", tmp_path, "--worlds", 0, "--tokens", 1500, "--agents")
    lines = study(*words, "ppo", "rloo", "best_of_n", "dpo", "soft_q")
    gains = {row[1]: percent(row[3]) for row in lines[2:7]}
    assert list(gains) == ["ppo", "rloo", "best_of_n", "dpo", "soft_q"] and max(gains.values()) < 1
    assert (tmp_path / "optimum.png").stat().st_size > 10_000
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert study(*words, "ppo", "rloo")[2][3] == lines[2][3], "what was computed is not computed again"
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == kept


@pytest.mark.slow
def test_the_study_of_language_models_runs_every_kind_of_agent(study, tmp_path):
    agents = ("ppo", "best_of_n", "dpo", "ilql", "soft_q")
    lines = study(
        "language.py",
        "reviews",
        "--out",
        tmp_path,
        "--seeds",
        0,
        "--tokens",
        2000,
        "--eval-episodes",
        32,
        "--agents",
        *agents,
    )
    assert tuple(row[1] for row in lines[-5:]) == agents
