"""KTO, Kahneman–Tversky optimization: a response is good or bad by itself, measured from the policy's own KL.

Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8. Of each pair the preferred response is desirable, the other is not;
ties say neither and are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf_env.agents.dpo import pair_step
from rlhf_env.errors import ConfigError, DataError
from rlhf_env.functional import kto_loss
from rlhf_env.models.descent import Descent, passes
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.settings import require
from rlhf_env.types import Pairs, Policy, Rollout

_SAME = 0.1  # nats per token by which the kernels of half precision may differ, and no two policies


@dataclass(frozen=True)
class KTOConfig:
    """Settings of KTO."""

    learning_rate: float = 1e-6  #: of Adam, at the start; models of a million parameters take 1e-4 and more
    anneal: bool = True  #: lower the learning rate linearly to 0 over the steps
    epochs: int = 1  #: passes over the pairs
    batch_size: int = 64  #: pairs per gradient step: as many desirable responses, and as many undesirable ones
    micro_batch_size: int = 0  #: pairs per backward pass, to save memory; 0: all at once; the gradient is the same
    beta: float = 0.1  #: how soon gains and losses saturate, per nat; the environment's β is another number
    lambda_d: float = 1.0  #: weight of desirable responses (λ_D)
    lambda_u: float = 1.0  #: weight of undesirable responses (λ_U); above λ_D, losses loom larger than gains
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), epochs=(1, None), batch_size=(1, None), micro_batch_size=(0, None))
        require(self, beta=(0, None), lambda_d=(0, None), lambda_u=(0, None))
        if self.beta == 0:
            raise ConfigError("KTO needs beta above 0: at 0 no response gains or loses anything")


class KTO:
    """Makes desirable responses likelier and others less likely, the less the further they are from the KL already."""

    learns_from: ClassVar[Literal["pairs"]] = "pairs"

    def __init__(self, policy: Policy, config: KTOConfig = KTOConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.seed = policy, config, seed
        self.ref_mismatched: Tensor | None = None  # [2, B], the reference's log-probability of each mismatched response
        self.descent = Descent.of(policy.parameters(), config, adam_eps=1e-8)

    def fit(self, pairs: Pairs, *, updates: int | None = None, start: int = 0) -> Iterator[dict[str, float]]:
        """Learn from `pairs` without the ties, yielding metrics at every gradient step.

        `updates` is the number of steps (none: `epochs` passes), `start` that of those taken already. The policy must
        begin as the reference of the pairs: it is asked for the reference's word on the mismatched responses.
        """
        c, untied = self.config, (pairs.preference != 0.5).nonzero().squeeze(1)
        if not len(untied):
            raise DataError("KTO learns nothing from ties, and there is nothing else among these pairs")
        others = mismatched(pairs, getattr(self.policy, "context_length", None))
        if start == 0 or self.ref_mismatched is None:
            _require_reference(self.policy, pairs)
            self.ref_mismatched = _response_logp(self.policy, others)

        def loss(baseline: Tensor, first: Tensor, second: Tensor, batch: Pairs) -> Tensor:
            is_first = batch.preference > 0.5
            of_first = kto_loss(first, is_first, baseline, c.beta, c.lambda_d, c.lambda_u)
            return (of_first + kto_loss(second, ~is_first, baseline, c.beta, c.lambda_d, c.lambda_u)) / 2

        for step, steps, chosen in passes(
            len(untied), c.batch_size, self.seed, epochs=c.epochs, updates=updates, start=start
        ):
            rows = untied[chosen]
            self.descent.begin(step / steps)
            ahead = _response_logp(self.policy, others[rows]) - self.ref_mismatched[:, rows]
            baseline = ahead.mean().clamp(min=0)  # of the batch: z in the paper
            metrics = pair_step(
                self.policy, self.descent, pairs, rows, partial(loss, baseline), c.beta, c.micro_batch_size
            )
            yield {"epoch": (step + 1) / math.ceil(len(untied) / c.batch_size), **metrics, "baseline": float(baseline)}

    def state_dict(self) -> dict[str, Any]:
        """State of the descent, and what the reference said of the mismatched responses."""
        return {"descent": self.descent.state_dict(), "ref_mismatched": self.ref_mismatched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state["descent"])
        self.ref_mismatched = state["ref_mismatched"]


def mismatched(pairs: Pairs, context_length: int | None = None) -> Pairs:
    """Every prompt with the two responses to another prompt, cut off where `context_length` is full.

    Rows in the order of their prompts are shifted by as many as the commonest prompt has: then no response meets its
    own prompt, unless one prompt has more than half of the rows. A response goes to one prompt only.
    """
    _, which, counts = torch.where(pairs.first.prompt_mask, pairs.first.prompt_ids, -1).unique(
        dim=0, return_inverse=True, return_counts=True
    )
    order, shift = which.argsort(stable=True), int(counts.max()) % len(pairs) or 1
    other = torch.empty_like(order)
    other[order] = order.roll(-shift)

    def exchanged(rollout: Rollout) -> Rollout:
        mask = rollout.response_mask[other]
        if context_length is not None:
            room = context_length - rollout.prompt_mask.sum(1, keepdim=True)  # [B, 1]
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) < room)
        return dataclasses.replace(rollout, response_ids=rollout.response_ids[other], response_mask=mask)

    return Pairs(exchanged(pairs.first), exchanged(pairs.second), pairs.preference)


def _response_logp(policy: Policy, pairs: Pairs) -> Tensor:
    """log π of the first and the second responses, [2, B]."""
    return torch.stack([teacher_forced_logp(policy, each, chunk=16).sum(1) for each in (pairs.first, pairs.second)])


def _require_reference(policy: Policy, pairs: Pairs) -> None:
    some = pairs.first[slice(0, 16)]
    off = torch.where(some.response_mask, teacher_forced_logp(policy, some) - some.ref_logp, 0.0).abs().max()
    if off > _SAME:
        raise ConfigError(
            f"KTO takes the policy that it begins with as the reference, but the reference of these pairs is another: "
            f"their log-probabilities differ by up to {off:.2f} nats per token. Begin with the reference's weights"
        )
