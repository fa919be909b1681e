"""A reward in the unit in which β counts: score = (r − mean) / std, so that a reference's responses score 0 ± 1.

Ziegler et al. 2019 (arXiv 1909.08593), §2. Mean and deviation are estimated once and then stay: those of a batch would
make a score depend on its batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.rewards import ScoreFn, require_whole, scores_of
from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.types import RewardModel


@dataclass(frozen=True)
class Normalised:
    """`reward`, shifted and scaled: (r − mean) / std."""

    reward: RewardModel | ScoreFn
    mean: float = 0.0  #: the reward that scores 0
    std: float = 1.0  #: how many units of the reward are one unit of the score

    def __post_init__(self) -> None:
        require_whole("a normalised reward", self.reward)
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ConfigError(f"a score cannot be normalised by the mean {self.mean} and the std {self.std}")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """(r − mean) / std of each response, [B]."""
        return (scores_of(self.reward, prompts, responses) - self.mean) / self.std


def normalised(reward: RewardModel | ScoreFn, prompts: Sequence[str], responses: Sequence[str]) -> Normalised:
    """`reward` such that these responses, of a reference, score mean 0 and variance 1.

    Raises `RewardError` for fewer than two responses, or where all score the same.
    """
    mean, std = moments(scores_of(reward, prompts, responses))
    return Normalised(reward, mean, std)


def moments(scores: NDArray[np.float64], what: str = "score") -> tuple[float, float]:
    """Mean and standard deviation of a population [B] that something can be normalised by; `what` they are of."""
    if len(scores) < 2:
        raise RewardError(f"a score is normalised on at least 2 responses, not on {len(scores)}")
    if broken := np.flatnonzero(~np.isfinite(scores)).tolist():
        raise RewardError(f"the {what} of response {broken[0]} is {scores[broken[0]]}: nothing can be normalised")
    mean, std = float(scores.mean()), float(scores.std())
    if std <= 1e-6 * max(1.0, abs(mean)):  # what rounding alone can cause
        raise RewardError(
            f"all {len(scores)} responses have the same {what}, {mean:.6g}, so no scale gives them variance 1: "
            "normalise on responses that differ, or train the reward model longer"
        )
    return mean, std
