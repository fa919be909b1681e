"""Text generation as a `gymnasium.vector.VectorEnv`: many responses, one model call per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rlhf_env.envs.core import Observation, TokenMDP
from rlhf_env.envs.spaces import action_space, observation_space, unshared
from rlhf_env.envs.task import make_task
from rlhf_env.envs.view import CoreView
from rlhf_env.errors import ConfigError


class TextGenerationVectorEnv(CoreView, VectorEnv[Observation, NDArray[np.int64], NDArray[Any]]):
    """`num_envs` responses side by side, step for step equal to as many `TextGenerationEnv`.

    The reference model and the reward model each run once per step for all environments. Keywords beside `num_envs`
    and `autoreset_mode` are those of `rlhf_env.envs.task.make_task`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        **task: Any,
    ) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs must be at least 1, got {num_envs}")
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {
            "render_modes": ["ansi"],
            "render_fps": 4,
            "autoreset_mode": self.autoreset_mode,
        }
        self.render_mode = render_mode
        self.task, beta = make_task(**unshared(task))
        self.core = TokenMDP(self.task, num_envs, beta)
        self.single_observation_space = observation_space(self.task)
        self.single_action_space = action_space(self.task)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._over = np.zeros(num_envs, dtype=np.bool_)  # NEXT_STEP: environments whose next step is a reset

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode in every environment, or in those of `options["reset_mask"]` (bool [N]).

        Environment i is seeded with `seed + i`. `options["prompt"]` is one text for all or a list of N,
        where None means one of the environment's own.
        """
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, dtype=np.bool_)))
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"options['reset_mask'] must be bool [{self.num_envs}] with at least one True")
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, (int, np.integer)) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"got {len(seeds)} seeds for {self.num_envs} environments")
        rows = np.flatnonzero(mask).tolist()
        for i in rows:
            if seeds is not None and seeds[i] is not None:
                self._generators[i] = seeding.np_random(seeds[i])[0]
        self._over[mask] = False
        infos = self._begin(rows, {}, options.get("prompt"))
        return self.core.observation(), infos

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Write one token in every environment; finished ones restart as `autoreset_mode` says."""
        resetting = self._over.copy()
        result = self.core.step(actions, ~resetting)
        over = result.terminated | result.truncated
        same_step = self.autoreset_mode == AutoresetMode.SAME_STEP

        infos: dict[str, Any] = {}
        final_observation = self.core.observation() if over.any() and same_step else {}
        for i in np.flatnonzero(over).tolist():
            final = result.final_info[i]
            if same_step:
                final = {"final_obs": {k: v[i].copy() for k, v in final_observation.items()}, "final_info": final}
            infos = self._add_info(infos, final, i)
        here = ~resetting & ~over  # environments whose episode goes on
        if here.any():
            for name, values in result.info.items():
                kept, mask = infos.get(name, np.zeros(self.num_envs)), infos.get(f"_{name}", np.zeros_like(here))
                infos[name], infos[f"_{name}"] = np.where(here, values, kept), here | mask
        restart = np.flatnonzero(over if same_step else resetting).tolist()
        infos = self._begin(restart, infos)
        self._over = over if self.autoreset_mode == AutoresetMode.NEXT_STEP else self._over
        return self.core.observation(), result.reward, result.terminated, result.truncated, infos

    def render(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every environment's episode as coloured text."""
        return tuple(self.core.render(i) for i in range(self.num_envs))

    def push_logprobs(self, logp: Any, actions: Any) -> None:
        """Tell log π of the actions that the next `step` will be given, arrays [N]."""
        self.core.push(logp, actions)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which next tokens the sampling law allows, bool [N, V]."""
        return self.core.action_masks()

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Each environment's generator."""
        return tuple(self._generator(i) for i in range(self.num_envs))

    def _generator(self, i: int) -> np.random.Generator:
        generator = self._generators[i]
        if generator is None:
            generator = self._generators[i] = seeding.np_random()[0]
        return generator

    def _begin(
        self, rows: list[int], infos: dict[str, Any], given: str | Sequence[str | None] | None = None
    ) -> dict[str, Any]:
        """Start episodes in `rows` and add what a reset reports to `infos`."""
        if not rows:
            return infos
        every = [given] * self.num_envs if given is None or isinstance(given, str) else list(given)
        if len(every) != self.num_envs:
            raise ValueError(f"options['prompt'] has {len(every)} texts for {self.num_envs} environments")
        prompts: list[str] = []
        ids: list[Sequence[int]] = []
        for i in rows:
            if (prompt := every[i]) is None:
                chosen = int(self._generator(i).integers(len(self.task.prompts)))
                prompts.append(self.task.prompts[chosen])
                ids.append(self.task.prompt_ids[chosen])
            else:
                prompts.append(prompt)
                ids.append(self.task.encode_prompt(prompt, where=f"options['prompt'][{i}]"))
        self.core.begin(rows, prompts, ids)
        for i, prompt in zip(rows, ids, strict=True):
            reset_info = {"prompt_length": len(prompt), "beta": float(self.core.episode_beta[i])}
            infos = self._add_info(infos, reset_info, i)
        return infos
