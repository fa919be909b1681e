"""One setting says what is learned: each kind leaves a folder that scores, with measures of its own."""

import json
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.records.run import Run
from rlhf_env.reward_models import load_reward
from rlhf_env.reward_models.heads import Disentangled, Groups, MeanVariance, Steps
from rlhf_env.settings import REWARD_KINDS, BradleyTerryConfig
from rlhf_env.training.config import NewModelConfig, RewardConfig, RewardEvalConfig, RewardKind
from rlhf_env.training.page import stage_result
from rlhf_env.training.reward import run_reward
from rlhf_env.training.reward_eval import run_reward_eval
from rlhf_env.training.reward_kinds import KINDS
from rlhf_env.types import Comparison
from tests.tiny_files import write_rows

SMALL = NewModelConfig(tokenizer="byte", n_layer=1, n_embd=16, n_head=2, n_positions=32)
FIT = BradleyTerryConfig(learning_rate=1e-2, epochs=4, batch_size=16)
PEOPLE = {"ann": "+", "ben": "+", "cid": "-", "dan": "-"}
TEXTS = ["abc+", "abc-", "", "abc"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Half of the people want a +, half a −, and all four judge each of 30 prompts; a + is rated 20 and a − 10.

    A step is right where it ends in +.
    """
    folder, rng = tmp_path_factory.mktemp("said"), np.random.default_rng(0)
    noise = ["".join(rng.choice(list("abc"), 3)) for _ in range(240)]
    judged = [
        Comparison(f"{i // 4} ", (noise[2 * i] + "+", noise[2 * i + 1] + "-"), (0, 1) if w == "+" else (1, 0), who)
        for i, (who, w) in enumerate(list(PEOPLE.items()) * 30)
    ]
    write_comparisons(folder / "comparisons.jsonl", judged)
    signs = rng.integers(0, 2, 240).tolist()
    rows = [
        {"prompt": f"{i % 20} ", "response": text + "-+"[y], "rating": 10 + 10 * y}
        for i, (text, y) in enumerate(zip(noise, signs, strict=True))
    ]
    write_rows(folder / "ratings.jsonl", *rows)
    rows = [
        {"prompt": f"{i % 20} ", "steps": [noise[i] + "-+"[y], noise[i + 1] + "-+"[z]], "labels": [y, bool(z)]}
        for i, (y, z) in enumerate(zip(signs[:120], signs[120:], strict=True))
    ]
    write_rows(folder / "steps.jsonl", *rows)
    return folder


def config(files, kind, **settings):
    name = kind if kind in ("ratings", "steps") else "comparisons"
    return RewardConfig(str(files / f"{name}.jsonl"), kind=kind, settings=settings, held_out=0.25, fit=FIT, new=SMALL)


def learned(files, tmp_path, kind, **settings):
    summary = run_reward(config(files, kind, **settings), tmp_path / "run")
    assert summary["kind"] == kind
    reward = load_reward(str(tmp_path / "run/model"))
    assert np.isfinite(reward.score(["p "] * 4, TEXTS)).all()
    json.dumps(summary, allow_nan=False)
    return summary, reward


def test_every_kind_has_settings_and_a_way_to_learn():
    assert REWARD_KINDS.keys() == KINDS.keys() == set(get_args(RewardKind))
    for kind in KINDS:
        assert RewardConfig("file", kind=kind).own == REWARD_KINDS[kind]()


def test_people_are_predicted_by_their_own_score_and_not_by_all_together(files, tmp_path):
    summary, reward = learned(files, tmp_path, "annotators", aggregate="mean")
    assert summary["own_accuracy"] > 0.9 and 0.2 < summary["accuracy"] < 0.8
    assert sorted(row["labeler"] for row in summary["by_labeler"]) == list(PEOPLE)
    assert isinstance(reward.head, Groups) and reward.head.aggregate == "mean"
    for name, wanted in PEOPLE.items():
        plus, minus = load_reward(f"{tmp_path / 'run/model'}:{name}").score(["p "] * 2, ["abc+", "abc-"])
        assert (plus > minus) == (wanted == "+")


def test_a_mixture_says_who_is_in_which_group(files, tmp_path):
    summary, reward = learned(files, tmp_path, "mixture", groups=2, rounds=2)
    assert set(summary["members"]) == set(PEOPLE) and sum(summary["weights"]) == pytest.approx(1)
    groups = {wanted: {summary["members"][who] for who, w in PEOPLE.items() if w == wanted} for wanted in "+-"}
    assert groups["+"] != groups["-"] and len(groups["+"]) == len(groups["-"]) == 1
    assert summary["own_accuracy"] > 0.9
    assert reward.head.names == ("group1", "group2") and reward.head.means
    plus, minus = load_reward(f"{tmp_path / 'run/model'}:{min(groups['+'])}").score(["p "] * 2, ["abc+", "abc-"])
    assert plus > minus
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics] == [1, 2]


def test_disagreement_is_a_deviation(files, tmp_path):
    summary, reward = learned(files, tmp_path, "mean_variance", risk=1.0)
    assert reward.head == MeanVariance(1.0)
    assert summary["log_loss"] == pytest.approx(math.log(2), abs=0.1)  # half want the one, half the other


def test_quality_apart_from_length(files, tmp_path):
    summary, reward = learned(files, tmp_path, "disentangled", of_length=0.5)
    assert reward.head == Disentangled() and "log_loss" in summary


def test_ratings_are_measured_in_their_unit_and_scored_in_that_of_beta(files, tmp_path):
    summary, reward = learned(files, tmp_path, "ratings")
    assert summary["rmse"] < 3 and summary["correlation"] > 0.9 and "accuracy" not in summary
    plus, minus = reward.score(["p "] * 2, ["abc+", "abc-"])
    assert plus == pytest.approx(1, abs=0.5) and minus == pytest.approx(-1, abs=0.5)
    assert stage_result("reward", summary).startswith(f"error on {summary['held_out']} held-out ratings ")


def test_steps(files, tmp_path):
    summary, reward = learned(files, tmp_path, "steps", aggregate="min")
    assert summary["accuracy"] > 0.9 and summary["solutions"] + summary["held_out"] == 120
    assert reward.head == Steps("min")
    good, bad = reward.score(["p "] * 2, ["abc+\nccc+", "abc-\nccc+"])
    assert good > bad
    assert "held-out solutions" in stage_result("reward", summary)


@pytest.mark.parametrize("kind", ["mean_variance", "ratings"])
def test_an_evaluation_believes_the_probability_that_the_model_states_and_none_where_it_states_none(
    files, tmp_path, kind
):
    trained, _ = learned(files, tmp_path, kind)
    asked = RewardEvalConfig(str(tmp_path / "run/model"), str(files / "comparisons.jsonl"), probes=0)
    found = run_reward_eval(asked)
    assert ("log_loss" in found) == (kind == "mean_variance")
    if kind == "mean_variance":
        both = trained["log_loss"] * trained["held_out"] + trained["loss_learned"] * trained["comparisons"]
        assert found["log_loss"] == pytest.approx(both / 120)


def test_what_does_not_fit_the_kind_is_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="there is no setting settings.groups"):
        config(files, "annotators", groups=3)
    with pytest.raises(ConfigError, match="needs groups of at least 2"):
        config(files, "mixture", groups=1)
    with pytest.raises(ConfigError, match="ratings learns from files of its own"):
        replace(config(files, "ratings"), gold="vader")
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in (1, 2)]
    nobody = write_rows(tmp_path / "nobody.jsonl", *rows)
    with pytest.raises(DataError, match=r"nobody.jsonl: .*say who judged"):
        run_reward(replace(config(files, "annotators"), comparisons=nobody), tmp_path / "run")
    with pytest.raises(DataError, match="comparisons.jsonl:1.*'response' is missing"):
        run_reward(replace(config(files, "ratings"), comparisons=str(files / "comparisons.jsonl")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
