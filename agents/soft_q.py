"""Soft Q-learning at temperature β: the off-policy way to the optimum of the KL-regularised task.

Haarnoja et al. 2017 (arXiv 1702.08165). With rewards that hold +β log ref (`kl_mode="reference"`), in which no policy
has a part, π* = exp((Q − V)/β) with V = β log Σ exp(Q/β) is the optimum of score − β·KL. The language model is the Q
function, Q(s, a) = V(s) + β log π(a | s): its softmax is the policy, and it starts as the reference. Targets look ahead
by a λ-weighted mixture of path consistencies (Nachum et al. 2017, arXiv 1702.08892), which hold at the optimum whatever
policy wrote the path; λ = 0 is one-step Q-learning.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_env.errors import ConfigError
from rlhf_env.functional import gae, linear_schedule, masked_mean, value_loss
from rlhf_env.models.descent import Descent, mean_metrics, minibatches, require_finite_logp
from rlhf_env.models.scoring import evaluator
from rlhf_env.settings import require
from rlhf_env.types import Decoder, Rollout, Sampler, SamplingLaw


@dataclass(frozen=True)
class SoftQConfig:
    """Settings of soft Q-learning. Its temperature is the environment's β."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the budget
    batch_size: int = 128  #: episodes collected per update
    replay: int = 4  #: batches kept, the newest among them, from which gradient steps draw
    epochs: int = 2  #: passes' worth of gradient steps per update
    minibatches: int = 4  #: gradient steps per pass, each over batch_size / minibatches whole episodes of one batch
    micro_batch_size: int = 0  #: episodes per backward pass; 0: a whole minibatch; the gradient is the same
    lam: float = 0.9  #: λ: 0 learns from the next state's value alone, 1 from the whole rest of the path
    target_rate: float = 0.1  #: how far the target network follows after each gradient step; 1: all the way
    explore: float = 1.0  #: sampling temperature at first, as a multiple of the law's; it falls to 1 over the budget
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), batch_size=(1, None), replay=(1, None), epochs=(1, None))
        require(
            self, minibatches=(1, None), micro_batch_size=(0, None), lam=(0, 1), target_rate=(0, 1), explore=(1, None)
        )


class SoftQ:
    """Off-policy soft Q-learning with a replay memory, where the language model's logits are the Q function."""

    kl_mode: ClassVar[Literal["reference"]] = "reference"

    def __init__(self, policy: Any, config: SoftQConfig = SoftQConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.seed, self.batch_size = policy, config, seed, config.batch_size
        self.target = copy.deepcopy(policy).requires_grad_(False)
        if next(iter(policy.parameters())).dtype in (torch.bfloat16, torch.float16):
            self.target.float()  # or small steps towards the policy would vanish
        self.replay: list[Rollout] = []
        self.progress = 0.0
        self.descent = Descent.of(policy.parameters(), config)

    def rollouts(self, sample: Sampler) -> tuple[Rollout]:
        """Responses of the policy, at a higher temperature while it explores."""
        heat = linear_schedule(self.config.explore, 1.0, self.progress)
        policy: Any = self.policy if heat == 1 else HeatedPolicy(self.policy, heat)
        return (sample(policy),)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """Remember the batch, and take gradient steps on batches drawn from memory."""
        c = self.config
        self.progress = progress
        betas = torch.cat([memory.beta for memory in [*self.replay, rollout.require_finite()]])
        if not (betas > 0).all() or (betas != betas[0]).any():
            raise ConfigError(
                "soft Q-learning needs one β above 0 that stays: it is the temperature of all in its memory"
            )
        draw = np.random.default_rng([self.seed, self.descent.begin(progress)])
        self.replay = [*self.replay, rollout][-c.replay :]
        steps, loss_on = [], cache(self._loss_on)
        for _ in range(c.epochs):
            memory = self.replay[draw.integers(len(self.replay))]
            for rows in minibatches(len(memory), c.minibatches, draw, rollout.score.device):
                weight = memory.response_mask.sum(1)
                steps.append(self.descent.step(loss_on(memory), rows, weight, c.micro_batch_size))
                self._follow()
        return {**mean_metrics(steps), "learning_rate": self.descent.current_rate}

    def _loss_on(self, memory: Rollout) -> Any:
        evaluate = evaluator(self.policy, memory)

        def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            batch = memory[rows]
            mask, beta = batch.response_mask, batch.beta.unsqueeze(1)
            logp, values, entropy = evaluate(rows)
            require_finite_logp(logp, mask, rows)
            with torch.no_grad():
                old_logp, old_values, _ = self.target.evaluate(batch)
                # TD errors r + V(next) − Q, of the target network; GAE of r − β log π is their λ-sum.
                ahead = gae(batch.reward - beta * old_logp, old_values, mask, gamma=1.0, lam=self.config.lam)
                targets = old_values + beta * old_logp + ahead
            q = values + beta * logp
            loss = value_loss(q, targets, mask)
            return loss, {"q_loss": loss, "q": masked_mean(q, mask).detach(), "entropy": masked_mean(entropy, mask)}

        return loss_of

    @torch.no_grad()
    def _follow(self) -> None:
        for slow, fast in zip(self.target.parameters(), self.policy.parameters(), strict=True):
            slow.lerp_(fast.to(slow.dtype), self.config.target_rate)

    def state_dict(self) -> dict[str, Any]:
        """State of the descent, the target network, and the memory."""
        memory = [{"tensors": _tensors(rollout), "law": asdict(rollout.law)} for rollout in self.replay]
        descent, target = self.descent.state_dict(), self.target.state_dict()
        return {"descent": descent, "target": target, "memory": memory, "progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state["descent"])
        self.target.load_state_dict(state["target"])
        self.replay = [
            Rollout(**m["tensors"], law=SamplingLaw(**m["law"])).to(self.target.device) for m in state["memory"]
        ]
        self.progress = state["progress"]


@dataclass(frozen=True)
class HeatedPolicy:
    """A policy that samples at `heat` times the law's temperature, and says so in its log-probabilities."""

    policy: Any
    heat: float

    def decoder(self, num_rows: int, law: SamplingLaw) -> Decoder:
        """A decoder of `num_rows` rows that samples under the hotter law."""
        return self.policy.decoder(num_rows, replace(law, temperature=law.temperature * self.heat))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of copying and pickling, which ask before there is a policy
            raise AttributeError(name)
        return getattr(self.policy, name)  # everything else is the policy's own


def _tensors(rollout: Rollout) -> dict[str, Any]:
    return {field.name: getattr(rollout, field.name) for field in fields(rollout) if field.name != "law"}
