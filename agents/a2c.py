"""Advantage actor-critic: one gradient step on each batch, with a learned value function as the baseline.

The synchronous form of Mnih et al. 2016 (arXiv 1602.01783), with GAE (Schulman et al. 2016, arXiv 1506.02438).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_env.functional import (
    explained_variance,
    gae,
    linear_schedule,
    masked_mean,
    policy_gradient_loss,
    value_loss,
)
from rlhf_env.models.descent import Descent, require_finite_logp
from rlhf_env.settings import require
from rlhf_env.types import Policy, Rollout


@dataclass(frozen=True)
class A2CConfig:
    """Settings of A2C."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 64  #: episodes collected per update, which is one gradient step
    micro_batch_size: int = 0  #: episodes per backward pass; 0: all at once; the gradient is the same
    value_coef: float = 0.1  #: weight of the value loss
    entropy_coef: float = 0.0  #: weight of an entropy bonus in the loss; unlike the KL term it changes the optimum
    final_entropy_coef: float | None = None  #: its weight at the end of the budget, in a straight line; none: it stays
    gamma: float = 1.0  #: discount; below 1, late tokens (and the score) count less
    lam: float = 1.0  #: λ of GAE: 1 trusts returns (variance), 0 trusts values (bias)
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), batch_size=(1, None), micro_batch_size=(0, None), lam=(0, 1))
        require(self, gamma=(0, 1), value_coef=(0, None), entropy_coef=(0, None), final_entropy_coef=(0, None))


class A2C:
    """Policy gradient with a learned value function, one step per batch: PPO without its surrogate."""

    def __init__(self, policy: Policy, config: A2CConfig = A2CConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.batch_size = policy, config, config.batch_size
        self.descent = Descent.of(policy.parameters(), config)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """One gradient step on the batch."""
        c, mask = self.config, rollout.require_finite().response_mask
        self.descent.begin(progress)
        advantages = gae(rollout.reward, rollout.values, mask, c.gamma, c.lam)
        returns = advantages + rollout.values
        entropy_coef = linear_schedule(c.entropy_coef, c.final_entropy_coef, progress)

        def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            m = mask[rows]
            logp, values, entropy = self.policy.evaluate(rollout[rows])
            require_finite_logp(logp, m, rows)
            policy_loss = policy_gradient_loss(logp, advantages[rows], m)
            critic_loss = value_loss(values, returns[rows], m)
            entropy_mean = masked_mean(entropy, m)
            metrics = {"policy_loss": policy_loss, "value_loss": critic_loss, "entropy": entropy_mean}
            return policy_loss + c.value_coef * critic_loss - entropy_coef * entropy_mean, metrics

        rows = torch.arange(len(rollout), device=mask.device)
        return {
            **self.descent.step(loss_of, rows, mask.sum(1), c.micro_batch_size),
            "explained_variance": float(explained_variance(rollout.values, returns, mask)),
            "learning_rate": self.descent.current_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)
