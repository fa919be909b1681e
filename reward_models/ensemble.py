"""Several reward models as one: their mean, and a bonus where they disagree, so that training goes and looks there.

Liang et al. 2022 (RUNE), arXiv 2205.12401: the deviation between the members of an ensemble is a reward to explore by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.rewards import ScoreFn, scores_of, scores_tokens
from rlhf_env.errors import ConfigError
from rlhf_env.types import RewardModel


@dataclass(frozen=True)
class Ensemble:
    """The mean of its members' scores, plus `bonus` times the deviation between them.

    The members should be on one scale, as normalised reward models are. A negative bonus is caution: where they
    disagree, they are trusted less.
    """

    members: Sequence[RewardModel | ScoreFn]
    bonus: float = 0.0  #: reward per deviation between the members

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ConfigError(f"an ensemble has at least two members, this one has {len(self.members)}")
        if any(map(scores_tokens, self.members)):
            raise ConfigError("the members of an ensemble score whole responses, and one of these scores tokens")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """The parts "mean" and, with a bonus, "bonus" of each score, [B]; deviations are those of a population."""
        scores = np.stack([scores_of(member, prompts, responses) for member in self.members])  # [K, B]
        parts = {"mean": scores.mean(0)}
        return parts | {"bonus": self.bonus * scores.std(0)} if self.bonus else parts
