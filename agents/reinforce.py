"""REINFORCE with a baseline: each token is reinforced by what came after it, compared with the rest of the batch.

Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", eq. 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_env.functional import gae, leave_one_out, linear_schedule, masked_mean, policy_gradient_loss
from rlhf_env.models.descent import Descent, require_finite_logp
from rlhf_env.settings import require
from rlhf_env.types import Policy, Rollout


@dataclass(frozen=True)
class ReinforceConfig:
    """Settings of REINFORCE."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 64  #: episodes collected per update, which is one gradient step
    micro_batch_size: int = 0  #: episodes per backward pass; 0: all at once; the gradient is the same
    entropy_coef: float = 0.0  #: weight of an entropy bonus in the loss; unlike the KL term it changes the optimum
    final_entropy_coef: float | None = None  #: its weight at the end of the budget, in a straight line; none: it stays
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), batch_size=(2, None), micro_batch_size=(0, None))
        require(self, entropy_coef=(0, None), final_entropy_coef=(0, None))


class Reinforce:
    """The plain policy gradient: reward to go, less the mean return of the other episodes of the batch."""

    def __init__(
        self,
        policy: Policy,
        config: ReinforceConfig = ReinforceConfig(),  # noqa: B008 (frozen)
        *,
        seed: int = 0,
    ) -> None:
        self.policy, self.config, self.batch_size = policy, config, config.batch_size
        self.descent = Descent.of(policy.parameters(), config)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """One gradient step on the batch."""
        c, mask = self.config, rollout.require_finite().response_mask
        self.descent.begin(progress)
        to_go = gae(rollout.reward, torch.zeros_like(rollout.reward), mask, gamma=1.0, lam=1.0)  # [B, T]
        baseline = leave_one_out(to_go[:, 0], group_size=len(rollout))  # [B], of no episode's own return
        entropy_coef = linear_schedule(c.entropy_coef, c.final_entropy_coef, progress)
        return reinforce(
            self.policy, self.descent, rollout, to_go - baseline.unsqueeze(1), entropy_coef, c.micro_batch_size
        )

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)


def reinforce(
    policy: Policy,
    descent: Descent,
    rollout: Rollout,
    advantages: Tensor,
    entropy_coef: float = 0.0,
    micro_batch_size: int = 0,
) -> dict[str, float]:
    """One gradient step that makes tokens likelier by their `advantages` [B, T]; returns its metrics."""
    mask = rollout.response_mask

    def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        m = mask[rows]
        logp, _, entropy = policy.evaluate(rollout[rows])
        require_finite_logp(logp, m, rows)
        policy_loss, entropy_mean = policy_gradient_loss(logp, advantages[rows], m), masked_mean(entropy, m)
        return policy_loss - entropy_coef * entropy_mean, {"policy_loss": policy_loss, "entropy": entropy_mean}

    rows = torch.arange(len(rollout), device=mask.device)
    metrics = descent.step(loss_of, rows, mask.sum(1), micro_batch_size)
    return {**metrics, "learning_rate": descent.current_rate}
