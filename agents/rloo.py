"""RLOO, REINFORCE leave-one-out: several responses to each prompt are each other's baseline.

Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024 (arXiv 2402.14740), §2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_env.agents.reinforce import reinforce
from rlhf_env.functional import leave_one_out
from rlhf_env.models.descent import Descent
from rlhf_env.settings import require, require_groups
from rlhf_env.types import Policy, Rollout


@dataclass(frozen=True)
class RLOOConfig:
    """Settings of RLOO."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 64  #: episodes collected per update, which is one gradient step
    group_size: int = 4  #: responses to each prompt, K; batch_size / K prompts are answered
    micro_batch_size: int = 0  #: episodes per backward pass; 0: all at once; the gradient is the same
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), micro_batch_size=(0, None))
        require_groups(self, self.batch_size, self.group_size)


class RLOO:
    """Policy gradient whose baseline is the mean return of the other responses to the same prompt."""

    def __init__(self, policy: Policy, config: RLOOConfig = RLOOConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config = policy, config
        self.batch_size, self.group_size = config.batch_size, config.group_size
        self.descent = Descent.of(policy.parameters(), config)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """One gradient step on the batch."""
        self.descent.begin(progress)
        returns = rollout.require_finite().returns  # [B], score − penalties − β·KL: the whole response is one action
        advantages = returns - leave_one_out(returns, self.group_size)
        every_token = advantages.unsqueeze(1).expand_as(rollout.reward)
        return reinforce(self.policy, self.descent, rollout, every_token, micro_batch_size=self.config.micro_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)
