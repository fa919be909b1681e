"""Does it pay to try more? Entropy bonus and temperature schedule, with rewards that are easy and hard to find.

    python examples/exploration.py                         # the table of docs/agents/exploration.rst: half an hour
    python examples/exploration.py --worlds 0 --tokens 20000

Ten enumerable worlds (V = 6, T = 4: 1,296 responses) with their own smooth gold, and the same ten with a needle: gold
is 0 but for one response, which the reference writes about once in 1,000 or 100,000 times, and so high there that π*
writes it with probability 0.88. The bonus ends at 0 and the temperature at 1, so that in the end all seek the same π*.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import torch

from rlhf_env import TextGenerationVectorEnv, train
from rlhf_env.intervals import mean_interval
from rlhf_env.training.agents import agent_class, agent_config
from rlhf_env.worlds.enumerable import EnumerableWorld

PPO = {"batch_size": 256, "epochs": 1, "value_coef": 0.5, "final_entropy_coef": 0.0}
SOFT_Q = {"batch_size": 256, "epochs": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"ppo, entropy_coef {c:g} → 0": ("ppo", {**PPO, "entropy_coef": c}) for c in (0.0, 0.02, 0.2)},
    **{f"soft_q, explore {x:g} → 1": ("soft_q", {**SOFT_Q, "explore": x}) for x in (1.0, 1.5, 2.0)},
}
GOLDS = {"smooth": None, "needle, 1 in 1,000": 1e-3, "needle, 1 in 100,000": 1e-5}


def needle(world: EnumerableWorld, chance: float) -> EnumerableWorld:
    """The world with gold on one response only, that of the reference's probability nearest `chance`."""
    row = int((world.ref_log_probs - math.log(chance)).abs().argmin())
    gold = torch.zeros_like(world.gold)
    gold[row] = world.beta * (2.0 - float(world.ref_log_probs[row]))  # π*'s odds for it are about e²
    return dataclasses.replace(world, gold=gold)


def gain(world: EnumerableWorld, variant: str, tokens: int) -> float:
    """The share of π*'s gain that is left at the end of the budget."""
    name, settings = VARIANTS[variant]
    cls = agent_class(name)
    agent = cls(world.policy(), agent_config(cls, {"learning_rate": 1e-3, **settings}), seed=world.seed)
    keywords: dict[str, Any] = {**world.env_kwargs(), "kl_mode": getattr(cls, "kl_mode", "reward")}
    for _ in train(agent, TextGenerationVectorEnv(256, **keywords), tokens=tokens, seed=world.seed):
        pass
    return world.gain(agent.policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(range(10)), help="seeds of worlds and agents")
    parser.add_argument("--tokens", type=int, default=100_000, help="of each run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| gold | agent | gain | within half of it | difference to the first row, within a world |\n" + "|---" * 5 + "|"
    )
    for kind, chance in GOLDS.items():
        made = [EnumerableWorld.make(seed, vocab_size=6, length=4) for seed in args.worlds]
        worlds = made if chance is None else [needle(world, chance) for world in made]
        plain: dict[str, list[float]] = {}
        for variant, (name, _) in VARIANTS.items():
            found = [gain(world, variant, args.tokens) for world in worlds]
            more = [a - b for a, b in zip(found, plain.setdefault(name, found), strict=True)]
            far = sum(x >= 0.5 for x in found)
            print(f"| {kind} | {variant} | {shown(found)} | {far} of {len(found)} | {shown(more)} |", flush=True)


def shown(values: list[float]) -> str:
    m = mean_interval("x", values)
    certain = m.get("x_low", 0) >= m.get("x_high", 0)  # one world, or all alike
    return f"{m['x']:.1%}" + ("" if certain else f" [{m['x_low']:.1%}, {m['x_high']:.1%}]")


if __name__ == "__main__":
    main()
