"""What the single and the batched view of the state machine have in common."""

from __future__ import annotations

from gymnasium.envs.registration import EnvSpec

from rlhf_env.envs.core import TokenMDP
from rlhf_env.envs.spaces import share_models


class CoreView:
    """A spec that never copies models, and the state machine's β."""

    core: TokenMDP
    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """How `gym.make` made this environment; models among its keywords survive copies of it."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = share_models(spec)

    @property
    def beta(self) -> float:
        """The KL coefficient of episodes that begin now, in reward per nat."""
        return self.core.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.core.beta = value
