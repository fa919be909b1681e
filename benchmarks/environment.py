"""The environment's own cost, with no model in it, beside other ways to step many environments.

    python benchmarks/environment.py

Random letters, KL off, a reward of zero that reads token ids. Responses are of exactly 32 tokens, or end at an EOS that
every token has a chance of 1 in 24 to be. One thread; medians of alternated rounds; ratios are taken within a round.
Time is that of this process, and for environments in other processes the time on the wall. Last, the share that the
environment has in an iteration of PPO on a GPT-2 of 1 M parameters: its steps, and the arithmetic of its rewards, are
timed inside of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from paired import begin, row, table, take_turns
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.envs.core import TokenMDP
from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer

TOKENS, EPISODES, END = 32, 4, 1 / 24
TOKENIZER = char_tokenizer("abcdefghijklmnopqrstuvwxyz ")


class Zero:
    """A reward model that costs nothing: it takes token ids, so no text is made for it."""

    def score_ids(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        return np.zeros(len(responses))

    def score(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        return np.zeros(len(responses))


SETTINGS: dict[str, Any] = {
    "prompts": ["abc", "the quick brown fox", "hello"],
    "tokenizer": TOKENIZER,
    "reward_model": Zero(),
    "kl_mode": "off",
    "beta": 0.0,
    "max_new_tokens": TOKENS,
}


def single() -> TextGenerationEnv:
    return TextGenerationEnv(**SETTINGS)


SAME_STEP = AutoresetMode.SAME_STEP
CONTESTANTS: dict[str, Callable[[int], Any]] = {
    "TextGenerationVectorEnv": lambda n: TextGenerationVectorEnv(n, **SETTINGS),
    "SB3VecEnv of TextGenerationVectorEnv": lambda n: SB3VecEnv(TextGenerationVectorEnv(n, **SETTINGS)),
    "SyncVectorEnv of TextGenerationEnv": lambda n: SyncVectorEnv([single] * n, autoreset_mode=SAME_STEP),
    "SB3 DummyVecEnv of TextGenerationEnv": lambda n: DummyVecEnv([single] * n),
}
PROCESSES: dict[str, Callable[[int], Any]] = {
    "AsyncVectorEnv (a process each)": lambda n: AsyncVectorEnv([single] * n, autoreset_mode=SAME_STEP),
    "SB3 SubprocVecEnv (a process each)": lambda n: SubprocVecEnv([single] * n),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    begin()
    table("n", "environment", "responses", "transitions per second", "time")
    for n in (8, 64, 256):
        for ends in (False, True):
            compare(n, ends, CONTESTANTS, rounds, time.process_time)
    compare(8, False, {"TextGenerationVectorEnv": CONTESTANTS["TextGenerationVectorEnv"]} | PROCESSES, rounds, wall)
    share(rounds)


def wall() -> float:
    return time.perf_counter()


def compare(
    n: int, ends: bool, contestants: dict[str, Callable[[int], Any]], rounds: int, clock: Callable[[], float]
) -> None:
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 26, (TOKENS * EPISODES, n))
    if ends:
        actions[rng.random(actions.shape) < END] = int(TOKENIZER.convert_tokens_to_ids("<eos>"))  # type: ignore[arg-type]
    envs = {name: make(n) for name, make in contestants.items()}

    def cost(env: Any) -> float:
        env.reset()
        began = clock()
        for action in actions:
            env.step(action)
        return clock() - began

    found = take_turns({name: lambda env=env: cost(env) for name, env in envs.items()}, rounds)
    for name, (middle, ratio) in found.items():
        row(n, name, "by EOS" if ends else f"{TOKENS} tokens", f"{actions.size / middle:,.0f}", f"{ratio:.2f}")
        envs[name].close()


def share(rounds: int) -> None:
    """Which part of a PPO iteration is spent in the state machine and its views, models and reward model aside."""
    lm = CausalLM.from_config(tiny_config("gpt2", len(TOKENIZER), n_layer=5, n_embd=128), TOKENIZER)
    envs = TextGenerationVectorEnv(
        32, **(SETTINGS | {"kl_mode": "reward", "beta": 0.1, "reference": lm.frozen_copy(), "stop_at_eos": False})
    )
    view = SB3VecEnv(envs)
    model = PPO(
        LMActorCriticPolicy,
        view,
        n_steps=TOKENS,
        batch_size=32 * TOKENS // 4,
        n_epochs=4,
        gamma=1.0,
        device="cpu",
        policy_kwargs={"model": lambda: lm},
        rollout_buffer_class=EpisodeRolloutBuffer,
    )
    attach_sb3(model)
    spent = {"env": 0.0, "models": 0.0}

    def timed(owner: Any, name: str, account: str) -> None:
        inner = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = inner(*args, **kwargs)
            spent[account] += time.process_time() - began
            return result

        setattr(owner, name, run)

    model.learn(32 * TOKENS)
    assert isinstance(view.core, TokenMDP) and view.core._decoder is not None
    timed(view, "step_wait", "env")
    timed(view.core._decoder, "start", "models")  # the reference's two calls, made inside of step
    timed(view.core._decoder, "append", "models")
    shares = []
    for _ in range(rounds):
        spent.update(env=0.0, models=0.0)
        began = time.process_time()
        model.learn(32 * TOKENS, reset_num_timesteps=False)
        shares.append((spent["env"] - spent["models"]) / (time.process_time() - began))
    count = sum(p.numel() for p in lm.parameters())
    print(
        f"\nShare of the environment in an iteration of SB3's PPO, GPT-2 of {count:,} parameters, 32 responses of "
        f"{TOKENS} tokens, 4 epochs in 4 minibatches: {statistics.median(shares):.1%} (median of {rounds})"
    )


if __name__ == "__main__":
    main()
