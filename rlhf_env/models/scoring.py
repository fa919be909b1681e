"""Whole responses in one teacher-forced pass, or in the passes of an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_env.functional import kl_full, masked_sum
from rlhf_env.types import Policy, Rollout


def evaluator(policy: Policy, rollout: Rollout) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`policy.evaluate(rollout[rows])` as a function of `rows` [M], for an update that reads each episode many times.

    What frozen layers say of the episodes is made once, here, and kept: B · L · D numbers, of L the longest episode's
    tokens and D the model's width. The results differ by rounding, and not at all where nothing is frozen. A policy
    without `begin(rollout)` reads everything every time.
    """
    begin: Any = getattr(policy, "begin", None)
    begun = None if begin is None else begin(rollout)
    if begun is None:
        return lambda rows: policy.evaluate(rollout[rows])
    return lambda rows: policy.evaluate(rollout[rows], begun[rows])  # type: ignore[call-arg]


@torch.no_grad()
def teacher_forced_logp(policy: Policy, rollout: Rollout, chunk: int = 64) -> Tensor:
    """Log-probabilities [B, T] of a rollout's tokens under any policy, `chunk` episodes at a time; 0 in the padding."""
    there = rollout.to(getattr(policy, "device", rollout.logp.device))
    parts = [policy.evaluate(there[i : i + chunk])[0] for i in range(0, len(rollout), chunk)]
    return torch.where(rollout.response_mask, torch.cat(parts).to(rollout.logp.device), 0.0)


@torch.no_grad()
def full_kl(policy: Any, reference: Any, rollout: Rollout, chunk: int = 16) -> Tensor:
    """The KL of the next token's distribution to the reference's, summed over the states of each response, [B] in nats.

    Its mean over the policy's own responses is the KL per sequence, like that of Σ_t (logp_t − ref_logp_t), with the
    noise of the sampled token taken out. Both need `response_log_probs`.
    """
    parts = []
    for i in range(0, len(rollout), chunk):
        own, theirs = (
            model.response_log_probs(rollout[i : i + chunk].to(getattr(model, "device", rollout.logp.device)))[0]
            for model in (policy, reference)
        )
        mask = rollout.response_mask[i : i + chunk].to(own.device)
        parts.append(masked_sum(kl_full(own, theirs.to(own)), mask, dim=1).to(rollout.logp.device))
    return torch.cat(parts)
