"""Proximal policy optimization for language models.

Schulman et al. 2017 (arXiv 1707.06347) with the details of Ziegler et al. 2019 (arXiv 1909.08593) that
"The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031) found to matter.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.functional import (
    clipped_value_loss,
    explained_variance,
    gae,
    kl_k3,
    masked_mean,
    ppo_clip_loss,
    whiten,
)
from rlhf_env.types import Policy, Rollout


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO. The KL coefficient is the environment's (`beta`), since it defines the task."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 128  #: episodes collected per update
    epochs: int = 4  #: passes over each batch; more reuse samples further from the policy they came from
    minibatches: int = 4  #: gradient steps per pass, each over batch_size / minibatches whole episodes
    clip: float = 0.2  #: ε of the surrogate: how far a probability ratio may move before its gradient stops
    value_clip: float = 0.2  #: the same for values, in units of return
    value_coef: float = 0.1  #: weight of the value loss
    entropy_coef: float = 0.0  #: weight of an entropy bonus in the loss; unlike the KL term it changes the optimum
    gamma: float = 1.0  #: discount; below 1, late tokens (and the score) count less
    lam: float = 0.95  #: λ of GAE: 1 trusts returns (variance), 0 trusts values (bias)
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm
    adam_eps: float = 1e-5  #: keeps the first steps small where gradients are tiny

    def __post_init__(self) -> None:
        if self.batch_size < self.minibatches or self.minibatches < 1 or self.epochs < 1:
            raise ConfigError("PPO needs epochs ≥ 1 and at least one episode per minibatch (batch_size ≥ minibatches)")
        if self.learning_rate < 0 or self.clip <= 0 or not 0 <= self.lam <= 1 or not 0 < self.gamma <= 1:
            raise ConfigError("PPO needs learning_rate ≥ 0, clip > 0, 0 ≤ lam ≤ 1 and 0 < gamma ≤ 1")


class PPO:
    """Clipped policy gradient with a learned value function."""

    def __init__(self, policy: Policy, config: PPOConfig = PPOConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.seed = policy, config, seed
        self.batch_size, self.updates = config.batch_size, 0
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate, eps=config.adam_eps)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """Improve the policy on its own episodes; returns metrics averaged over gradient steps."""
        c, mask = self.config, rollout.require_finite().response_mask
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * (1 - progress if c.anneal else 1)
        advantages = gae(rollout.reward, rollout.values, mask, c.gamma, c.lam)
        returns = advantages + rollout.values
        advantages = whiten(advantages, mask)

        metrics: defaultdict[str, list[float]] = defaultdict(list)
        shuffle = np.random.default_rng([self.seed, self.updates])
        for _ in range(c.epochs):
            for rows in np.array_split(shuffle.permutation(len(rollout)), min(c.minibatches, len(rollout))):
                rows = torch.from_numpy(rows).to(mask.device)
                batch, m = rollout[rows], mask[rows]
                logp, values, entropy = self.policy.evaluate(batch)
                policy_loss = ppo_clip_loss(logp, batch.logp, advantages[rows], m, c.clip)
                value_loss = clipped_value_loss(values, batch.values, returns[rows], m, c.value_clip)
                entropy_mean = masked_mean(entropy, m)
                loss = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy_mean
                gradient_norm = self._step(loss, rows, logp, m)
                with torch.no_grad():
                    ratio = torch.where(m, logp - batch.logp, 0.0).exp()
                    for name, value in {
                        "policy_loss": policy_loss,
                        "value_loss": value_loss,
                        "entropy": entropy_mean,
                        "approx_kl": masked_mean(kl_k3(batch.logp, logp), m),
                        "clip_fraction": masked_mean(((ratio - 1).abs() > c.clip).float(), m),
                        "max_ratio": ratio.max(),
                        "ratio_error": (ratio - 1).abs().max(),
                        "gradient_norm": gradient_norm,
                    }.items():
                        metrics[name].append(value.item())
        self.updates += 1
        first_ratio_error = metrics.pop("ratio_error")[0]  # before any step: 0 but for the sampler's other kernels
        return {
            **{name: float(np.mean(values)) for name, values in metrics.items()},
            "max_ratio": max(metrics["max_ratio"]),
            "first_ratio_error": first_ratio_error,
            "explained_variance": float(explained_variance(rollout.values, returns, mask)),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def _step(self, loss: torch.Tensor, rows: torch.Tensor, logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One step of Adam, refused where loss or gradient is not finite: no weight is touched then."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            broken = rows[(~torch.isfinite(logp) & mask).any(1)].tolist()
            where = (
                f"the log-probabilities of episode {broken[0]} of the batch" if broken else "the loss or its gradient"
            )
            raise NonFiniteError(f"{where} became non-finite in update {self.updates}; the step was not taken")
        self.optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state and update counter."""
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
