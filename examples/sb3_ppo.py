"""Stable-Baselines3's PPO, unmodified, on text generation: a tiny model of random words learns to please VADER.

    python examples/sb3_ppo.py      # about 20 seconds

SB3 sees an ordinary VecEnv. The two classes it is given make it read a language model's states and evaluate whole
episodes at once, and `attach_sb3` tells the environment the log-probabilities that its KL term needs.
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import torch
from stable_baselines3 import PPO

from rlhf_env import evaluate
from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.safe_text import safe_text
from rlhf_env.worlds.text_generation import tiny_model

NUM_ENVS, TOKENS = 64, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=40, help=f"of {NUM_ENVS * TOKENS} tokens each")
    updates = parser.parse_args().updates
    torch.set_num_threads(1)

    envs = gym.make_vec("rlhf_env/TextGeneration-v0", num_envs=NUM_ENVS, max_new_tokens=TOKENS, beta=0.02)
    model = PPO(
        LMActorCriticPolicy,
        SB3VecEnv(envs),
        learning_rate=1e-3,
        n_steps=TOKENS,
        batch_size=NUM_ENVS * TOKENS // 4,
        n_epochs=4,
        gamma=1.0,
        seed=0,
        device="cpu",
        policy_kwargs={"model": lambda: tiny_model().frozen_copy().requires_grad_(True)},
        rollout_buffer_class=EpisodeRolloutBuffer,
    )
    attach_sb3(model)
    policy: CausalLM = model.policy.lm  # type: ignore[assignment]

    print(f"{'tokens':>8}  {'score':>20}  {'KL':>6}  {'distinct bigrams':>16}")
    for part in range(5):
        if part:
            model.learn(updates * NUM_ENVS * TOKENS // 4, reset_num_timesteps=False)
        found = evaluate(policy, envs, episodes=256)
        m = found.metrics
        score = f"{m['score']:.2f} [{m['score_low']:.2f}, {m['score_high']:.2f}]"
        print(f"{model.num_timesteps:>8}  {score:>20}  {m['kl']:>6.2f}  {m['distinct_2']:>16.2f}", flush=True)
    print()
    for sample in found.samples[:4]:
        print(safe_text(f"{sample['prompt']}|{sample['response']}  ({sample['score']:+.2f})"))


if __name__ == "__main__":
    main()
