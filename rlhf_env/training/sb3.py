"""Training with an unmodified actor-critic algorithm of Stable-Baselines3 or sb3-contrib."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule

from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.agents.sb3.callbacks import FinishedEpisodes
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError, RLHFEnvError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.checkpoint import save_checkpoint
from rlhf_env.records.run import Run
from rlhf_env.training.config import TrainConfig
from rlhf_env.training.interruption import Interrupted

FinishRow = Callable[[dict[str, Any], CausalLM], dict[str, Any]]

_OURS = {"policy", "env", "rollout_buffer_class", "seed", "device", "_init_setup_model"}  # set here, not in settings

# SB3's names of what our rows call otherwise. Its value loss lacks our factor ½, so it keeps SB3's name.
_SAME = {
    "train/approx_kl": "approx_kl",
    "train/clip_fraction": "clip_fraction",
    "train/explained_variance": "explained_variance",
    "train/learning_rate": "learning_rate",
    "train/policy_gradient_loss": "policy_loss",
    "train/policy_loss": "policy_loss",
}


def sb3_class(agent: str, settings: Mapping[str, Any]) -> type[OnPolicyAlgorithm]:
    """The algorithm that "sb3:NAME" means, once it is clear that it can train a language model with `settings`.

    "sb3-contrib:NAME" is one of sb3-contrib, where "sb3:NAME" looks too.
    """
    prefix, _, name = agent.partition(":")
    available = _available(prefix)
    if name not in available:
        close = get_close_matches(name, available, n=1)
        known = ", ".join(f"{prefix}:{n}" for n in available) or "none: it is not installed (pip install sb3-contrib)"
        hint = f"did you mean {prefix}:{close[0]}?" if close else f"there are {known}"
        library = "sb3-contrib" if prefix == "sb3-contrib" else "Stable-Baselines3"
        raise ConfigError(f"{library} has no actor-critic algorithm for text called {name!r}; {hint}")
    algorithm = available[name]
    known = [p for p in inspect.signature(algorithm).parameters if p not in _OURS]
    for key in settings:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean settings.{close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"{agent} has no setting settings.{key} to be given here; {hint}")
    return algorithm


def make_sb3(config: TrainConfig, envs: TextGenerationVectorEnv) -> OnPolicyAlgorithm:
    """The algorithm of `config.agent` with the language model as its policy, attached to the environment.

    Where the settings say nothing else, γ is 1 and a rollout is as many steps as the longest response. A
    `learning_rate` of "lin_X" falls from X to 0 in a straight line, as in RL Zoo.
    """
    algorithm = sb3_class(config.agent, config.settings)
    settings: dict[str, Any] = {"gamma": 1.0, "n_steps": config.env.max_new_tokens, **config.settings}
    settings["rollout_buffer_class"] = EpisodeRolloutBuffer
    if isinstance(rate := settings.get("learning_rate"), str):
        settings["learning_rate"] = _falling(rate)
    attention = "eager" if algorithm.__name__ == "TRPO" else None  # it differentiates twice

    def load() -> CausalLM:
        model = CausalLM.from_pretrained(config.policy, device=config.device, dtype=config.dtype, attention=attention)
        return model.freeze_layers(config.freeze_layers)

    settings["policy_kwargs"] = {**settings.get("policy_kwargs", {}), "model": load}
    try:
        if algorithm is PPO:
            settings.setdefault("batch_size", max(2, settings["n_steps"] * config.num_envs // 4))
        model = algorithm(LMActorCriticPolicy, SB3VecEnv(envs), seed=config.seed, device=config.device, **settings)
    except RLHFEnvError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{config.agent} refuses these settings: {error}") from error
    attach_sb3(model)
    return model


def _falling(rate: str) -> LinearSchedule:
    try:
        return LinearSchedule(float(rate.removeprefix("lin_")), 0.0, 1.0)
    except ValueError:
        raise ConfigError(f"settings.learning_rate must be a number, or lin_ and a number, got {rate!r}") from None


def train_sb3(
    model: OnPolicyAlgorithm,
    config: TrainConfig,
    run: Run,
    finish_row: FinishRow,
    on_update: Callable[[dict[str, Any]], None] | None,
) -> CausalLM:
    """Spend the budget, one row of metrics per rollout, and return the trained policy."""
    ((unit, budget),) = config.budget.items()
    longest = config.env.max_new_tokens
    steps = {"tokens": 1, "updates": model.n_steps * config.num_envs, "episodes": longest, "queries": longest}[unit]
    model.learn(budget * steps, callback=_Rows(config, run, finish_row, on_update), log_interval=None)  # type: ignore[arg-type]
    return model.policy.lm  # type: ignore[return-value]


class _Rows(FinishedEpisodes):
    """One row of metrics per rollout and update, and a checkpoint of the policy where one is due."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        finish_row: FinishRow,
        on_update: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        super().__init__()
        self.config, self.run, self.finish_row, self.on_update = config, run, finish_row, on_update
        self.updates, self.episodes, self.over = 0, 0, False
        self.means: dict[str, float] = {}  # over the episodes of the rollout whose row is not closed yet
        self.began = self.sampled = 0.0

    def _on_rollout_start(self) -> None:
        self._close_row()
        # SB3 knows no budget of episodes, each of which is a query. Stopping between rollouts leaves none untrained on.
        budget = self.config.episodes or self.config.queries
        self.over = budget is not None and self.episodes >= budget
        self.began = time.perf_counter()

    def _on_step(self) -> bool:
        return not self.over and super()._on_step()

    def _on_rollout_end(self) -> None:
        self.updates += 1
        finished, self.means = self.take()
        self.episodes += finished
        self.sampled = time.perf_counter()

    def _on_training_end(self) -> None:
        if not self.over:
            self._close_row()

    def _close_row(self) -> None:
        """The row of the update that just ended; SB3 has logged its losses by now."""
        if self.updates == 0:
            return
        logged = {
            _SAME.get(name, name): value
            for name, value in self.logger.name_to_value.items()
            if name.startswith("train/") and name not in ("train/n_updates", "train/loss", "train/entropy_loss")
        }
        if (negative_entropy := self.logger.name_to_value.get("train/entropy_loss")) is not None:
            logged["entropy"] = -negative_entropy
        row = {
            "update": self.updates,
            "episodes": self.episodes,
            "tokens": self.num_timesteps,
            "queries": self.episodes,
            **self.means,
            **{name: float(value) for name, value in logged.items()},
            "seconds": time.perf_counter() - self.began,
            "seconds_sampling": self.sampled - self.began,
        }
        policy: CausalLM = self.model.policy.lm  # type: ignore[assignment]
        row = self.finish_row(row, policy)
        due = bool(every := self.config.checkpoint_every) and self.updates % every == 0
        if due:
            self._save(row, policy)
        try:
            if self.on_update is not None:
                self.on_update(row)
        except Interrupted:
            if not due:
                self._save(row, policy)
            raise

    def _save(self, row: Mapping[str, Any], policy: CausalLM) -> None:
        state = {name: row[name] for name in ("update", "episodes", "tokens", "queries")}
        save_checkpoint(self.run.checkpoints, self.updates, tensors={}, state=state, write_model=policy.save_pretrained)


def _available(prefix: str) -> dict[str, type[OnPolicyAlgorithm]]:
    """The algorithms whose policy is a plain `ActorCriticPolicy`, which `LMActorCriticPolicy` can stand in for."""
    modules = ["stable_baselines3"] if prefix == "sb3" else []
    modules += ["sb3_contrib"] if find_spec("sb3_contrib") else []
    classes = [value for name in modules for value in vars(import_module(name)).values() if inspect.isclass(value)]
    return {
        c.__name__: c
        for c in classes
        if issubclass(c, OnPolicyAlgorithm) and c.policy_aliases.get("MlpPolicy") is ActorCriticPolicy
    }
