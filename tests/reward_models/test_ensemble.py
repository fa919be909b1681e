"""An ensemble: the mean of its members, and a bonus for disagreement that training sees and evaluation does not."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import ConfigError
from rlhf_env.reward_models.ensemble import Ensemble, mean, quantile, worst_case
from rlhf_env.reward_models.load import load_reward
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.training.assemble import assemble
from rlhf_env.training.config import TrainConfig
from rlhf_env.worlds.reviews import ASSETS


def long(prompts, responses):
    return [float(len(r)) for r in responses]


def short(prompts, responses):
    return [-float(len(r)) + 4 for r in responses]


def test_mean_and_bonus_by_hand():
    """Of "ab" the members say 2 and 2, of "abcd" 4 and 0: means 2 and 2, deviations 0 and 2."""
    texts = ["", ""], ["ab", "abcd"]
    np.testing.assert_array_equal(scores_of(Ensemble([long, short]), *texts), [2, 2])
    parts = Ensemble([long, short], bonus=0.5).score(*texts)
    np.testing.assert_array_equal(parts["mean"], [2, 2])
    np.testing.assert_array_equal(parts["bonus"], [0, 1])
    np.testing.assert_array_equal(scores_of(Ensemble([long, short], bonus=-0.5), *texts), [2, 1])


def test_equal_members_are_that_member():
    np.testing.assert_array_equal(scores_of(Ensemble([long, long], bonus=9.0), ["", ""], ["a", "abc"]), [1, 3])


def test_an_ensemble_has_members_and_two_to_disagree():
    with pytest.raises(ConfigError, match="at least one member, this one has none"):
        Ensemble([])
    for bonus in (float("nan"), float("-inf")):
        with pytest.raises(ConfigError, match=f"bonus of an ensemble must be finite, it is {bonus}"):
            Ensemble([long, short], bonus=bonus)
    with pytest.raises(ConfigError, match="are at least two, and this ensemble with a bonus has one"):
        Ensemble([long], bonus=0.5)


def test_worst_case_and_quantiles_by_hand():
    """Of members that say 1, 2 and 6 the lowest is 1, the median 2, and a quarter of the way up from there 3."""
    members = [partial(constant, value) for value in (2.0, 6.0, 1.0)]
    expected = {worst_case: 1, quantile(0): 1, quantile(0.5): 2, quantile(0.625): 3, quantile(1): 6}
    for combine, score in expected.items():
        parts = Ensemble(members, combine=combine).score(["", ""], ["a", "b"])
        np.testing.assert_allclose(parts["combined"], [score, score])
    with pytest.raises(ConfigError, match="between 0 and 1, not 1.5"):
        quantile(1.5)


def constant(value: float, prompts, responses):
    return [value] * len(responses)


def said(rows: list[list[float]]):
    """A reward model that says of "0", "1" … what stands there in a row."""
    return [lambda prompts, responses, row=row: [row[int(r)] for r in responses] for row in rows]


numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
tables = st.integers(1, 5).flatmap(
    lambda b: st.lists(st.lists(numbers, min_size=b, max_size=b), min_size=1, max_size=6)
)
COMBINES = [mean, worst_case, quantile(0.3)]


@given(tables)
def test_the_worst_case_is_the_quantile_0_and_at_most_every_quantile_and_the_mean(rows):
    texts = [""] * len(rows[0]), [str(i) for i in range(len(rows[0]))]
    low, none, some, average = (
        scores_of(Ensemble(said(rows), combine=combine), *texts)
        for combine in (worst_case, quantile(0), quantile(0.4), mean)
    )
    np.testing.assert_allclose(low, none)
    assert (low <= some + 1e-9).all() and (low <= average + 1e-9).all()
    if len(rows) > 1:
        assert (scores_of(Ensemble(said(rows), bonus=-0.5), *texts) <= average + 1e-9).all()


@given(tables, st.floats(0.01, 10), numbers)
def test_it_is_shifted_and_scaled_as_its_members_are(rows, scale, shift):
    texts = [""] * len(rows[0]), [str(i) for i in range(len(rows[0]))]
    moved = said([[scale * x + shift for x in row] for row in rows])
    bonus = -0.5 if len(rows) > 1 else 0.0
    for combine in COMBINES:
        before, after = (scores_of(Ensemble(members, bonus, combine), *texts) for members in (said(rows), moved))
        np.testing.assert_allclose(after, scale * before + shift, atol=1e-6)


@pytest.mark.parametrize("combine", COMBINES)
def test_of_one_member_it_is_that_member(combine):
    np.testing.assert_array_equal(scores_of(Ensemble([long], combine=combine), ["", ""], ["a", "abc"]), [1, 3])


@pytest.mark.parametrize("combine", COMBINES)
def test_a_score_does_not_depend_on_batch_mates(combine):
    ensemble, texts = Ensemble([long, short, VaderReward()], -0.3, combine), ["good", "a bad film", "", "so so"]
    alone = [scores_of(ensemble, [""], [text])[0] for text in texts]
    np.testing.assert_array_equal(scores_of(ensemble, [""] * 4, texts), alone)


def test_the_command_line_names_them_with_commas():
    ensemble = load_reward(f"{__name__}:long, vader")
    assert isinstance(ensemble, Ensemble) and len(ensemble.members) == 2 and ensemble.bonus == 0
    with pytest.raises(ConfigError, match="unknown reward model 'vadr'"):
        load_reward("vader,vadr")


def test_training_sees_the_bonus_and_evaluation_does_not():
    config = TrainConfig(
        policy=str(ASSETS / "reference"), prompts="builtin:reviews", reward=f"{__name__}:long,vader", bonus=0.5
    )
    parts = assemble(config)
    assert (parts.envs.task.reward_model.bonus, parts.eval_envs.task.reward_model.bonus) == (0.5, 0)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="name them with commas"):
        assemble(dataclasses.replace(config, reward="vader"))


def test_the_bonus_of_training_is_added_to_the_ensembles_own(tmp_path):
    """A cautious ensemble, explored: −1 + 0.5 deviations are training's, −1 those of evaluation."""
    recipe = tmp_path / "cautious.yaml"
    recipe.write_text(f"kind: lower_bound\nk: 1.0\nmembers: ['{__name__}:long', vader]\n", encoding="utf-8")
    parts = assemble(
        TrainConfig(policy=str(ASSETS / "reference"), prompts="builtin:reviews", reward=str(recipe), bonus=0.5)
    )
    assert (parts.envs.task.reward_model.bonus, parts.eval_envs.task.reward_model.bonus) == (-0.5, -1)  # type: ignore[union-attr]


class Process:
    def score_tokens(self, prompts, responses):
        return [[1.0] * len(r) for r in responses]


def test_a_member_that_scores_tokens_is_refused():
    with pytest.raises(ConfigError, match="score whole responses"):
        Ensemble([long, Process()])
