"""Log-probabilities of whole responses in one teacher-forced pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_env.functional import kl_full, masked_sum
from rlhf_env.types import Policy, Rollout


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
