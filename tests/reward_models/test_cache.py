"""A reward with a memory: asked once about each text, forgetting the least recently wanted, never mixing models."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.reward_models.cache import cached


class Counting:
    def __init__(self, unit: float = 1.0) -> None:
        self.unit, self.asked = unit, []

    def score(self, prompts, responses):
        self.asked += zip(prompts, responses, strict=True)
        return [self.unit * (100 * len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]


def test_a_text_is_asked_about_once():
    model = Counting()
    reward = cached(model)
    np.testing.assert_array_equal(reward.score(["p", "", "p"], ["a", "bb", "a"]), [101, 2, 101])
    np.testing.assert_array_equal(reward.score(["", "p"], ["bb", "ccc"]), [2, 103])
    assert model.asked == [("p", "a"), ("", "bb"), ("p", "ccc")]
    assert reward.score([], []).shape == (0,)


def test_prompt_and_response_are_not_run_together():
    reward = cached(Counting())
    np.testing.assert_array_equal(reward.score(["a", "ab"], ["bc", "c"]), [102, 201])
    np.testing.assert_array_equal(reward.score(["\ud800"], ["\udfff"]), [101])  # half characters are texts, too


def test_two_models_share_no_memory():
    one, two = cached(Counting()), cached(Counting(unit=10.0))
    for reward, score in ((one, 1), (two, 10), (one, 1)):
        np.testing.assert_array_equal(reward.score([""], ["a"]), [score])


def test_it_forgets_what_was_wanted_least_recently():
    model = Counting()
    reward = cached(model, size=2)
    for text in ("a", "b", "a", "c", "a", "b"):  # "c" takes the place of "b"
        reward.score([""], [text])
    assert [response for _, response in model.asked] == ["a", "b", "c", "b"]
    np.testing.assert_array_equal(reward.score([""] * 3, ["x", "xx", "xxx"]), [1, 2, 3])  # more at once than it holds


def test_a_failure_is_not_remembered():
    answers = [[float("nan")], [1.0]]
    reward = cached(lambda prompts, responses: answers.pop(0))
    with pytest.raises(RewardError, match="not finite"):
        reward.score([""], ["a"])
    np.testing.assert_array_equal(reward.score([""], ["a"]), [1])


def test_a_memory_holds_something():
    with pytest.raises(ConfigError, match="at least 1 score, not 0"):
        cached(Counting(), size=0)
