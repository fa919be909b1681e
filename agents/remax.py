"""ReMax: the policy's own greedy response to a prompt is the baseline of the sampled one.

Li et al. 2023 (arXiv 2310.10505), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_env.agents.reinforce import reinforce
from rlhf_env.models.descent import Descent
from rlhf_env.settings import require
from rlhf_env.types import Policy, Rollout, Sampler


@dataclass(frozen=True)
class ReMaxConfig:
    """Settings of ReMax."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 64  #: episodes sampled per update, which is one gradient step; as many greedy ones come with them
    micro_batch_size: int = 0  #: episodes per backward pass; 0: all at once; the gradient is the same
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), batch_size=(1, None), micro_batch_size=(0, None))


class ReMax:
    """Policy gradient whose baseline is the return of the policy's greedy response to the same prompt."""

    def __init__(self, policy: Policy, config: ReMaxConfig = ReMaxConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.batch_size = policy, config, config.batch_size
        self.descent = Descent.of(policy.parameters(), config)

    def rollouts(self, sample: Sampler) -> tuple[Rollout, Rollout]:
        """Sampled responses, and the greedy one to each of their prompts."""
        return sample(self.policy), sample(self.policy, greedy=True)

    def update(self, rollout: Rollout, greedy: Rollout, progress: float = 0.0) -> dict[str, float]:
        """One gradient step on the batch."""
        self.descent.begin(progress)
        baseline = greedy.require_finite().returns  # [B]; it does not depend on what was sampled, so it biases nothing
        advantages = rollout.require_finite().returns - baseline
        every_token = advantages.unsqueeze(1).expand_as(rollout.reward)
        metrics = reinforce(
            self.policy, self.descent, rollout, every_token, micro_batch_size=self.config.micro_batch_size
        )
        return {**metrics, "greedy_score": float(greedy.score.mean())}

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)
