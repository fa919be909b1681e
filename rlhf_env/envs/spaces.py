"""The spaces of the token MDP, and keeping models out of `copy.deepcopy`."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from rlhf_env.envs.task import TextTask

_HEAVY = ("reference", "reward_model", "tokenizer")


def observation_space(task: TextTask) -> spaces.Dict:
    """Right-padded integer boxes of fixed length L: the form that every algorithm of Stable-Baselines3 can read."""
    length = (task.observation_length,)
    # Ids of prompts may lie above the last action only where a tokenizer says so; the pad id is an ordinary id.
    return spaces.Dict(
        {
            "input_ids": spaces.Box(0, max(task.law.vocab_size, 2) - 1, length, np.int64),
            "attention_mask": spaces.Box(0, 1, length, np.int8),
            "response_mask": spaces.Box(0, 1, length, np.int8),
        }
    )


def action_space(task: TextTask) -> spaces.Discrete:
    """The next token id."""
    return spaces.Discrete(task.law.vocab_size)


class Shared:
    """A model inside an `EnvSpec`: copying the spec shares it, where `copy.deepcopy` would duplicate its weights."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self

    def __repr__(self) -> str:
        return f"Shared({type(self.value).__name__})"


def share_models(spec: EnvSpec | None) -> EnvSpec | None:
    """The same spec with the models among its keywords held by `Shared`, so that `spec.make()` never copies them."""
    if spec is not None:
        for name in _HEAVY:
            value = spec.kwargs.get(name)
            if value is not None and not isinstance(value, Shared):
                spec.kwargs[name] = Shared(value)
    return spec


def unshared(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords as the user gave them."""
    return {k: v.value if isinstance(v, Shared) else v for k, v in kwargs.items()}
