"""The spaces of the token MDP, and keeping models out of `copy.deepcopy`."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from rlhf_env.envs.task import TextTask
from rlhf_env.types import SamplingLaw

LOWEST = float(np.finfo(np.float32).min)  #: `candidate_logp` where there is no candidate
_HEAVY = ("reference", "reward_model", "tokenizer")


class TokenSpace(spaces.Dict):
    """The observation space of the token MDP, which also knows the law that tokens are sampled under.

    An algorithm's policy is told its spaces and nothing else, so this is how the law reaches it.
    """

    def __init__(self, parts: dict[str, spaces.Space[Any]], law: SamplingLaw) -> None:
        super().__init__(parts)
        self.law = law


def observation_space(task: TextTask) -> TokenSpace:
    """Right-padded integer boxes of fixed length L: the form that every algorithm of Stable-Baselines3 can read.

    Where the law truncates, `candidates` [K] are the tokens that may be written next, likeliest first, padded with −1,
    and `candidate_logp` [K] their log-probabilities under the reference.
    """
    length, law = (task.observation_length,), task.law
    # Ids of prompts may lie above the last action only where a tokenizer says so; the pad id is an ordinary id.
    parts: dict[str, spaces.Space[Any]] = {
        "input_ids": spaces.Box(0, max(law.vocab_size, 2) - 1, length, np.int64),
        "attention_mask": spaces.Box(0, 1, length, np.int8),
        "response_mask": spaces.Box(0, 1, length, np.int8),
    }
    if law.truncates:
        count = (law.top_k or law.vocab_size,)
        parts["candidates"] = spaces.Box(-1, law.vocab_size - 1, count, np.int64)
        parts["candidate_logp"] = spaces.Box(LOWEST, 0, count, np.float32)
    return TokenSpace(parts, law)


def action_space(task: TextTask) -> spaces.Discrete:
    """The next token's id, or its rank among the candidates."""
    return spaces.Discrete(task.law.top_k if task.action == "candidate" else task.law.vocab_size)


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
