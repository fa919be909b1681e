"""β, the KL coefficient: fixed, steered towards a target KL, or scheduled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from rlhf_env.errors import ConfigError
from rlhf_env.functional import adaptive_beta_factor


class BetaController(Protocol):
    """Says what β the episodes that begin now are charged, and hears how much KL the finished ones had."""

    value: float  #: reward per nat
    batch: ClassVar[int]  #: finished episodes that it wants to hear of together

    def observe(self, kl: Sequence[float] | np.ndarray) -> None:
        """Take note of finished episodes: their KL in nats per sequence, NaN where it is not known."""
        ...


@dataclass
class AdaptiveBeta:
    """β steered so that the mean KL per sequence approaches `target` nats.

    Ziegler et al. 2019, arXiv 1909.08593, §2.2.

    An episode keeps the β it began with; finished episodes move the β of those that begin later.
    """

    initial: float = 0.15  #: reward per nat
    target: float = 6.0  #: nats per sequence
    horizon: int = 10_000  #: episodes over which a persistent error of 20 % multiplies β by about e^0.2
    value: float = field(init=False)
    batch: ClassVar[int] = 64  #: the clip is meant for the mean KL of many episodes

    def __post_init__(self) -> None:
        if self.initial <= 0 or self.target <= 0 or self.horizon <= 0:
            raise ConfigError("AdaptiveBeta needs a positive initial value, target and horizon")
        self.value = self.initial

    def observe(self, kl: Sequence[float] | np.ndarray) -> None:
        """Take note of the KL of finished episodes, in nats per sequence; NaN counts for nothing."""
        known = np.asarray(kl, dtype=np.float64)
        known = known[~np.isnan(known)]
        if len(known):
            self.value *= adaptive_beta_factor(float(np.mean(known)), self.target, len(known), self.horizon)


@dataclass
class ScheduledBeta:
    """β as a function of how many episodes have finished: straight lines between the given points, level outside.

    An episode keeps the β it began with.
    """

    points: tuple[tuple[int, float], ...]  #: (episodes finished, β), in ascending order of episodes
    episodes: int = 0  #: finished so far
    value: float = field(init=False)
    batch: ClassVar[int] = 1

    def __post_init__(self) -> None:
        episodes, betas = [e for e, _ in self.points], [b for _, b in self.points]
        if not episodes or episodes[0] < 0 or any(a >= b for a, b in zip(episodes, episodes[1:], strict=False)):
            raise ConfigError(f"ScheduledBeta needs points at ascending numbers of episodes, got {episodes}")
        if not all(0 <= b < np.inf for b in betas):
            raise ConfigError(f"every β must be a finite number of at least 0, got {betas}")
        self.observe(())

    def observe(self, kl: Sequence[float] | np.ndarray) -> None:
        """Count the finished episodes; their KL does not matter here."""
        self.episodes += len(kl)
        episodes, betas = zip(*self.points, strict=True)
        self.value = float(np.interp(self.episodes, episodes, betas))
