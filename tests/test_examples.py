"""Every example runs as it is typed, with a small budget, and learns what it says it learns."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from rlhf_env.records.config import build, override_layer, read_layer, to_dict
from rlhf_env.training.config import PipelineConfig
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


def test_your_own_algorithm_climbs_from_below_the_reference(example):
    lines = example("your_own_algorithm.py", "--updates", 20)
    assert lines[0][:2] == ["the", "optimum's"]
    gains = [percent(row[-1]) for row in lines[3:]]
    assert [int(row[0]) for row in lines[3:]] == list(range(0, 21, 2))
    assert gains[0] < 0 < gains[-1] < 1  # a uniform network is worse than the reference


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


def test_every_pipeline_is_planned_by_a_test_here():
    here = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in FOLDER.glob("*.yaml") if f'("{path.name}"' not in here] == []


def test_what_is_commented_out_in_the_pipeline_is_the_default(tmp_path):
    text = (FOLDER / "pipeline.yaml").read_text(encoding="utf-8")
    (tmp_path / "all.yaml").write_text(re.sub(r"^( *)#(?=\w)", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    assert len(read_layer(tmp_path / "all.yaml").values) > len(read_layer(FOLDER / "pipeline.yaml").values)
    assert planned(tmp_path / "all.yaml") == planned(FOLDER / "pipeline.yaml")
