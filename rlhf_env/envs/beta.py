"""β, the KL coefficient: fixed, or steered towards a target KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_env.errors import ConfigError
from rlhf_env.functional import adaptive_beta_factor


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

    def __post_init__(self) -> None:
        if self.initial <= 0 or self.target <= 0 or self.horizon <= 0:
            raise ConfigError("AdaptiveBeta needs a positive initial value, target and horizon")
        self.value = self.initial

    def observe(self, kl: Sequence[float] | np.ndarray) -> None:
        """Take note of the KL of finished episodes, in nats per sequence."""
        if len(kl):
            self.value *= adaptive_beta_factor(float(np.mean(kl)), self.target, len(kl), self.horizon)
