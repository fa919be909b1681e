"""The prompts of one environment: drawn with its own generator, each for a group of episodes."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_env.envs.task import TextTask


class PromptStream:
    """What one environment is asked next. `left` episodes more get the prompt that was drawn last."""

    def __init__(self, task: TextTask) -> None:
        self.task = task
        self.left = 0
        self.prompt: tuple[str, tuple[int, ...]] = ("", ())

    def restart(self) -> None:
        """Begin a new group with the next prompt: after seeding, what was drawn before must not matter."""
        self.left = 0

    def next(self, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
        """The next episode's prompt and its token ids."""
        if self.left == 0:
            self.prompt, self.left = self.task.draw_prompt(rng), self.task.group_size
        self.left -= 1
        return self.prompt

    def state(self, rng: np.random.Generator) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {"generator": rng.bit_generator.state, "left": self.left, "prompt": self.prompt[0]}

    def restore(self, state: dict[str, Any], rng: np.random.Generator) -> None:
        """Go on from where `state` was taken; `rng` is made the generator that it was."""
        rng.bit_generator.state = state["generator"]
        self.left = state["left"]
        prompt = state["prompt"]
        self.prompt = (prompt, self.task.encode_prompt(prompt) if self.left else ())
