"""An observation that was changed on its way to the policy is refused with what to do about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import flatten

from rlhf_env.errors import ConfigError
from rlhf_env.models.observation import require_observation
from tests.builders import make_env, random_model


def observation() -> dict[str, Any]:
    """Two states: a prompt of 3 tokens with 2 written, and a prompt of 1 with none."""
    return {
        "input_ids": np.array([[3, 4, 5, 6, 7, 10], [8, 10, 10, 10, 10, 10]]),
        "attention_mask": np.array([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=np.int8),
        "response_mask": np.array([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=np.int8),
    }


def test_states_of_the_environment_pass_in_every_form_that_libraries_give_them():
    good = observation()
    require_observation(good, vocab_size=11)
    require_observation({k: v[0] for k, v in good.items()})
    require_observation({k: torch.tensor(v, dtype=torch.float32) for k, v in good.items()})
    require_observation({k: np.zeros_like(v) for k, v in good.items()})  # what pads a recurrent policy's sequences
    env = make_env(prompts=["abc"], kl_mode="off")
    state, _ = env.reset(seed=0)
    require_observation(state)
    require_observation(env.step(1)[0])


def test_a_flattened_observation_is_named():
    env = make_env()
    flat = flatten(env.observation_space, env.reset(seed=0)[0])
    with pytest.raises(ConfigError, match="ndarray, not a mapping .* read it as the dict .* FlattenObservation"):
        require_observation(flat)  # type: ignore[arg-type]


def change(part: str, row: int, column: int, value: float) -> dict[str, Any]:
    """The good states, as floats, with one number changed."""
    obs = {k: v.astype(np.float32) for k, v in observation().items()}
    obs[part][row, column] = value
    return obs


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ({"input_ids": np.zeros((1, 2))}, "has no attention_mask, response_mask, only input_ids"),
        (
            observation() | {"input_ids": np.zeros((2, 5))},
            r"all be \[L\] or all be \[N, L\], got input_ids \(2, 5\), attention_mask \(2, 6\)",
        ),
        (
            change("input_ids", 1, 0, 0.25),
            "input_ids holds 0.25 in row 1, which is not a whole number.*VecNormalize set norm_obs=False",
        ),
        (change("attention_mask", 0, 2, -0.5), "attention_mask holds -0.5 in row 0.*norm_obs=False"),
        (change("input_ids", 0, 1, np.nan), "input_ids holds nan in row 0"),
        (change("input_ids", 0, 1, 11), "input_ids hold 11 in row 0, which is no token of a vocabulary of 11"),
        (change("input_ids", 0, 1, -1), "input_ids hold -1 in row 0.*another tokenizer"),
        (change("response_mask", 1, 0, 7), "response_mask holds 7 in row 1, but masks hold 0 and 1.*by its name"),
        (change("attention_mask", 0, 1, 0), "attention_mask goes on after a gap in row 0.*pad.* on the right"),
        (change("response_mask", 0, 0, 1), "response_mask does not mark the end of .* in row 0.*by its name"),
        (change("response_mask", 0, 4, 0), "response_mask does not mark the end"),
        (change("response_mask", 1, 3, 1), "response_mask does not mark the end of .* in row 1"),
    ],
)
def test_what_was_changed_and_what_to_do(obs, message):
    with pytest.raises(ConfigError, match=message):
        require_observation(obs, vocab_size=11)


def test_parts_in_the_wrong_order_are_noticed_whichever_they_are():
    """As when zip(observation_space, parts) pairs the sorted names with another order."""
    good = observation()
    names = list(good)
    for order in ([1, 0, 2], [2, 1, 0], [0, 2, 1], [1, 2, 0], [2, 0, 1]):
        with pytest.raises(ConfigError, match="mixed up"):
            require_observation({name: good[names[i]] for name, i in zip(names, order, strict=True)}, vocab_size=11)


def test_left_padding_is_refused():
    with pytest.raises(ConfigError, match="tokens stand at the left"):
        require_observation({k: v[:, ::-1] for k, v in observation().items()})


def test_a_policy_asked_by_the_environment_checks_what_it_is_given():
    policy = random_model()
    law = make_env().core.task.law
    with pytest.raises(ConfigError, match="norm_obs=False"):
        policy.action_log_probs(change("input_ids", 0, 0, 3.5), np.array([1, 2]), law)
    with pytest.raises(ConfigError, match="no token of a vocabulary of 11"):
        policy.action_log_probs(change("input_ids", 0, 0, 12), np.array([1, 2]), law)
