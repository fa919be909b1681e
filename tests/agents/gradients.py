"""What an agent's update is on average, by listing everything that it might have been given; no sampling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlhf_env.functional import gather_logp, token_rewards
from rlhf_env.types import Rollout
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.agents.pairs import listed

STILL: dict[str, Any] = {"learning_rate": 0.0, "max_grad_norm": math.inf}  # gradients to read, weights that stay


def moved(world: EnumerableWorld, seed: int = 0) -> Any:
    """A policy away from the reference, where the KL term's gradient would vanish."""
    policy = world.policy()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
    return policy


def every_response(world: EnumerableWorld, policy: Any, *, kl_mode: str = "reward") -> tuple[Rollout, Tensor]:
    """Every response of the world once, as `collect` gives it for this policy, and its probability [N]."""
    rollout = listed(world)
    with torch.no_grad():
        logp = gather_logp(policy.response_log_probs(rollout)[0], rollout.response_ids)
    charged = logp if kl_mode == "reward" else torch.zeros_like(logp)
    reward = token_rewards(world.gold, charged, rollout.ref_logp, rollout.response_mask, world.beta)
    values = torch.zeros_like(logp)
    return dataclasses.replace(rollout, logp=logp, reward=reward, values=values), logp.sum(1).exp()


def copies(probability: Tensor, total: int) -> list[int]:
    """Row numbers, each as often as `total` times its probability: what a very large batch looks like."""
    exact = probability * total
    counts = exact.floor().long()
    rest = (exact - counts).argsort(descending=True)[: total - int(counts.sum())]
    counts[rest] += 1
    return torch.arange(len(probability)).repeat_interleave(counts).tolist()


def mean_gradient(agent: Any, cases: Iterable[tuple[tuple[Rollout, ...], float]]) -> Tensor:
    """What `update` adds to the weights' gradient, over cases (rollouts, probability); against descent, one vector."""
    parameters = [p for p in agent.policy.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for rollouts, probability in cases:
        agent.update(*rollouts)
        total -= probability * flat([p.grad for p in parameters], parameters)
    return total


def flat(gradients: Iterable[Tensor | None], parameters: Iterable[Tensor]) -> Tensor:
    """All gradients as one vector, zeros where there is none."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).double()


def gradient_of(objective: Tensor, policy: Any) -> Tensor:
    """What autograd says of an objective written out, as one vector."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return flat(torch.autograd.grad(objective, parameters, allow_unused=True, retain_graph=True), parameters)


def cosine(a: Tensor, b: Tensor) -> float:
    """1 where two gradients point the same way."""
    return float(torch.cosine_similarity(a, b, dim=0))
