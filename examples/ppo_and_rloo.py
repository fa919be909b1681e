"""PPO and RLOO side by side: the same task, the same tokens, and the exact optimum to hold both against.

    python examples/ppo_and_rloo.py      # less than a minute

Five worlds in which every response is listed. Gain: 0 is the reference, 1 the optimum π* ∝ ref·exp(gold/β).
"""

from __future__ import annotations

import argparse

import torch

from rlhf_env import TextGenerationVectorEnv, train
from rlhf_env.agents import PPO, RLOO, PPOConfig, RLOOConfig
from rlhf_env.intervals import mean_interval
from rlhf_env.worlds.enumerable import EnumerableWorld

AGENTS = {
    "PPO": lambda policy, seed: PPO(
        policy, PPOConfig(learning_rate=1e-3, batch_size=256, epochs=1, value_coef=0.5), seed=seed
    ),
    "RLOO": lambda policy, seed: RLOO(policy, RLOOConfig(learning_rate=1e-3, batch_size=64, group_size=4), seed=seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    gains: dict[str, list[float]] = {name: [] for name in AGENTS}
    print("world" + "".join(f"{name:>10}" for name in AGENTS))
    for seed in args.worlds:
        world = EnumerableWorld.make(seed, vocab_size=6, length=4)
        for name, make in AGENTS.items():
            policy = world.policy()
            envs = TextGenerationVectorEnv(256, **world.env_kwargs())
            for _ in train(make(policy, seed), envs, tokens=args.tokens, seed=seed):
                pass
            gains[name].append(world.gain(policy))
        print(f"{seed:>5}" + "".join(f"{gains[name][-1]:>10.2%}" for name in AGENTS), flush=True)
    difference = [b - a for a, b in zip(gains["PPO"], gains["RLOO"], strict=True)]
    m = mean_interval("x", difference)
    bounds = f" [{m['x_low']:+.2%}, {m['x_high']:+.2%}]" if "x_low" in m else ""
    print(f"\nRLOO − PPO, within a world: {m['x']:+.2%}{bounds}")


if __name__ == "__main__":
    main()
