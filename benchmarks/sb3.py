"""What the bridge to Stable-Baselines3 costs and saves: a rollout and an update of PPO with a small GPT-2.

    python benchmarks/sb3.py

32 responses of 32 tokens to prompts of 16; policy and reference are GPT-2s of 4 layers and width 128, random. All in
one thread; process time, medians of alternated rounds; ratios are taken within a round, over the first contestant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from paired import begin, row, seconds, table, take_turns
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger
from torch import Tensor

from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.agents.sb3.buffer import EpisodeStates
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer

ENVS, TOKENS, PROMPT = 32, 32, 16
TOKENIZER = char_tokenizer("abcdefghijklmnopqrstuvwxyz ")


def lm() -> CausalLM:
    return CausalLM.from_config(tiny_config("gpt2", len(TOKENIZER), n_layer=4, n_embd=128), TOKENIZER)


class Uncached(LMActorCriticPolicy):
    """Reads every context from its beginning at every step."""

    def _logits(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._inside(obs) if isinstance(obs, EpisodeStates) else self._at_the_end(obs)


def make(policy: type[LMActorCriticPolicy], buffer: type[DictRolloutBuffer], **env: Any) -> PPO:
    envs = TextGenerationVectorEnv(
        ENVS,
        prompts=["the quick brown fox"[:PROMPT]],
        tokenizer=TOKENIZER,
        reference=lm().requires_grad_(False),
        reward_model=lambda prompts, responses: np.zeros(len(responses)),
        max_new_tokens=TOKENS,
        **env,
    )
    model = PPO(
        policy,
        SB3VecEnv(envs),
        gamma=1.0,
        n_steps=TOKENS,
        batch_size=ENVS * TOKENS // 4,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={"model": lm},
        rollout_buffer_class=buffer,
    )
    attach_sb3(model)
    model.set_logger(Logger(None, []))
    model._setup_learn(0)
    return model


def rollout(model: PPO) -> None:
    assert model.env is not None
    callback = CallbackList([])
    callback.init_callback(model)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, TOKENS)


ROLLOUTS: dict[str, Callable[[], PPO]] = {
    "policy and reference cached": lambda: make(LMActorCriticPolicy, EpisodeRolloutBuffer),
    "policy uncached": lambda: make(Uncached, EpisodeRolloutBuffer),
    "policy cached, reference deferred": lambda: make(
        LMActorCriticPolicy, EpisodeRolloutBuffer, reference_backend="deferred"
    ),
}
UPDATES: dict[str, Callable[[], PPO]] = {
    "whole episodes": lambda: make(LMActorCriticPolicy, EpisodeRolloutBuffer),
    "token rows": lambda: make(LMActorCriticPolicy, DictRolloutBuffer),
}


def compare(contestants: dict[str, Callable[[], PPO]], work: Callable[[PPO], None], rounds: int, title: str) -> None:
    def cost(model: PPO) -> float:
        if work is not rollout:
            rollout(model)
        else:
            model.policy.forget_contexts()  # type: ignore[operator]  # as the update between two rollouts does
        return seconds(lambda: work(model))()

    models = {name: contestant() for name, contestant in contestants.items()}
    found = take_turns({name: lambda model=model: cost(model) for name, model in models.items()}, rounds)
    table(title, "seconds", "tokens per second", "time")
    for name, (middle, ratio) in found.items():
        row(name, f"{middle:.3f}", f"{ENVS * TOKENS / middle:,.0f}", f"{ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    begin()
    compare(ROLLOUTS, rollout, rounds, f"rollout of {ENVS} × {TOKENS} tokens")
    compare(UPDATES, lambda model: model.train(), rounds, "update of one epoch, in 4 minibatches")


if __name__ == "__main__":
    main()
