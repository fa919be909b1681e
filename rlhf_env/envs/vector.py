"""Text generation as a `gymnasium.vector.VectorEnv`: many responses, one model call per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rlhf_env.envs.core import TokenMDP
from rlhf_env.envs.infos import add_columns
from rlhf_env.envs.policy_logp import Observation
from rlhf_env.envs.prompt_stream import PromptStream
from rlhf_env.envs.spaces import action_space, observation_space, unshared
from rlhf_env.envs.task import make_task
from rlhf_env.envs.view import CoreView, known_options, refuse_time_limit
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
        max_episode_steps: int | None = None,
        **task: Any,
    ) -> None:
        if max_episode_steps is not None:  # gym.make_vec hands on what belongs to no environment of ours
            refuse_time_limit()
        if num_envs < 1:
            raise ConfigError(f"num_envs must be at least 1, got {num_envs}")
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode.__members__.get(str(autoreset_mode)) or AutoresetMode(autoreset_mode)
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
        self._seeds: list[int | None] = [None] * num_envs
        self._prompts = [PromptStream(self.task) for _ in range(num_envs)]
        self._over = np.zeros(num_envs, dtype=np.bool_)  # NEXT_STEP: environments whose next step is a reset

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode in every environment, or in those of `options["reset_mask"]` (bool [N]).

        Environment i is seeded with `seed + i`. `options["prompt"]` is one text for all or a list of N,
        where None means one of the environment's own.
        """
        options = known_options(options, "prompt", "reset_mask")
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, dtype=np.bool_)))
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"options['reset_mask'] must be bool [{self.num_envs}] with at least one True")
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, (int, np.integer)) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"got {len(seeds)} seeds for {self.num_envs} environments")
        rows = np.flatnonzero(mask)
        given = self._given(rows, options)
        for i in rows.tolist():
            if seeds is not None and seeds[i] is not None:
                self._generators[i], self._seeds[i] = seeding.np_random(seeds[i])
                self._prompts[i].restart()
        infos: dict[str, Any] = {}
        self._begin(rows, infos, given)
        self._over[mask] = False
        return self.core.observation(), infos

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Do one action in every environment; finished ones restart as `autoreset_mode` says."""
        resetting = self._over.copy()
        result = self.core.step(actions, ~resetting)
        over = result.terminated | result.truncated
        same_step = self.autoreset_mode == AutoresetMode.SAME_STEP

        infos: dict[str, Any] = {}
        if over.any():
            if same_step:
                finished = np.flatnonzero(over)
                last = self.core.observation(finished)
                infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
                for row, i in enumerate(finished.tolist()):
                    infos["final_obs"][i] = {name: values[row] for name, values in last.items()}
                infos["final_info"] = {}
                add_columns(infos["final_info"], result.final)
                infos["_final_obs"], infos["_final_info"] = over.copy(), over.copy()
            else:
                add_columns(infos, result.final)
        here = ~resetting & ~over  # environments whose episode goes on
        if here.any():
            add_columns(infos, {name: (values, here) for name, (values, _) in result.info.items()})
        self._begin(np.flatnonzero(over if same_step else resetting), infos)
        self._over = over if self.autoreset_mode == AutoresetMode.NEXT_STEP else self._over
        return self.core.observation(), result.reward, result.terminated, result.truncated, infos

    def render(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every environment's episode as coloured text."""
        return tuple(self.core.render(i) for i in range(self.num_envs))

    def push_logprobs(self, logp: Any, actions: Any) -> None:
        """Tell log π of the actions that the next `step` will be given, arrays [N]."""
        self.core.log_pi.push(logp, actions)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions the sampling law allows now, bool [N, `single_action_space.n`]."""
        return self.core.action_masks()

    def state_dict(self) -> dict[str, Any]:
        """What the episodes to come depend on, as JSON values: generators, the prompts' groups, and β."""
        prompts = [stream.state(self._generator(i)) for i, stream in enumerate(self._prompts)]
        return {"prompts": prompts, "beta": self.core.beta_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was called, with the next `reset`."""
        if len(state["prompts"]) != self.num_envs:
            raise ValueError(f"the state is of {len(state['prompts'])} environments, and here are {self.num_envs}")
        for i, (stream, saved) in enumerate(zip(self._prompts, state["prompts"], strict=True)):
            stream.restore(saved, self._generator(i))
        self.core.load_beta_state(state["beta"])

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Each environment's generator."""
        return tuple(self._generator(i) for i in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """Each environment's seed."""
        return tuple(self._seeds)

    def _generator(self, i: int) -> np.random.Generator:
        generator = self._generators[i]
        if generator is None:
            generator, self._seeds[i] = seeding.np_random()
            self._generators[i] = generator
        return generator

    def _given(self, rows: NDArray[np.int64], options: dict[str, Any]) -> dict[int, tuple[str, tuple[int, ...]]]:
        """The prompts that the options give to `rows`, and their token ids, by row."""
        given = options.get("prompt")
        every = [given] * self.num_envs if given is None or isinstance(given, str) else list(given)
        if len(every) != self.num_envs:
            raise ValueError(f"options['prompt'] has {len(every)} texts for {self.num_envs} environments")
        texts = {i: text for i in rows.tolist() if (text := every[i]) is not None}
        return {i: (text, self.task.encode_prompt(text, where=f"options['prompt'][{i}]")) for i, text in texts.items()}

    def _begin(
        self,
        rows: NDArray[np.int64],
        infos: dict[str, Any],
        given: Mapping[int, tuple[str, tuple[int, ...]]] = MappingProxyType({}),
    ) -> None:
        """Start episodes in `rows`, with the prompts given or their own, and add what a reset reports to `infos`."""
        if len(rows) == 0:
            return
        slots = rows.tolist()
        drawn = [given[i] if i in given else self._prompts[i].next(self._generator(i)) for i in slots]
        self.core.begin(slots, [prompt for prompt, _ in drawn], [ids for _, ids in drawn])
        begun = np.zeros(self.num_envs, dtype=np.bool_)
        begun[rows] = True
        add_columns(infos, {"prompt_length": (self.core.prompt_length, begun), "beta": (self.core.episode_beta, begun)})
