"""DPO, direct preference optimization: a policy learned from comparisons as if it were their reward model.

Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with smoothed labels, Mitchell 2023, "A note on DPO with noisy
preferences". `pair_step` is what IPO, KTO and online DPO share with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf_env import processes
from rlhf_env.errors import ConfigError
from rlhf_env.functional import dpo_loss, implicit_reward
from rlhf_env.models.descent import Descent, passes, require_finite_logp
from rlhf_env.settings import require
from rlhf_env.types import Pairs, Policy, Rollout


@dataclass(frozen=True)
class DPOConfig:
    """Settings of DPO."""

    learning_rate: float = 1e-6  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the steps
    epochs: int = 1  #: passes over the pairs
    batch_size: int = 64  #: pairs per gradient step
    micro_batch_size: int = 0  #: pairs per backward pass, to save memory; 0: all at once; the gradient is the same
    beta: float = 0.1  #: log-odds of preference per nat; the environment's β only where its rewards are log-odds
    smoothing: float = 0.0  #: probability that a label was turned over; above 0, the optimum is finite
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), epochs=(1, None), batch_size=(1, None), micro_batch_size=(0, None))
        require(self, beta=(0, None), smoothing=(0, 0.5))
        if self.beta == 0:
            raise ConfigError("DPO needs beta above 0: the reward that a policy implies is β log(π/ref)")


class DPO:
    """Makes the policy's log-ratios to the reference explain who was preferred, as the rewards that they imply."""

    learns_from: ClassVar[Literal["pairs"]] = "pairs"

    def __init__(self, policy: Policy, config: DPOConfig = DPOConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.seed = policy, config, seed
        # The gradient holds a factor β (1 − σ(β d)) and is small: a larger ε would slow Adam down.
        self.descent = Descent.of(policy.parameters(), config, adam_eps=1e-8)

    def fit(self, pairs: Pairs, *, updates: int | None = None, start: int = 0) -> Iterator[dict[str, float]]:
        """Learn from `pairs`, ties included, yielding metrics at every gradient step.

        `updates` is the number of steps (none: `epochs` passes), `start` that of those taken already.
        """
        c = self.config

        def loss(first: Tensor, second: Tensor, batch: Pairs) -> Tensor:
            return dpo_loss(first - second, batch.preference, c.beta, c.smoothing)

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


def pair_step(
    policy: Policy,
    descent: Descent,
    pairs: Pairs,
    rows: Tensor,
    loss: Callable[[Tensor, Tensor, Pairs], Tensor],
    beta: float,
    micro_batch_size: int = 0,
) -> dict[str, float]:
    """One gradient step on the mean loss of the pairs `rows` [M]; returns its metrics, to which ties do not count.

    `loss` makes a number of each pair, [m], from log(π/ref) of its first and of its second response and the pairs
    themselves. The data may be on another device than the policy.
    """
    device = getattr(policy, "device", "cpu")
    seen: list[Tensor] = []

    def loss_of(part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = pairs[part].to(device)
        first, second = (log_ratio(policy, each, part.to(device)) for each in (batch.first, batch.second))
        seen.append(torch.stack([first, second]).detach().cpu())
        mean = loss(first, second, batch).mean()
        return mean, {"loss": mean}

    metrics = descent.step(loss_of, rows, micro_batch_size=micro_batch_size)
    everyone = [each for those in processes.gather(seen) for each in those]
    preference, log_ratios = pairs.preference[rows], torch.cat(everyone, dim=1).to(rows.device)
    untied = preference != 0.5
    first, second = log_ratios[:, untied]
    is_first = preference[untied] > 0.5
    chosen, rejected = torch.where(is_first, first, second), torch.where(is_first, second, first)
    return {
        **metrics,
        "accuracy": float((0.5 + 0.5 * torch.sign(chosen - rejected)).mean()),
        "margin": beta * float((chosen - rejected).mean()),
        "chosen_log_ratio": float(chosen.mean()),
        "rejected_log_ratio": float(rejected.mean()),
        "learning_rate": descent.current_rate,
    }


def log_ratio(policy: Policy, rollout: Rollout, rows: Tensor) -> Tensor:
    """log(π/ref) of each response, [B], with gradient; `NonFiniteError` calls the episodes by their numbers `rows`."""
    logp, _, _ = policy.evaluate(rollout)
    require_finite_logp(logp - rollout.ref_logp, rollout.response_mask, rows)
    return implicit_reward(logp, rollout.ref_logp, rollout.response_mask)
