"""Several reward models as one: their mean, their worst case, or any quantile; and more or less where they disagree.

Members may differ in seed, in the comparisons they saw (bagging) or in their bodies. Worst case and mean less deviation
are the pessimistic ensembles of Coste et al. 2023 (arXiv 2310.02743), whose deviation is a variance; a bonus for
deviation is a reward to explore by (Liang et al. 2022, RUNE, arXiv 2205.12401).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.rewards import ScoreFn, require_whole, scores_of
from rlhf_env.errors import ConfigError
from rlhf_env.types import RewardModel

Combine = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def mean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the members [K, B] say on average, [B]."""
    return scores.mean(0)


def worst_case(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the strictest of the members [K, B] says, [B]: the quantile 0."""
    return scores.min(0)


def quantile(q: float) -> Combine:
    """What a share `q` of the members stays below, interpolated linearly between them; 0.5 is the median."""
    if not 0 <= q <= 1:
        raise ConfigError(f"a quantile is between 0 and 1, not {q}")
    return partial(np.quantile, q=q, axis=0)


@dataclass(frozen=True)
class Ensemble:
    """What `combine` makes of its members' scores, plus `bonus` times the deviation between them.

    Scores are combined as the members give them, so these must be on one scale, or the widest decides alone: a learned
    model that stores its normaliser is, others are made so first (`normalised`). A negative bonus is caution: where the
    members disagree, they are trusted less.
    """

    members: Sequence[RewardModel | ScoreFn]
    bonus: float = 0.0  #: reward per deviation between the members
    combine: Combine = mean  #: makes of scores [K, B] one of each response, [B]

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("an ensemble has at least one member, this one has none")
        if not math.isfinite(self.bonus):
            raise ConfigError(f"the bonus of an ensemble must be finite, it is {self.bonus}")
        if self.bonus and len(self.members) < 2:
            raise ConfigError("members that can disagree are at least two, and this ensemble with a bonus has one")
        require_whole("an ensemble", *self.members)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """The parts "mean" ("combined", where it is not that) and, with a bonus, "bonus" of each score, [B].

        Deviations are those of a population.
        """
        scores = np.stack([scores_of(member, prompts, responses) for member in self.members])  # [K, B]
        parts = {"mean" if self.combine is mean else "combined": self.combine(scores)}
        return parts | {"bonus": self.bonus * scores.std(0)} if self.bonus else parts
