"""The training loop: collect, update, report; nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_env.errors import ConfigError
from rlhf_env.functional import kl_k2, kl_k3, masked_sum
from rlhf_env.training.collect import collect
from rlhf_env.types import Agent, Rollout


@dataclass(frozen=True)
class Spent:
    """What a run has used so far. With the seed it fixes every random number of what comes next."""

    updates: int = 0
    episodes: int = 0
    tokens: int = 0  # sampled response tokens


def train(
    agent: Agent,
    envs: Any,
    *,
    tokens: int | None = None,
    episodes: int | None = None,
    updates: int | None = None,
    seed: int = 0,
    spent: Spent = Spent(),  # noqa: B008 (frozen)
) -> Iterator[dict[str, float]]:
    """Train until a budget is used up, yielding one dict of metrics per update.

    Exactly one of `tokens` (sampled), `episodes` and `updates` is the budget. `spent` continues an earlier run: with
    the agent's state restored, the continuation is the one that the uninterrupted run would have had.
    """
    budgets = {k: v for k, v in {"tokens": tokens, "episodes": episodes, "updates": updates}.items() if v is not None}
    if len(budgets) != 1:
        raise ConfigError(f"train needs exactly one budget of tokens, episodes and updates, got {budgets or 'none'}")
    ((unit, budget),) = budgets.items()
    while (used := getattr(spent, unit)) < budget:
        began = time.perf_counter()
        rollout = collect(agent.policy, envs, episodes=agent.batch_size, seed=seed, start=spent.episodes)
        sampled = time.perf_counter()
        metrics = agent.update(rollout, progress=used / budget)
        now = time.perf_counter()
        spent = Spent(spent.updates + 1, spent.episodes + len(rollout), spent.tokens + int(rollout.lengths.sum()))
        yield {
            "update": spent.updates,
            "episodes": spent.episodes,
            "tokens": spent.tokens,
            **rollout_metrics(rollout),
            **metrics,
            "seconds": now - began,
            "seconds_sampling": sampled - began,
        }


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Means over a rollout's episodes: score, KL in nats per sequence, return, length in tokens, and so on.

    `kl` is the estimator k1, the one that the reward contains; `kl_k3` estimates the same, with less variance
    where policy and reference are close.
    """
    return {
        "score": float(rollout.score.mean()),
        "kl": float(rollout.kl.mean()),
        "kl_k2": float(masked_sum(kl_k2(rollout.logp, rollout.ref_logp), rollout.response_mask, dim=1).mean()),
        "kl_k3": float(masked_sum(kl_k3(rollout.logp, rollout.ref_logp), rollout.response_mask, dim=1).mean()),
        "return": float(rollout.reward.sum(1).mean()),
        "penalty": float(rollout.penalty.mean()),
        "beta": float(rollout.beta.mean()),
        "length": float(rollout.lengths.float().mean()),
        "eos_rate": float(rollout.ended.float().mean()),
    }
