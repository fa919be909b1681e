"""A reward in the unit of β, by numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.reward_models.ensemble import Ensemble, worst_case
from rlhf_env.reward_models.normalise import Normalised, normalised


def length(prompts, responses):
    return [len(r) for r in responses]


def tenfold(prompts, responses):
    return [10 * len(r) + 5 for r in responses]


def test_the_reference_scores_mean_0_and_variance_1():
    """Lengths 1 and 5: mean 3, deviation 2."""
    reward = normalised(length, ["", ""], ["a", "abcde"])
    assert (reward.mean, reward.std) == (3, 2)
    np.testing.assert_array_equal(reward.score(["", "", ""], ["a", "abcde", "abc"]), [-1, 1, 0])
    np.testing.assert_array_equal(reward.score([""], ["a" * 7]), [2])  # and the moments stay, whatever the batch


def test_normalised_first_the_widest_member_of_an_ensemble_does_not_decide_alone():
    """As they are, ten times the length + 5 is never the lowest; normalised, the two agree."""
    texts, members = (["", ""], ["a", "abcde"]), [length, tenfold]
    assert Ensemble(members, combine=worst_case).score(*texts)["combined"].tolist() == [1, 5]
    fair = Ensemble([normalised(member, *texts) for member in members], combine=worst_case)
    np.testing.assert_allclose(fair.score(*texts)["combined"], [-1, 1])


@pytest.mark.parametrize(
    ("responses", "message"),
    [(["a"], "at least 2 responses, not on 1"), (["a", "b"], "all 2 responses have the same score, 1, so no scale")],
)
def test_what_has_no_variance_is_refused(responses, message):
    with pytest.raises(RewardError, match=message):
        normalised(length, [""] * len(responses), responses)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_moments_that_are_none_are_refused(mean, std):
    with pytest.raises(ConfigError, match="cannot be normalised by"):
        Normalised(length, mean, std)
