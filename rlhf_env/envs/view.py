"""What the single and the batched view of the state machine have in common."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, Self

from gymnasium.envs.registration import EnvSpec

from rlhf_env.envs.core import TokenMDP
from rlhf_env.envs.spaces import share_models
from rlhf_env.errors import ConfigError


def refuse_time_limit() -> NoReturn:
    """Raise: a limit outside of the environment cannot be part of its law."""
    raise ConfigError(
        "TimeLimit (max_episode_steps) would end episodes before the reward model speaks, with reward 0: limit the "
        "response with max_new_tokens instead"
    )


def known_options(options: dict[str, Any] | None, *names: str) -> dict[str, Any]:
    """The options of a reset; `ValueError` names one that nobody would read."""
    options = options or {}
    if unknown := [name for name in options if name not in names]:
        raise ValueError(f"reset knows no option {unknown[0]!r}; there are {', '.join(names)}")
    return options


class CoreView:
    """A spec that never copies models, copies that share them, and the state machine's β."""

    core: TokenMDP
    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """How `gym.make` made this environment; models among its keywords survive copies of it."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None and spec.max_episode_steps is not None:
            refuse_time_limit()
        self._spec = share_models(spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        task = self.core.task
        bound = getattr(self.core.log_pi.fn, "args", ())  # a policy given to `bind_policy` is a model too
        for shared in (task, task.reference, task.reward_model, task.codec, *bound):
            if not isinstance(shared, TokenMDP):
                memo[id(shared)] = shared
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def beta(self) -> float:
        """The KL coefficient of episodes that begin now, in reward per nat."""
        return self.core.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.core.beta = value
