"""The training loop: collect, update, report; nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_env.envs.binding import find_cores
from rlhf_env.errors import ConfigError, RemoteError, RewardError, RLHFEnvError
from rlhf_env.functional import kl_k2, kl_k3, masked_sum
from rlhf_env.training.collect import collect
from rlhf_env.types import Agent, Policy, Rollout


@dataclass(frozen=True)
class Spent:
    """What a run has used so far. With the seed it fixes every random number of what comes next."""

    updates: int = 0
    episodes: int = 0  # of the agent's own policy
    tokens: int = 0  # sampled response tokens, whoever sampled them
    queries: int = 0  # responses that the reward model scored


def train(
    agent: Agent,
    envs: Any,
    *,
    tokens: int | None = None,
    episodes: int | None = None,
    updates: int | None = None,
    queries: int | None = None,
    seed: int = 0,
    spent: Spent = Spent(),  # noqa: B008 (frozen)
) -> Iterator[dict[str, float]]:
    """Train until a budget is used up, yielding one dict of metrics per update.

    Exactly one of `tokens` (sampled), `episodes`, `updates` and `queries` (to the reward model) is the budget. `spent`
    continues an earlier run: with the agent's state restored, the continuation is the one that the uninterrupted run
    would have had.
    """
    units = {"tokens": tokens, "episodes": episodes, "updates": updates, "queries": queries}
    budgets = {unit: budget for unit, budget in units.items() if budget is not None}
    if len(budgets) != 1:
        raise ConfigError(f"train needs exactly one budget of {', '.join(units)}, got {budgets or 'none'}")
    ((unit, budget),) = budgets.items()
    _require_rewards_for(agent, envs)
    while (used := getattr(spent, unit)) < budget:
        began = time.perf_counter()
        rollouts = next_rollouts(agent, envs, seed, spent.episodes)
        sampled = time.perf_counter()
        metrics = _updated(agent, rollouts, used / budget)
        now = time.perf_counter()
        spent = Spent(
            updates=spent.updates + 1,
            episodes=spent.episodes + len(rollouts[0]),
            tokens=spent.tokens + sum(int(rollout.lengths.sum()) for rollout in rollouts),
            queries=spent.queries + sum(map(len, rollouts)),
        )
        yield {
            "update": spent.updates,
            "episodes": spent.episodes,
            "tokens": spent.tokens,
            "queries": spent.queries,
            **rollout_metrics(rollouts[0]),
            **metrics,
            "seconds": now - began,
            "seconds_sampling": sampled - began,
        }


def _updated(agent: Agent, rollouts: tuple[Rollout, ...], progress: float) -> dict[str, float]:
    """One update. A reward that an agent misses in its middle leaves half of one, which no run can go on from."""
    try:
        return agent.update(*rollouts, progress=progress)
    except (RewardError, RemoteError) as error:
        raise RLHFEnvError(f"{type(agent).__name__} broke off its update: {error}") from error


def next_rollouts(agent: Agent, envs: Any, seed: int, start: int) -> tuple[Rollout, ...]:
    """What the agent learns from at position `start` of its episodes: a rollout of its policy, or what it asks for."""
    task = find_cores(envs)[0].task
    own = getattr(agent, "group_size", None) or task.group_size
    if task.group_size not in (1, own):
        raise ConfigError(f"the environment's group_size is {task.group_size} and the agent's {own}: leave out one")
    if agent.batch_size % own:
        raise ConfigError(f"batch_size={agent.batch_size} is not a multiple of group_size={own}")

    def sample(
        policy: Policy | Literal["reference"], *, greedy: bool = False, group_size: int | None = None
    ) -> Rollout:
        size = group_size or own
        if policy == "reference" and task.reference is None:
            raise ConfigError(f"{type(agent).__name__} samples from the reference, and the environment has none")
        return collect(
            task.reference if policy == "reference" else policy,  # type: ignore[arg-type]
            envs,
            episodes=agent.batch_size // own * size,
            seed=seed,
            start=start // own * size,
            group_size=size,
            stream=int(policy == "reference"),
            greedy=greedy,
        )

    if (ask := getattr(agent, "rollouts", None)) is not None:
        return ask(sample)
    return (sample(agent.policy),)


def _require_rewards_for(agent: Agent, envs: Any) -> None:
    wanted, found = getattr(agent, "kl_mode", None), find_cores(envs)[0].task.kl_mode
    if wanted is None and found == "reference":
        wanted = "reward"  # rewards that hold +β log ref are for those who ask for them
    if wanted not in (None, found):
        raise ConfigError(
            f"{type(agent).__name__} learns from rewards of kl_mode={wanted!r}, and this environment's is {found!r}: "
            f"make it with kl_mode={wanted!r}"
        )


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
