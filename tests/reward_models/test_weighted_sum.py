"""A weighted sum, by numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import ConfigError
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.reward_models.weighted_sum import WeightedSum


def length(prompts, responses):
    return [len(r) for r in responses]


def asked(prompts, responses):
    return {"words": [len(p.split()) for p in prompts], "one": [1.0] * len(prompts)}


def test_parts_are_weighted_and_stay_visible():
    """Of "abcd" after "two words": −0.5·4 + 2·(2 + 1) = 4."""
    reward = WeightedSum({"brief": (length, -0.5), "asked": (asked, 2.0)})
    parts = reward.score(["two words", ""], ["abcd", "a"])
    assert {name: part.tolist() for name, part in parts.items()} == {"brief": [-2, -0.5], "asked": [6, 2]}
    np.testing.assert_array_equal(scores_of(reward, ["two words", ""], ["abcd", "a"]), [4, 1.5])


def test_a_score_does_not_depend_on_batch_mates():
    reward, texts = WeightedSum({"nice": (VaderReward(), 0.3), "brief": (length, -0.01)}), ["good", "a bad film", ""]
    alone = [scores_of(reward, [""], [text])[0] for text in texts]
    np.testing.assert_array_equal(scores_of(reward, [""] * 3, texts), alone)


def test_what_is_no_sum_is_refused():
    with pytest.raises(ConfigError, match="at least one part"):
        WeightedSum({})
    with pytest.raises(ConfigError, match="weight of 'a' must be a finite number"):
        WeightedSum({"a": (length, float("nan"))})
