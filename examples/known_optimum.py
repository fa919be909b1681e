"""How near do PPO, ours and Stable-Baselines3's, come to the exact optimum? In the enumerable world that is a number.

    python examples/known_optimum.py                               # one world, a smaller budget: about a minute
    python examples/known_optimum.py --worlds 0 1 2 3 4 --updates 1500     # the table of docs/results.rst
    python examples/known_optimum.py --plot optimum.png                    # and our PPO's way below the exact frontier

Gain: 0 is the reference, 1 is π* ∝ π_ref exp(gold/β), both evaluated by listing all 32,768 responses.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from stable_baselines3 import PPO as SB3PPO

from rlhf_env import TextGenerationVectorEnv, train
from rlhf_env.agents.ppo import PPO, PPOConfig
from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.types import Policy
from rlhf_env.worlds.enumerable import EnumerableWorld, best_of_n_log_probs

BATCH = 256  # episodes per update, for both


def ours(world: EnumerableWorld, updates: int, path: list[tuple[float, float]]) -> Policy:
    policy = world.policy()
    envs = TextGenerationVectorEnv(BATCH, **world.env_kwargs())
    config = PPOConfig(learning_rate=1e-3, batch_size=BATCH, epochs=1, value_coef=0.5)
    for row in train(PPO(policy, config, seed=world.seed), envs, updates=updates, seed=world.seed):
        if row["update"] <= 20 or row["update"] % 20 == 0:
            path.append(place(world, world.sequence_log_probs(policy).detach()))
    return policy


def theirs(world: EnumerableWorld, updates: int) -> Policy:
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


def place(world: EnumerableWorld, log_probs: torch.Tensor) -> tuple[float, float]:
    return float(world.kl(log_probs)), float(world.expected_gold(log_probs))


def plot(world: EnumerableWorld, path: list[tuple[float, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    frontier = world.frontier([world.beta * 1.1**k for k in range(-14, 50)])
    axes.plot(*frontier, color="black", label="exact frontier: nothing can be above it")
    axes.plot(*zip((0.0, 0.0), *path, strict=True), "o-", markersize=3, color="C0", label="PPO on its way")
    best = [place(world, best_of_n_log_probs(world.ref_log_probs, world.gold, n)) for n in (4, 16, 64)]
    axes.plot(*zip(*best, strict=True), "^", color="C2", label="best of 4, 16, 64")
    optimum = place(world, world.optimal_log_probs())
    axes.plot(*optimum, "*", markersize=14, color="C1", label=f"optimum at β = {world.beta}")
    axes.set(xlabel="KL to the reference, nats per sequence", ylabel="gold")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0], help="seeds of the worlds, and of the agents")
    parser.add_argument("--updates", type=int, default=300, help=f"of {BATCH} episodes each")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a figure of our PPO in the first world (matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'world':>5}  {'agent':<7}{'gain':>8}{'gold':>8}{'KL':>8}   (optimum: gold, KL in nats)")
    for seed in arguments.worlds:
        world, path = EnumerableWorld.make(seed), []
        best_kl, best_gold = place(world, world.optimal_log_probs())
        for name, agent in {"ppo": partial(ours, path=path), "sb3:PPO": theirs}.items():
            log_probs = world.sequence_log_probs(agent(world, arguments.updates)).detach()
            kl, gold = place(world, log_probs)
            optimum = f"({best_gold:.3f}, {best_kl:.3f})"
            print(f"{seed:>5}  {name:<7}{world.gain(log_probs):>8.2%}{gold:>8.3f}{kl:>8.3f}   {optimum}", flush=True)
        if arguments.plot and seed == arguments.worlds[0]:
            plot(world, path, arguments.plot)


if __name__ == "__main__":
    main()
