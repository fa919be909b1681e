"""Text generation as a `gymnasium.Env`: one token is one step."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.core import Observation, TokenMDP
from rlhf_env.envs.spaces import action_space, observation_space, unshared
from rlhf_env.envs.task import make_task
from rlhf_env.envs.view import CoreView


class TextGenerationEnv(CoreView, gym.Env[Observation, np.int64]):
    """One response at a time: the n = 1 view of the token MDP.

    Keywords are those of `rlhf_env.envs.task.make_task`. The sum of an episode's rewards is
    score − β·KL − penalties exactly, and the last `info` holds the parts.
    """

    metadata = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012

    def __init__(self, *, render_mode: str | None = None, **task: Any) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            # A TypeError is what SB3's make_vec_env, which asks for "rgb_array" unasked, takes as "then without".
            raise TypeError(f"render_mode must be one of {self.metadata['render_modes']}, got {render_mode!r}")
        self.render_mode = render_mode
        self.task, beta = make_task(**unshared(task))
        self.core = TokenMDP(self.task, 1, beta)
        self.observation_space = observation_space(self.task)  # type: ignore[assignment]
        self.action_space = action_space(self.task)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode with a prompt drawn by the environment's generator, or with `options["prompt"]`."""
        super().reset(seed=seed)
        given = (options or {}).get("prompt")
        if given is None:
            row = int(self.np_random.integers(len(self.task.prompts)))
            prompt, ids = self.task.prompts[row], self.task.prompt_ids[row]
        else:
            prompt, ids = given, self.task.encode_prompt(given, where="options['prompt']")
        self.core.begin([0], [prompt], [ids])
        if self.render_mode == "human":
            self.render()
        return self._observation(), {"prompt_length": len(ids), "beta": float(self.core.episode_beta[0])}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Write one token."""
        result = self.core.step(np.array([action]))
        final = result.final_info.get(0)
        info = final if final is not None else {name: float(values[0]) for name, values in result.info.items()}
        if self.render_mode == "human":
            self.render()
        return (
            self._observation(),
            float(result.reward[0]),
            bool(result.terminated[0]),
            bool(result.truncated[0]),
            info,
        )

    def render(self) -> str | None:  # type: ignore[override]
        """The episode as coloured text: returned in mode "ansi", printed in mode "human"."""
        if self.render_mode is None:
            gym.logger.warn("render() does nothing without a render_mode: make the environment with 'ansi' or 'human'")
            return None
        text = self.core.render(0)
        if self.render_mode == "ansi":
            return text
        print(text)
        return None

    def push_logprobs(self, logp: Any, actions: Any) -> None:
        """Tell log π of the action that the next `step` will be given: numbers, or arrays of one."""
        self.core.push(np.reshape(logp, (1,)), np.reshape(actions, (1,)))

    def action_masks(self) -> NDArray[np.bool_]:
        """Which next tokens the sampling law allows, bool [V]."""
        return self.core.action_masks()[0]

    def _observation(self) -> Observation:
        return {name: values[0] for name, values in self.core.observation().items()}
