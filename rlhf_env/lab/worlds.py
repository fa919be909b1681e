"""A run in a built-in world: no files, and a truth to measure by."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_env.errors import ConfigError
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run
from rlhf_env.training.config import BUDGETS, DEFAULT_TOKENS


@dataclass(frozen=True)
class WorldConfig:
    """A run of an agent in the keywords or the enumerable world whose number is the seed."""

    world: Literal["keywords", "enumerable"]  #: which world
    agent: str = "ppo"  #: a name that `rlhf-env agents` lists, or your "module:Class"
    tokens: int | None = None  #: budget in sampled tokens (200,000 where no budget is given)
    episodes: int | None = None  #: budget in episodes
    updates: int | None = None  #: budget in updates of the agent
    queries: int | None = None  #: budget in responses that the reward model scores
    seed: int = 0  #: of the world, the sampling and the agent
    beta: float | None = None  #: reward per nat; none: the world's own
    comparisons: int = 0  #: of which the proxy learns that is the reward, in the keywords world; 0: gold is the reward
    vocab_size: int = 6  #: letters of the enumerable world
    length: int = 4  #: letters of its responses
    num_envs: int = 128  #: responses written side by side
    eval_episodes: int = 2048  #: responses in each evaluation; the enumerable world is evaluated exactly
    eval_every: int = 0  #: updates between evaluations; 0: before and after training only
    settings: dict[str, Any] = field(default_factory=dict)  #: the agent's own, e.g. learning_rate

    def __post_init__(self) -> None:
        given = [unit for unit in BUDGETS if getattr(self, unit) is not None]
        if len(given) > 1:
            raise ConfigError(f"a run has one budget, but {' and '.join(given)} are given: leave all but one out")
        if self.world == "enumerable" and self.comparisons:
            raise ConfigError("the enumerable world has no learned proxy: leave comparisons at 0")

    @property
    def budget(self) -> dict[str, int]:
        """The one budget, by its unit."""
        return {u: b for u in BUDGETS if (b := getattr(self, u)) is not None} or {"tokens": DEFAULT_TOKENS}


def run_in_world(config: WorldConfig, out: Path) -> dict[str, Any]:
    """Train an agent in its world, evaluating before and after, and leave config, metrics and summary in `out`.

    `gold` is the true reward, `score` what was trained on, and `kl` in nats per sequence to the reference. In the
    enumerable world these and `gain`, the share of the exact optimum's, are exact.
    """
    import torch

    from rlhf_env import TextGenerationVectorEnv, train
    from rlhf_env.training.agents import agent_class, agent_config, is_sb3
    from rlhf_env.training.evaluate import evaluate
    from rlhf_env.worlds.enumerable import EnumerableWorld
    from rlhf_env.worlds.keywords import KeywordsWorld

    began = time.perf_counter()
    if is_sb3(config.agent):
        raise ConfigError(f"{config.agent} wants a language model in a folder: give a world of policy, prompts, reward")
    cls: Any = agent_class(config.agent)
    if hasattr(cls, "fit"):
        raise ConfigError(f"{config.agent} learns from data, and a built-in world has none: give a world with data")
    settings = agent_config(cls, config.settings)
    if config.world == "keywords":
        world = KeywordsWorld.make(config.seed)
        gold, kwargs = world.gold, {**world.env_kwargs()}
        if config.comparisons:
            kwargs["reward_model"] = world.learned_proxy(config.comparisons)
    else:
        world = EnumerableWorld.make(config.seed, config.vocab_size, config.length)
        gold, kwargs = world.reward_model, world.env_kwargs()
    kwargs["beta"] = beta = world.beta if config.beta is None else config.beta
    agent = cls(world.policy(), settings, seed=config.seed)
    trained: dict[str, Any] = {**kwargs, "kl_mode": getattr(cls, "kl_mode", "reward")}
    envs = TextGenerationVectorEnv(config.num_envs, **trained)
    measured = TextGenerationVectorEnv(config.num_envs, **kwargs)

    def measure(best_of: int) -> dict[str, float]:
        if isinstance(world, EnumerableWorld):
            with torch.no_grad():
                log_probs = world.best_of_n(best_of) if best_of > 1 else world.sequence_log_probs(agent.policy)
            value = float(world.expected_gold(log_probs))
            known = {"gold": value, "score": value, "kl": float(world.kl(log_probs))}
            return known | {"gain": world.gain(log_probs, beta)}
        return evaluate(agent.policy, measured, episodes=config.eval_episodes, gold=gold, best_of=best_of).metrics

    before, run = measure(1), Run.create(out, to_dict(config))
    row: dict[str, float] = {}
    best_of = getattr(agent, "best_of", 1)
    budget: dict[str, Any] = config.budget
    for row in train(agent, envs, **budget, seed=config.seed):
        if config.eval_every and row["update"] % config.eval_every == 0:
            row |= {f"eval_{name}": x for name, x in measure(best_of).items() if not name.startswith("reference_")}  # noqa: PLW2901
        run.log(row)
    after = measure(best_of)
    twice = {f"{name}_before": before[name] for name in ("gold", "score")}
    twice |= {f"{name}_after": after[name] for name in ("gold", "score")}
    rest = {name: x for name, x in after.items() if name not in ("gold", "score") and not name.startswith("reference_")}
    used = {"updates": row["update"], **{unit: row[unit] for unit in ("episodes", "tokens", "queries")}}
    run.write_summary({**to_dict(config), **rest, **twice, **used, "seconds": time.perf_counter() - began})
    return run.summary
