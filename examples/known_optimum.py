"""How near do PPO, ours and Stable-Baselines3's, come to the exact optimum? In the enumerable world that is a number.

    python examples/known_optimum.py                               # one world, a smaller budget: about a minute
    python examples/known_optimum.py --worlds 0 1 2 3 4 --updates 1500     # the table of the README

Gain: 0 is the reference, 1 is π* ∝ π_ref exp(gold/β), both evaluated by listing all 32,768 responses.
"""

from __future__ import annotations

import argparse

import torch
from stable_baselines3 import PPO as SB3PPO

from rlhf_env import TextGenerationVectorEnv, train
from rlhf_env.agents.ppo import PPO, PPOConfig
from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.worlds.enumerable import EnumerableWorld

BATCH = 256  # episodes per update, for both


def ours(world: EnumerableWorld, updates: int) -> CausalLM:
    policy = world.policy()
    envs = TextGenerationVectorEnv(BATCH, **world.env_kwargs())
    config = PPOConfig(learning_rate=1e-3, batch_size=BATCH, epochs=1, value_coef=0.5)
    for _ in train(PPO(policy, config, seed=world.seed), envs, updates=updates, seed=world.seed):
        pass
    return policy


def theirs(world: EnumerableWorld, updates: int) -> CausalLM:
    envs = SB3VecEnv(TextGenerationVectorEnv(BATCH, **world.env_kwargs()))
    model = SB3PPO(
        LMActorCriticPolicy,
        envs,
        learning_rate=lambda remaining: 1e-3 * remaining,
        n_steps=world.length,
        batch_size=BATCH * world.length // 4,
        n_epochs=1,
        gamma=1.0,
        seed=world.seed,
        device="cpu",
        policy_kwargs={"model": world.policy},
        rollout_buffer_class=EpisodeRolloutBuffer,
    )
    attach_sb3(model)
    model.learn(updates * BATCH * world.length)
    return model.policy.lm  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0], help="seeds of the worlds, and of the agents")
    parser.add_argument("--updates", type=int, default=300, help=f"of {BATCH} episodes each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'world':>5}  {'agent':<7}{'gain':>8}{'gold':>8}{'KL':>8}   (optimum: gold, KL in nats)")
    for seed in arguments.worlds:
        world = EnumerableWorld.make(seed)
        best = world.optimal_log_probs()
        for name, agent in {"ppo": ours, "sb3:PPO": theirs}.items():
            policy = agent(world, arguments.updates).requires_grad_(False)
            log_probs = world.sequence_log_probs(policy)
            gold, kl = float(world.expected_gold(log_probs)), float(world.kl(log_probs))
            optimum = f"({world.expected_gold(best):.3f}, {world.kl(best):.3f})"
            print(f"{seed:>5}  {name:<7}{world.gain(log_probs):>8.2%}{gold:>8.3f}{kl:>8.3f}   {optimum}", flush=True)


if __name__ == "__main__":
    main()
