"""IPO, identity preference optimization: each preferred response is to lead by so many nats, and by no more.

Azar et al. 2023 (arXiv 2310.12036), eq. 17.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from rlhf_env.agents.dpo import pair_step
from rlhf_env.errors import ConfigError
from rlhf_env.functional import ipo_loss
from rlhf_env.models.descent import Descent, passes
from rlhf_env.settings import require
from rlhf_env.types import Pairs, Policy


@dataclass(frozen=True)
class IPOConfig:
    """Settings of IPO."""

    learning_rate: float = 1e-6  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the steps
    epochs: int = 1  #: passes over the pairs
    batch_size: int = 64  #: pairs per gradient step
    micro_batch_size: int = 0  #: pairs per backward pass, to save memory; 0: all at once; the gradient is the same
    beta: float = 0.1  #: probability of preference per nat (τ in the paper): who is always preferred leads by 1/(2β)
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), epochs=(1, None), batch_size=(1, None), micro_batch_size=(0, None))
        require(self, beta=(0, None))
        if self.beta == 0:
            raise ConfigError("IPO needs beta above 0: who is always preferred is to lead by 1/(2β)")


class IPO:
    """Draws the lead of the preferred response, in log-ratios to the reference, to 1/(2β), however sure the label."""

    learns_from: ClassVar[Literal["pairs"]] = "pairs"

    def __init__(self, policy: Policy, config: IPOConfig = IPOConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.seed = policy, config, seed
        self.descent = Descent.of(policy.parameters(), config, adam_eps=1e-8)

    def fit(self, pairs: Pairs, *, updates: int | None = None, start: int = 0) -> Iterator[dict[str, float]]:
        """Learn from `pairs`, ties included, yielding metrics at every gradient step.

        `updates` is the number of steps (none: `epochs` passes), `start` that of those taken already.
        """
        c = self.config

        def loss(first: Tensor, second: Tensor, batch: Pairs) -> Tensor:
            return ipo_loss(first - second, batch.preference, c.beta)

        for step, steps, rows in passes(
            len(pairs), c.batch_size, self.seed, epochs=c.epochs, updates=updates, start=start
        ):
            self.descent.begin(step / steps)
            metrics = pair_step(self.policy, self.descent, pairs, rows, loss, c.beta, c.micro_batch_size)
            yield {"epoch": (step + 1) / math.ceil(len(pairs) / c.batch_size), **metrics}

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)
