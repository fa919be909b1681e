"""What SB3's logger and terminal show of the episodes that a rollout finished."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from rlhf_env.envs.binding import find_cores
from rlhf_env.envs.rendering import render_ansi
from rlhf_env.errors import ConfigError

_SHOWN = ("score", "kl", "penalty", "beta", "stop_reason")


def episode_means(infos: Sequence[dict[str, Any]], *, charged: bool) -> dict[str, float]:
    """Means over finished episodes, given by their last infos; what no episode tells is left out.

    Where their KL was `charged`, `return` is what they were paid: score − penalty − β·KL.
    """
    numbers: defaultdict[str, list[float]] = defaultdict(list)
    for info in infos:
        for name in ("score", "kl", "kl_k3", "penalty", "beta"):
            if name in info:
                numbers[name].append(info[name])
        for name in info:
            if name.startswith("score_"):  # a named component
                numbers[name].append(info[name])
        if charged and "score" in info and "kl" in info:
            numbers["return"].append(info["score"] - info["penalty"] - info["beta"] * info["kl"])
        numbers["length"].append(info["response_length"])
        numbers["eos_rate"].append(info["stop_reason"] in ("eos", "stop_string"))
    return {name: float(np.mean(values)) for name, values in numbers.items()}


class FinishedEpisodes(BaseCallback):
    """Means over the episodes that ended since they were last asked for."""

    def _on_training_start(self) -> None:
        self._infos: list[dict[str, Any]] = []
        try:
            self._charged = find_cores(self.training_env)[0].task.kl_mode == "reward"
        except ConfigError:  # in other processes, where no policy's KL can be charged
            self._charged = False

    def _on_step(self) -> bool:
        self._infos += [info for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True) if done]
        return True

    def take(self) -> tuple[int, dict[str, float]]:
        """How many ended, and the means over them; they are then forgotten."""
        infos, self._infos = self._infos, []
        return len(infos), episode_means(infos, charged=self._charged)


class RLHFMetrics(FinishedEpisodes):
    """Log, per rollout, the means of finished episodes: rlhf/score, rlhf/kl, rlhf/length, rlhf/eos_rate, …

    KL is in nats per sequence; `rlhf/eos_rate` is the share that ended by itself; components of the score have their
    own names; `rlhf/return` is there where the KL is charged. model.learn(…, callback=RLHFMetrics()).
    """

    def _on_rollout_end(self) -> None:
        _, means = self.take()
        for name, mean in means.items():
            self.logger.record(f"rlhf/{name}", mean)


class TokenView(BaseCallback):
    """Print one finished episode every `every` steps of SB3's count: its tokens, their KL and reward, its score."""

    def __init__(self, every: int = 10_000) -> None:
        super().__init__()
        self.every = every

    def _on_training_start(self) -> None:
        self._codec = find_cores(self.training_env)[0].task.codec
        self._due = self.num_timesteps + self.every
        self._steps: list[list[dict[str, float]]] = [[] for _ in range(self.training_env.num_envs)]

    def _on_step(self) -> bool:
        infos, rewards, dones = (self.locals[name] for name in ("infos", "rewards", "dones"))
        for steps, info, reward, done in zip(self._steps, infos, rewards, dones, strict=True):
            steps.append({"reward": float(reward)})
            if "logp" in info and "ref_logp" in info:
                steps[-1]["kl"] = info["logp"] - info["ref_logp"]
            if done:
                if self.num_timesteps >= self._due:
                    self._due = self.num_timesteps + self.every
                    print(self._rendered(info, steps))
                steps.clear()
        return True

    def _rendered(self, info: dict[str, Any], steps: Sequence[dict[str, float]]) -> str:
        last = info["terminal_observation"]
        ids = last["input_ids"][last["attention_mask"] > 0].tolist()
        begin = info["prompt_length"]
        whole = len(steps) == info["response_length"]  # else it began before the training
        return render_ansi(
            self._codec.decode(ids[:begin]),
            self._codec.pieces(ids)[begin:],
            kl=[step["kl"] for step in steps] if whole and all("kl" in step for step in steps) else None,
            reward=[step["reward"] for step in steps] if whole else None,
            footer={name: info[name] for name in _SHOWN if name in info},
        )
