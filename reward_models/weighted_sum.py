"""A weighted sum of rewards, Σ w·r, each of which stays visible."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.rewards import ScoreFn, require_whole, scores_of
from rlhf_env.errors import ConfigError
from rlhf_env.types import RewardModel


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight · reward over named parts, each a reward and its weight."""

    parts: Mapping[str, tuple[RewardModel | ScoreFn, float]]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("a weighted sum has at least one part, this one has none")
        for name, (reward, weight) in self.parts.items():
            require_whole("a weighted sum", reward)
            if not math.isfinite(weight):
                raise ConfigError(f"the weight of {name!r} must be a finite number, it is {weight}")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """weight · reward of each response, [B], by the name of the part."""
        return {name: w * scores_of(reward, prompts, responses) for name, (reward, w) in self.parts.items()}
