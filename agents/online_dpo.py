"""Online DPO: two of the policy's own responses to each prompt are compared by their scores, and DPO learns from that.

Guo et al. 2024 (OAIF), arXiv 2402.04792, with the reward model as the annotator; the loss is that of Rafailov et al.
2023 (arXiv 2305.18290), eq. 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_env.agents.dpo import pair_step
from rlhf_env.errors import ConfigError
from rlhf_env.functional import dpo_loss
from rlhf_env.models.descent import Descent, mean_metrics, minibatches
from rlhf_env.settings import require, require_groups
from rlhf_env.types import Pairs, Policy, Rollout


@dataclass(frozen=True)
class OnlineDPOConfig:
    """Settings of online DPO. β is the environment's (`beta`), since it defines the task."""

    learning_rate: float = 1e-6  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 128  #: episodes collected per update
    group_size: int = 2  #: responses to each prompt, K, of which the best and the worst are compared
    label_temperature: float = 1.0  #: units of score per unit of log-odds of the label; 0: the better one always wins
    epochs: int = 1  #: passes over each batch
    minibatches: int = 1  #: gradient steps per pass
    micro_batch_size: int = 0  #: pairs per backward pass, to save memory; 0: all at once; the gradient is the same
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), epochs=(1, None), minibatches=(1, None), micro_batch_size=(0, None))
        require(self, label_temperature=(0, None))
        require_groups(self, self.batch_size, self.group_size)


class OnlineDPO:
    """DPO on the policy's own responses: the better of two is preferred as often as their scores say."""

    kl_mode = "reward"  # not that it reads the rewards, but with "off" there would be no reference in the rollout

    def __init__(
        self,
        policy: Policy,
        config: OnlineDPOConfig = OnlineDPOConfig(),  # noqa: B008 (frozen)
        *,
        seed: int = 0,
    ) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.batch_size, self.group_size = config.batch_size, config.group_size
        self.descent = Descent.of(policy.parameters(), config, adam_eps=1e-8)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """Learn from the best and the worst response of each group; returns metrics averaged over gradient steps."""
        c, beta = self.config, rollout.require_finite().beta
        if not (beta > 0).all():
            raise ConfigError(
                "online DPO needs the environment's beta above 0: the optimum that it seeks is ∝ ref exp(r/β)"
            )
        shuffle = np.random.default_rng([self.seed, self.descent.begin(progress)])
        worth = rollout.score - rollout.penalty  # [B]
        worst, best = extremes_of_groups(worth, c.group_size)
        pairs = Pairs(rollout[best], rollout[worst], label(worth[best] - worth[worst], c.label_temperature))

        def loss(first: Tensor, second: Tensor, batch: Pairs) -> Tensor:
            return dpo_loss(first - second, batch.preference, batch.first.beta)

        steps = [
            pair_step(self.policy, self.descent, pairs, rows, loss, float(beta.mean()), c.micro_batch_size)
            for _ in range(c.epochs)
            for rows in minibatches(len(pairs), c.minibatches, shuffle, beta.device)
        ]
        return {
            **mean_metrics(steps),
            "gradient_steps": len(steps),
            "identical": float(same_response(pairs).float().mean()),
            "score_gap": float((worth[best] - worth[worst]).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)


def extremes_of_groups(worth: Tensor, group_size: int) -> Tensor:
    """The rows of the worst and of the best of each group, two rows even where all are equal: [B] → int64 [2, G]."""
    order = worth.reshape(-1, group_size).argsort(dim=1, stable=True)
    return (order[:, [0, -1]] + torch.arange(len(order), device=worth.device).unsqueeze(1) * group_size).T


def label(lead: Tensor, temperature: float) -> Tensor:
    """The probability that the first of two is preferred, whose score is higher by `lead`: [G] → [G] in [0, 1]."""
    return torch.sigmoid(lead / temperature) if temperature else torch.heaviside(lead, torch.full_like(lead, 0.5))


def same_response(pairs: Pairs) -> Tensor:
    """Whether the two responses of each pair are the same tokens, bool [G]."""
    first, second = (torch.where(each.response_mask, each.response_ids, -1) for each in (pairs.first, pairs.second))
    return (first == second).all(1)
