"""Proximal policy optimization for language models.

Schulman et al. 2017 (arXiv 1707.06347) with the details of Ziegler et al. 2019 (arXiv 1909.08593) that
"The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031) found to matter.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_env.errors import ConfigError
from rlhf_env.functional import (
    clipped_value_loss,
    explained_variance,
    gae,
    linear_schedule,
    masked_mean,
    ppo_clip_loss,
    ratio_metrics,
    whiten,
)
from rlhf_env.models.descent import Descent, mean_metrics, minibatches, require_finite_logp
from rlhf_env.models.scoring import evaluator
from rlhf_env.models.sft import demonstration_loss, read_demonstrations
from rlhf_env.settings import require
from rlhf_env.types import Policy, Rollout

_PTX_STREAM = 5  # keeps the random numbers that choose demonstrations apart from those that shuffle episodes


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO. The KL coefficient is the environment's (`beta`), since it defines the task."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 128  #: episodes collected per update
    epochs: int = 4  #: passes over each batch; more reuse samples further from the policy they came from
    minibatches: int = 4  #: gradient steps per pass, each over batch_size / minibatches whole episodes
    micro_batch_size: int = 0  #: episodes per backward pass; 0: a minibatch; the gradient is the same (ptx: nearly)
    clip: float = 0.2  #: ε of the surrogate: how far a probability ratio may move before its gradient stops
    value_network: Literal["shared", "separate"] = "shared"  #: the policy's own head, or a copy of the whole model
    value_clip: float = 0.2  #: ε for values, in units of return: how far one may move before its gradient stops
    value_coef: float = 0.1  #: weight of the value loss
    critic_warmup: int = 0  #: first updates in which only values are learned; a shared body then learns them too
    entropy_coef: float = 0.0  #: weight of an entropy bonus in the loss; unlike the KL term it changes the optimum
    final_entropy_coef: float | None = None  #: its weight at the end of the budget, in a straight line; none: it stays
    gamma: float = 1.0  #: discount; below 1, late tokens (and the score) count less
    reward_scale: Literal["none", "batch", "running"] = "none"  #: by whose root mean square rewards are divided
    lam: float = 0.95  #: λ of GAE: 1 trusts returns (variance), 0 trusts values (bias)
    max_update_kl: float | None = None  #: an update stops once it has moved further, nats per token; none: never
    ptx: str | None = None  #: file of demonstrations whose likelihood is kept up (PPO-ptx); none: none
    ptx_coef: float = 1.0  #: weight of their negative log-likelihood, in nats per token
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm
    adam_eps: float = 1e-5  #: keeps the first steps small where gradients are tiny

    def __post_init__(self) -> None:
        if self.batch_size < self.minibatches or self.minibatches < 1 or self.epochs < 1:
            raise ConfigError("PPO needs epochs ≥ 1 and at least one episode per minibatch (batch_size ≥ minibatches)")
        if self.learning_rate < 0 or self.clip <= 0 or not 0 <= self.lam <= 1 or not 0 < self.gamma <= 1:
            raise ConfigError("PPO needs learning_rate ≥ 0, clip > 0, 0 ≤ lam ≤ 1 and 0 < gamma ≤ 1")
        require(self, learning_rate=(0, None), value_clip=(0, None), value_coef=(0, None), max_update_kl=(0, None))
        require(self, entropy_coef=(0, None), final_entropy_coef=(0, None), critic_warmup=(0, None))
        require(self, micro_batch_size=(0, None), ptx_coef=(0, None))


class PPO:
    """Clipped policy gradient with a learned value function."""

    def __init__(self, policy: Policy, config: PPOConfig = PPOConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.seed = policy, config, seed
        self.batch_size = config.batch_size
        self.critic = copy.deepcopy(policy) if config.value_network == "separate" else policy
        self.ptx = [] if config.ptx is None else read_demonstrations(config.ptx, policy)  # type: ignore[arg-type]
        trained = [*policy.parameters(), *(self.critic.parameters() if self.critic is not policy else [])]
        self.descent = Descent.of(trained, config, adam_eps=config.adam_eps)
        self.rewards_so_far = (0.0, 0)  # sum of their squares and their number, where they are scaled

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """Improve the policy on its own episodes; returns metrics averaged over gradient steps."""
        c = self.config
        if self.critic is not self.policy:
            rollout = replace(rollout, values=critic_values(self.critic, rollout))
        mask = rollout.require_finite().response_mask
        number = self.descent.begin(progress)
        shuffle = np.random.default_rng([self.seed, number])
        advantages = gae(self._scaled(rollout.reward, mask), rollout.values, mask, c.gamma, c.lam)
        returns = advantages + rollout.values
        advantages = whiten(advantages, mask)
        entropy_coef = linear_schedule(c.entropy_coef, c.final_entropy_coef, progress)
        warming_up = number < c.critic_warmup
        # Each episode brings a demonstration along.
        drawn = np.random.default_rng([self.seed, number, _PTX_STREAM]).integers(max(len(self.ptx), 1), size=len(mask))
        evaluate = evaluator(self.policy, rollout)
        criticize = evaluate if self.critic is self.policy else evaluator(self.critic, rollout)

        def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            batch, m = rollout[rows], mask[rows]
            logp, values, entropy = evaluate(rows)
            require_finite_logp(logp, m, rows)
            if self.critic is not self.policy:
                values = criticize(rows)[1]
            policy_loss = ppo_clip_loss(logp, batch.logp, advantages[rows], m, c.clip)
            value_loss = clipped_value_loss(values, batch.values, returns[rows], m, c.value_clip)
            entropy_mean = masked_mean(entropy, m)
            loss = c.value_coef * value_loss
            if not warming_up:
                loss = loss + policy_loss - entropy_coef * entropy_mean
            metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy_mean}
            if self.ptx and not warming_up:
                metrics["ptx_loss"] = ptx_loss = demonstration_loss(self.policy, [self.ptx[drawn[i]] for i in rows])  # type: ignore[arg-type]
                loss = loss + c.ptx_coef * ptx_loss
            return loss, metrics | ratio_metrics(logp, batch.logp, m, c.clip)

        steps: list[dict[str, float]] = []
        for _ in range(c.epochs):
            for rows in minibatches(len(rollout), c.minibatches, shuffle, mask.device):
                steps.append(self.descent.step(loss_of, rows, mask.sum(1), c.micro_batch_size))
            if c.max_update_kl is not None and steps[-1]["approx_kl"] > c.max_update_kl:
                break
        return {
            **mean_metrics(steps),
            "first_ratio_error": steps[0]["max_ratio_error"],  # before any step: 0 but for the sampler's other kernels
            "gradient_steps": len(steps),
            "explained_variance": float(explained_variance(rollout.values, returns, mask)),
            "entropy_coef": entropy_coef,
            "learning_rate": self.descent.current_rate,
        }

    def _scaled(self, reward: Tensor, mask: Tensor) -> Tensor:
        """Rewards [B, T], score and KL alike, divided by the root mean square of this batch's or of all so far."""
        if self.config.reward_scale == "none":
            return reward
        squares, count = self.rewards_so_far if self.config.reward_scale == "running" else (0.0, 0)
        seen = reward[mask].double()
        self.rewards_so_far = squares, count = squares + float(seen.square().sum()), count + len(seen)
        return reward / math.sqrt(squares / count) if squares else reward

    def state_dict(self) -> dict[str, Any]:
        """State of the descent, the size of the rewards so far, and the weights of a value network of its own."""
        separate: Any = None if self.critic is self.policy else self.critic
        critic = None if separate is None else separate.state_dict()
        return {"descent": self.descent.state_dict(), "rewards_so_far": list(self.rewards_so_far), "critic": critic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state["descent"])
        squares, count = state["rewards_so_far"]
        self.rewards_so_far = (squares, count)
        if state["critic"] is not None:
            self.critic.load_state_dict(state["critic"])  # type: ignore[attr-defined]


@torch.no_grad()
def critic_values(critic: Policy, rollout: Rollout, chunk: int = 64) -> Tensor:
    """Values [B, T] of a network that did not sample the rollout; 0 in the padding."""
    parts = [critic.evaluate(rollout[i : i + chunk])[1] for i in range(0, len(rollout), chunk)]
    return torch.where(rollout.response_mask, torch.cat(parts), 0.0)
