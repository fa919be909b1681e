import functools

import numpy as np
import pytest
import torch

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import RewardError

PROMPTS, RESPONSES = ["p", "q", "r"], ["one", "tw\x1bo", "three"]


def returning(answer):
    return lambda prompts, responses: answer


class ByLength:
    def score(self, prompts, responses):
        return np.array([len(p + r) for p, r in zip(prompts, responses, strict=True)])


def test_a_reward_model_or_a_callable_is_asked():
    for reward in (ByLength(), ByLength().score, functools.partial(ByLength().score)):
        scores = scores_of(reward, PROMPTS, RESPONSES)
        assert scores.dtype == np.float64
        np.testing.assert_array_equal(scores, [4, 5, 6])


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.5, -3],
        (1.0, 2.5, -3.0),
        np.array([1, 2.5, -3], dtype=np.float32),
        torch.tensor([1, 2.5, -3], requires_grad=True),
        torch.tensor([1, 2.5, -3], dtype=torch.bfloat16),
    ],
)
def test_tensors_arrays_and_lists_become_float64(answer):
    np.testing.assert_array_equal(scores_of(returning(answer), PROMPTS, RESPONSES), [1.0, 2.5, -3.0])


def test_integers_and_truth_values_count_as_numbers():
    np.testing.assert_array_equal(scores_of(returning(torch.tensor([1, 2, 3])), PROMPTS, RESPONSES), [1, 2, 3])
    np.testing.assert_array_equal(scores_of(returning([True, False, True]), PROMPTS, RESPONSES), [1, 0, 1])


def test_the_caller_keeps_its_own_copy():
    answer = np.zeros(3)
    scores_of(returning(answer), PROMPTS, RESPONSES)[0] = 5
    assert answer[0] == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], r"shape \[2\] for 3 responses"),
        (np.zeros((3, 1)), r"shape \[3, 1\] for 3 responses"),
        (1.0, r"shape \[\] for 3 responses"),
        (None, "NoneType of dtype object"),
        (["1", "2", "3"], "list of dtype <U1"),
        ([1.0, None, 2.0], "dtype object"),
        ([1.0, [2.0], 3.0], "no array of numbers"),
        ([1j, 2j, 3j], "complex"),
    ],
)
def test_a_wrong_answer_is_described(answer, message):
    with pytest.raises(RewardError, match=message):
        scores_of(returning(answer), PROMPTS, RESPONSES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_and_shown(bad):
    with pytest.raises(RewardError) as error:
        scores_of(returning([1.0, bad, bad]), PROMPTS, RESPONSES)
    assert f"2 of 3 scores that are not finite; the first is {bad} in row 1" in str(error.value)
    assert '"tw‹U+001B›o"' in str(error.value)


def test_the_reward_model_is_named():
    class Broken:
        def score(self, prompts, responses):
            return []

    with pytest.raises(RewardError, match=r"test_rewards\.test_the_reward_model_is_named\.<locals>\.Broken returned"):
        scores_of(Broken(), PROMPTS, RESPONSES)
    with pytest.raises(RewardError, match=r"builtins\.int is no reward model"):
        scores_of(3, PROMPTS, RESPONSES)
