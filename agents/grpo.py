"""GRPO, group relative policy optimization, and its length-unbiased form.

Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, eq. 3; Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783, §3.
As published: `kl="k3"`, `scale=True`, `average="response"`. Dr. GRPO: `scale=False`, `average="constant"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_env.functional import (
    group_advantages,
    kl_k2,
    kl_k3,
    masked_mean,
    masked_sum,
    ppo_clip_terms,
    ratio_metrics,
    response_mean,
)
from rlhf_env.models.descent import Descent, mean_metrics, minibatches, require_finite_logp
from rlhf_env.models.scoring import evaluator
from rlhf_env.settings import require, require_groups
from rlhf_env.types import Policy, Rollout


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of GRPO. The KL coefficient is the environment's (`beta`), wherever the KL is charged."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 128  #: episodes collected per update
    group_size: int = 8  #: responses to each prompt, K; batch_size / K prompts are answered
    epochs: int = 1  #: passes over each batch
    minibatches: int = 2  #: gradient steps per pass
    micro_batch_size: int = 0  #: episodes per backward pass; 0: a whole minibatch; the gradient is the same
    clip: float = 0.2  #: ε of the surrogate
    kl: Literal["reward", "k2", "k3"] = "reward"  #: where β·KL goes: the reward (exact), or a loss (k3: as published)
    scale: bool = True  #: divide by the deviation within the group, as published; it moves the optimum between prompts
    average: Literal["response", "constant"] = "response"  #: weigh tokens by 1/length, as published, or all alike
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), epochs=(1, None), minibatches=(1, None), micro_batch_size=(0, None))
        require(self, clip=(0, None))
        require_groups(self, self.batch_size, self.group_size)


class GRPO:
    """Clipped policy gradient without a value function: a response is compared with the others to its prompt."""

    def __init__(self, policy: Policy, config: GRPOConfig = GRPOConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.seed = policy, config, seed
        self.batch_size, self.group_size = config.batch_size, config.group_size
        if config.kl != "reward":
            self.kl_mode = "reward"  # the loss reads ref_logp, which "off" would not have
        self.descent = Descent.of(policy.parameters(), config)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """Improve the policy on its own groups of responses; returns metrics averaged over gradient steps."""
        c, mask = self.config, rollout.require_finite().response_mask
        shuffle = np.random.default_rng([self.seed, self.descent.begin(progress)])
        worth = rollout.returns if c.kl == "reward" else rollout.score - rollout.penalty  # [B]
        advantages = group_advantages(worth, c.group_size, scale=c.scale)
        longest, evaluate = mask.shape[1], evaluator(self.policy, rollout)

        def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            batch, m = rollout[rows], mask[rows]
            logp, _, entropy = evaluate(rows)
            require_finite_logp(logp, m, rows)
            terms = ppo_clip_terms(logp, batch.logp, advantages[rows].unsqueeze(1), m, c.clip)  # [B, T]
            estimate = (kl_k2 if c.kl == "k2" else kl_k3)(*(torch.where(m, x, 0.0) for x in (logp, batch.ref_logp)))
            if c.kl != "reward":
                terms = terms - batch.beta.unsqueeze(1) * estimate
            loss = -response_mean(terms, m) if c.average == "response" else -masked_sum(terms, m, 1).mean() / longest
            metrics = {"policy_loss": loss, "entropy": masked_mean(entropy, m), "kl_loss": masked_mean(estimate, m)}
            return loss, metrics | ratio_metrics(logp, batch.logp, m, c.clip)

        steps = [
            self.descent.step(loss_of, rows, micro_batch_size=c.micro_batch_size)
            for _ in range(c.epochs)
            for rows in minibatches(len(rollout), c.minibatches, shuffle, mask.device)
        ]
        return {
            **mean_metrics(steps),
            "first_ratio_error": steps[0]["max_ratio_error"],
            "group_deviation": float(worth.reshape(-1, c.group_size).std(1).mean()),
            "learning_rate": self.descent.current_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the descent."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state)
