"""The environment's own cost, with no model in it: the batched environment, a loop of single ones, and SB3's.

    python benchmarks/environment.py

Responses of 32 random letters, KL off, a reward of zero. All in one thread; process time, medians of alternated
rounds; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from rlhf_env.agents.sb3 import SB3VecEnv
from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.text.tokenizers import char_tokenizer

TOKENS, EPISODES = 32, 4
SETTINGS: dict[str, Any] = {
    "prompts": ["abc", "the quick brown fox", "hello"],
    "tokenizer": char_tokenizer("abcdefghijklmnopqrstuvwxyz "),
    "reward_model": lambda prompts, responses: np.zeros(len(responses)),
    "kl_mode": "off",
    "beta": 0.0,
    "max_new_tokens": TOKENS,
}


def single() -> TextGenerationEnv:
    return TextGenerationEnv(**SETTINGS)


CONTESTANTS: dict[str, Callable[[int], Any]] = {
    "TextGenerationVectorEnv": lambda n: TextGenerationVectorEnv(n, **SETTINGS),
    "SyncVectorEnv of TextGenerationEnv": lambda n: SyncVectorEnv([single] * n, autoreset_mode=AutoresetMode.SAME_STEP),
    "SB3VecEnv of TextGenerationVectorEnv": lambda n: SB3VecEnv(TextGenerationVectorEnv(n, **SETTINGS)),
    "SB3 DummyVecEnv of TextGenerationEnv": lambda n: DummyVecEnv([single] * n),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"| n | environment, responses of {TOKENS} tokens | transitions per second | time |\n|---|---|---|---|")
    for n in (8, 64):
        actions = np.random.default_rng(0).integers(0, 26, (TOKENS * EPISODES, n))
        envs = {name: make(n) for name, make in CONTESTANTS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in envs}
        for round in range(rounds + 1):  # the first one warms up
            for name, env in envs.items():
                env.reset()
                began = time.process_time()
                for action in actions:
                    env.step(action)
                if round:
                    seconds[name].append(time.process_time() - began)
        for name, taken in seconds.items():
            ratio = statistics.median(t / b for t, b in zip(taken, seconds["TextGenerationVectorEnv"], strict=True))
            print(f"| {n} | {name} | {actions.size / statistics.median(taken):,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
