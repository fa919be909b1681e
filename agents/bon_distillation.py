"""BOND, best-of-n distillation: a policy that answers once as the best of n of the reference's responses would be.

Sessa et al. 2024 (arXiv 2407.14622): the Jeffreys divergence to the distribution of best-of-n. It is n ref(y) F(y)ⁿ⁻¹
where no two responses score alike; F(y) is the share of the reference's responses that score no higher than y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf_env.agents.rejection_sampling import best_of_groups
from rlhf_env.errors import ConfigError
from rlhf_env.functional import leave_one_out, log_win_share, masked_mean, masked_sum
from rlhf_env.models.descent import Descent, require_finite_logp
from rlhf_env.settings import require, require_groups
from rlhf_env.types import Policy, Rollout, Sampler


@dataclass(frozen=True)
class BonDistillationConfig:
    """Settings of best-of-n distillation. The environment's β is not used: n decides how far the policy goes."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    n: int = 16  #: the policy learns to be the best of this many
    draws: int = 16  #: responses of the reference to each prompt, a multiple of n; of each n the best is imitated
    batch_size: int = 64  #: episodes of the policy per update, which is one gradient step
    group_size: int = 4  #: episodes of the policy for each prompt, which are each other's baseline
    forward_weight: float = 0.5  #: share of KL(best-of-n ‖ policy), which imitates; the rest is KL(policy ‖ best-of-n)
    micro_batch_size: int = 0  #: prompts per backward pass; 0: all at once; the gradient is the same
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), n=(2, None), forward_weight=(0, 1), micro_batch_size=(0, None))
        require_groups(self, self.batch_size, self.group_size)
        if self.draws < self.n or self.draws % self.n:
            raise ConfigError(f"draws must be a multiple of n={self.n}, it is {self.draws}")


class BonDistillation:
    """Learns the distribution of the best of n: imitates the reference's best, and climbs the log of its rank."""

    kl_mode: ClassVar[Literal["reward"]] = "reward"  # it reads ref_logp, which "off" would not have

    def __init__(
        self,
        policy: Policy,
        config: BonDistillationConfig = BonDistillationConfig(),  # noqa: B008 (frozen)
        *,
        seed: int = 0,
    ) -> None:
        self.policy, self.config = policy, config
        self.batch_size, self.group_size = config.batch_size, config.group_size
        self.descent = Descent.of(policy.parameters(), config)

    def rollouts(self, sample: Sampler) -> tuple[Rollout, Rollout]:
        """The policy's responses, and many of the reference to the same prompts."""
        return sample(self.policy), sample("reference", group_size=self.config.draws)

    def update(self, rollout: Rollout, reference: Rollout, progress: float = 0.0) -> dict[str, float]:
        """One gradient step on the Jeffreys divergence to best-of-n."""
        c = self.config
        self.descent.begin(progress)
        worth, theirs = (r.require_finite().score - r.penalty for r in (rollout, reference))
        best = reference[best_of_groups(theirs, c.n)]
        share = log_win_share(worth.reshape(-1, c.group_size), theirs.reshape(-1, c.draws)).reshape(-1)  # log F
        returns = (c.n - 1) * share - rollout.kl  # E[returns] + log n = −KL(policy ‖ best-of-n)
        advantages = returns - leave_one_out(returns, c.group_size)
        longest = rollout.response_mask.shape[1]

        def loss_of(prompts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mine, imitated = (_members(prompts, len(r) * c.group_size // len(rollout)) for r in (rollout, best))
            own, good = rollout[mine], best[imitated]
            (logp, _, entropy), (good_logp, _, _) = self.policy.evaluate(own), self.policy.evaluate(good)
            require_finite_logp(logp, own.response_mask, mine)
            backward = -(advantages[mine] * masked_sum(logp, own.response_mask, 1)).mean()
            forward = -masked_sum(good_logp, good.response_mask, 1).mean()
            loss = ((1 - c.forward_weight) * backward + c.forward_weight * forward) / longest
            return loss, {"imitation_nll": forward, "entropy": masked_mean(entropy, own.response_mask)}

        prompts = torch.arange(len(rollout) // c.group_size, device=worth.device)
        return {
            **self.descent.step(loss_of, prompts, micro_batch_size=c.micro_batch_size),
            "win_share": float(share.exp().mean()),
            "best_score": float(best.score.mean()),
            "learning_rate": self.descent.current_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)


def _members(prompts: Tensor, size: int) -> Tensor:
    """The rows of groups of `size`, by the numbers of their prompts: [P] → [P · size]."""
    return (prompts.unsqueeze(1) * size + torch.arange(size, device=prompts.device)).reshape(-1)
