"""Text generation as a `gymnasium.Env`: one token is one step."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.core import TokenMDP
from rlhf_env.envs.infos import Column
from rlhf_env.envs.policy_logp import Observation
from rlhf_env.envs.prompt_stream import PromptStream
from rlhf_env.envs.spaces import action_space, observation_space, unshared
from rlhf_env.envs.task import make_task
from rlhf_env.envs.view import CoreView, known_options


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
        self._prompts = PromptStream(self.task)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode with a prompt drawn by the environment's generator, or with `options["prompt"]`."""
        given = known_options(options, "prompt").get("prompt")
        ids = () if given is None else self.task.encode_prompt(given, where="options['prompt']")
        super().reset(seed=seed)
        if seed is not None:
            self._prompts.restart()
        prompt, ids = self._prompts.next(self.np_random) if given is None else (given, ids)
        self.core.begin([0], [prompt], [ids])
        if self.render_mode == "human":
            self.render()
        return self._observation(), {"prompt_length": len(ids), "beta": float(self.core.episode_beta[0])}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Write one token."""
        result = self.core.step(np.array([action]))
        over = result.terminated[0] or result.truncated[0]
        if self.render_mode == "human":
            self.render()
        return (
            self._observation(),
            float(result.reward[0]),
            bool(result.terminated[0]),
            bool(result.truncated[0]),
            _only_row(result.final if over else result.info),
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
        self.core.log_pi.push(np.reshape(logp, (1,)), np.reshape(actions, (1,)))

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions the sampling law allows now, bool [`action_space.n`]."""
        return self.core.action_masks()[0]

    def state_dict(self) -> dict[str, Any]:
        """What the episodes to come depend on, as JSON values: the generator, the prompt's group, and β."""
        return {"prompts": [self._prompts.state(self.np_random)], "beta": self.core.beta_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was called, with the next `reset`."""
        if len(state["prompts"]) != 1:
            raise ValueError(f"the state is of {len(state['prompts'])} environments, and here is 1")
        self._prompts.restore(state["prompts"][0], self.np_random)
        self.core.load_beta_state(state["beta"])

    def _observation(self) -> Observation:
        return {name: values[0] for name, values in self.core.observation().items()}


def _only_row(columns: dict[str, Column]) -> dict[str, Any]:
    """A single environment's info: plain Python values, and no key for what is not known."""
    first = {name: values[0] for name, (values, where) in columns.items() if where[0]}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in first.items()}
