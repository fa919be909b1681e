"""Rejection-sampling fine-tuning, or expert iteration: of K responses the best one is imitated, again and again.

Touvron et al. 2023 (Llama 2), arXiv 2307.09288, §3.2.3; Dong et al. 2023 (RAFT), arXiv 2304.06767; expert iteration:
Anthony et al. 2017, arXiv 1705.08439.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_env.functional import masked_mean
from rlhf_env.models.descent import Descent, mean_metrics, minibatches, require_finite_logp
from rlhf_env.models.scoring import evaluator
from rlhf_env.settings import require, require_groups
from rlhf_env.types import Policy, Rollout


@dataclass(frozen=True)
class RejectionSamplingConfig:
    """Settings of rejection-sampling fine-tuning."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 256  #: episodes collected per update
    group_size: int = 8  #: responses to each prompt, K, of which one is imitated
    epochs: int = 1  #: passes over those that were chosen
    minibatches: int = 1  #: gradient steps per pass
    micro_batch_size: int = 0  #: episodes per backward pass; 0: a whole minibatch; the gradient is the same
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), epochs=(1, None), minibatches=(1, None), micro_batch_size=(0, None))
        require_groups(self, self.batch_size, self.group_size)


class RejectionSampling:
    """Imitates the best of K responses to each prompt, by the return: one far from the reference pays for it."""

    def __init__(
        self,
        policy: Policy,
        config: RejectionSamplingConfig = RejectionSamplingConfig(),  # noqa: B008 (frozen)
        *,
        seed: int = 0,
    ) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.batch_size, self.group_size = config.batch_size, config.group_size
        self.descent = Descent.of(policy.parameters(), config)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """Maximise the likelihood of the best response of each group."""
        c = self.config
        shuffle = np.random.default_rng([self.seed, self.descent.begin(progress)])
        best = best_of_groups(rollout.require_finite().returns, c.group_size)
        chosen = rollout[best]
        loss_of = imitation(self.policy, chosen)
        steps = [
            self.descent.step(loss_of, rows, chosen.lengths, c.micro_batch_size)
            for _ in range(c.epochs)
            for rows in minibatches(len(chosen), c.minibatches, shuffle, best.device)
        ]
        return {
            **mean_metrics(steps),
            "chosen_score": float(chosen.score.mean()),
            "chosen_return": float(chosen.returns.mean()),
            "learning_rate": self.descent.current_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)


def best_of_groups(worth: Tensor, group_size: int) -> Tensor:
    """The row of the best of each group, of equals the first: [B] → int64 [B / group_size]."""
    groups = worth.reshape(-1, group_size)
    return groups.argmax(1) + torch.arange(len(groups), device=worth.device) * group_size


def imitation(policy: Policy, episodes: Rollout) -> Any:
    """The loss of making `episodes` likelier, per token, for `Descent.step`."""

    evaluate = evaluator(policy, episodes)

    def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = episodes[rows]
        logp, _, entropy = evaluate(rows)
        require_finite_logp(logp, batch.response_mask, rows)
        loss = -masked_mean(logp, batch.response_mask)
        return loss, {"nll": loss, "entropy": masked_mean(entropy, batch.response_mask)}

    return loss_of
