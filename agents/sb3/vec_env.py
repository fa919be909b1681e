"""The batched environment as Stable-Baselines3 sees environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from rlhf_env.envs.core import Observation, TokenMDP
from rlhf_env.envs.infos import info_rows
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError


class SB3VecEnv(VecEnv):
    """A batched text-generation environment as Stable-Baselines3 sees environments.

    Wrappers go around it and are SB3's own (`VecMonitor`, `VecEnvWrapper`). Where a step failed half-way, as when the
    reward model raises, its episodes are lost: `model.set_env(model.get_env())` begins new ones, and
    `model.learn(…, reset_num_timesteps=False)` goes on with them.
    """

    def __init__(self, envs: Any) -> None:
        inner = envs.unwrapped
        if not isinstance(inner, TextGenerationVectorEnv):
            raise ConfigError(f"SB3VecEnv wraps a TextGenerationVectorEnv (gym.make_vec), got {type(inner).__name__}")
        if envs is not inner:
            raise ConfigError(
                f"SB3VecEnv steps the environment inside {type(envs).__name__}, which would not notice: take it away, "
                "and wrap the SB3VecEnv with SB3's VecEnvWrapper (VecMonitor, …) instead"
            )
        if inner.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ConfigError(
                f"Stable-Baselines3 resets in the same step, but autoreset_mode is {inner.autoreset_mode.name}: make "
                "the environment with autoreset_mode=AutoresetMode.SAME_STEP, the default"
            )
        self.venv_ = inner
        self.render_mode = inner.render_mode
        self._actions = np.zeros(inner.num_envs, dtype=np.int64)
        super().__init__(inner.num_envs, inner.single_observation_space, inner.single_action_space)

    @property
    def core(self) -> TokenMDP:
        """The state machine."""
        return self.venv_.core

    def reset(self) -> Observation:  # type: ignore[override]
        """Begin an episode in every environment, with the seeds and options given to `seed` and `set_options`."""
        seeds = None if all(s is None for s in self._seeds) else self._seeds
        prompts = [options.get("prompt") if options else None for options in self._options]
        observation, infos = self.venv_.reset(seed=seeds, options={"prompt": prompts})
        self.reset_infos = info_rows(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Write one token in every environment; what a finished episode leaves is in its info."""
        actions = np.asarray(self._actions).reshape(-1)
        try:
            observation, reward, terminated, truncated, infos = self.venv_.step(actions)
        except Exception as error:
            if not self.core.active.all():
                error.add_note(
                    "These episodes cannot go on. model.set_env(model.get_env()) lets the next learn(…) begin new ones."
                )
            raise
        done = terminated | truncated
        listed = info_rows(infos, self.num_envs)
        for i in np.flatnonzero(done).tolist():
            self.reset_infos[i] = {k: v for k, v in listed[i].items() if k not in ("final_obs", "final_info")}
            listed[i] = {
                **listed[i]["final_info"],
                "terminal_observation": listed[i]["final_obs"],
                "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
            }
        return observation, reward.astype(np.float32), done, listed

    def close(self) -> None:
        """Nothing to release."""
        self.venv_.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The batched environment's attribute, once for each index."""
        return [getattr(self.venv_, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute that the batched environment has, which all of them share: `indices` must name all."""
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ConfigError(f"all environments share one {attr_name}: set it for all of them, without indices")
        if not hasattr(self.venv_, attr_name):
            raise AttributeError(f"{type(self.venv_).__name__} has no attribute {attr_name!r} to set")
        setattr(self.venv_, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the batched environment once; a result with one entry per environment is split."""
        result = getattr(self.venv_, method_name)(*method_args, **method_kwargs)
        rows = list(self._get_indices(indices))
        return [result[i] for i in rows] if np.ndim(result) else [result] * len(rows)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Single environments do not exist here, so none is wrapped."""
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Text has no image."""
        return [None] * self.num_envs
