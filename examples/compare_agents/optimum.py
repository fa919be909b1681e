"""Every agent beside the exact optimum: what share of π*'s gain does each reach, at equal tokens?

    python examples/compare_agents/optimum.py --out runs/optimum --jobs 2     # the table of docs/agents/compared.rst
    python examples/compare_agents/optimum.py --out runs/few --agents ppo rloo --worlds 0 1 --tokens 20000

Each seed is a world of its own (V = 6, T = 4: 1,296 responses), of which reference, gold and the agent's randomness are
made. Gain: 0 is the reference, 1 is π* ∝ ref·exp(gold/β), both evaluated by listing all responses. Agents that learn
from data get as many of the reference's responses as the others sample: in pairs with Bradley–Terry labels of their
gold, or with gold itself. All have the same learning rate, and none was tuned on these worlds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import AGENTS, Row, plot_beside_ppo, print_table, run_all

from rlhf_env import TextGenerationVectorEnv, collect, train
from rlhf_env.agents import NLPOConfig
from rlhf_env.training.agents import agent_class, agent_config
from rlhf_env.types import Pairs, Rollout
from rlhf_env.worlds.enumerable import EnumerableWorld

BEST_OF = 8  # near the best n for β = ½
VARIANTS = ("grpo (k3 unscaled)", "grpo (k2 unscaled)")  # what is it that moves the published form?

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"batch_size": 256, "epochs": 1, "value_coef": 0.5},
    "a2c": {"batch_size": 64},
    "reinforce": {"batch_size": 64},
    "rloo": {"batch_size": 64, "group_size": 4},
    "grpo": {"batch_size": 256, "group_size": 8, "minibatches": 4},
    "grpo (published)": {"batch_size": 256, "group_size": 8, "minibatches": 4, "kl": "k3"},
    **{
        f"grpo ({kl} unscaled)": {"batch_size": 256, "group_size": 8, "minibatches": 4, "kl": kl, "scale": False}
        for kl in ("k3", "k2")
    },
    "remax": {"batch_size": 64},
    "nlpo": {"batch_size": 256, "epochs": 1, "value_coef": 0.5},
    "rejection_sampling": {"batch_size": 256, "group_size": 4},
    "bon_distillation": {"batch_size": 64, "n": BEST_OF, "draws": 2 * BEST_OF},
    "dpo": {"batch_size": 128},
    "ipo": {"batch_size": 128},
    "kto": {"batch_size": 128},
    "online_dpo": {"batch_size": 256, "minibatches": 4},
    "ilql": {"batch_size": 256, "epochs": 4, "perturbation": 2.0},  # 1/β
    "soft_q": {"batch_size": 256, "epochs": 1},
}


def run(tokens: int, agent: str, seed: int) -> Row:
    """One agent in one world: its gain, where it is, and its curve of gain over the part of the budget that is used."""
    world = make_world(seed)
    began = time.perf_counter()
    if agent == "best_of_n":  # known without sampling
        return {**place(world, world.best_of_n(BEST_OF)), "seconds": time.perf_counter() - began}
    name, settings = agent.partition(" ")[0], dict(SETTINGS[agent])
    if name in ("dpo", "ipo", "kto"):
        settings["beta"] = world.beta / 4 if name == "ipo" else world.beta  # IPO's d is (p − ½)/β: the slope of DPO's
    cls = agent_class(name)
    config = agent_config(cls, {"learning_rate": 1e-3, **settings})
    learner = cls(world.policy(), config, seed=seed)
    keywords: dict[str, Any] = {**world.env_kwargs(), "kl_mode": getattr(cls, "kl_mode", "reward")}
    envs = TextGenerationVectorEnv(256, **keywords)
    if hasattr(learner, "fit"):
        log = logged(world, tokens // (2 * world.length) * 2, seed)  # an even number, for pairs
        data = log if name == "ilql" else compared(log, seed)
        per_epoch = -(-len(data) // config.batch_size)
        rows = ((i / (per_epoch * config.epochs), r) for i, r in enumerate(learner.fit(data), 1))
    else:
        rows = ((r["tokens"] / tokens, r) for r in train(learner, envs, tokens=tokens, seed=seed))
    curve, due = [(0.0, 0.0)], 0.05
    for used, _ in rows:
        if used >= due:
            curve.append((used, world.gain(learner.policy)))
            due = used + 0.05
    with torch.no_grad():
        log_probs = world.sequence_log_probs(learner.policy)
    return {**place(world, log_probs), "curve": curve, "seconds": time.perf_counter() - began}


def make_world(seed: int) -> EnumerableWorld:
    return EnumerableWorld.make(seed, vocab_size=6, length=4)


def place(world: EnumerableWorld, log_probs: torch.Tensor) -> Row:
    """Gain, gold and KL; the gold of the optimum of the same KL; and KL(policy ‖ best of n)."""
    kl, gold = float(world.kl(log_probs)), float(world.expected_gold(log_probs))
    kls, golds = (x.flip(0).numpy() for x in world.frontier([world.beta * 1.03**k for k in range(-120, 200)]))
    best = float(np.interp(kl, kls, golds))
    known = (log_probs.exp() * (log_probs - world.best_of_n(BEST_OF))).nan_to_num(0.0)
    return {
        "gain": world.gain(log_probs),
        "gold": gold,
        "kl": kl,
        "of_frontier": gold / best,
        "to_bon": float(known.sum()),
    }


def bound(world: EnumerableWorld, agent: str) -> float | None:
    """The gain of what an agent aims at, where that is not π*: best of n, or the optimum within NLPO's first mask."""
    if agent in ("best_of_n", "bon_distillation"):
        return world.gain(world.best_of_n(BEST_OF))
    if agent != "nlpo":
        return None
    responses = Rollout.of_tokens([[0]] * len(world.sequences), world.sequences.tolist(), world.law)
    log_probs = world.reference.response_log_probs(responses)[0]
    nucleus = replace(world.law, top_p=NLPOConfig().mask_top_p).candidates(log_probs)  # [N, T, V]
    inside = (nucleus == world.sequences.unsqueeze(-1)).any(-1).all(1)
    optimum = world.optimal_log_probs().masked_fill(~inside, -torch.inf)
    return world.gain(optimum.log_softmax(0))


def logged(world: EnumerableWorld, episodes: int, seed: int) -> Rollout:
    """Responses of the reference with gold as their reward, which holds no KL."""
    keywords: dict[str, Any] = {**world.env_kwargs(), "kl_mode": "observe"}
    envs = TextGenerationVectorEnv(1024, **keywords)
    return collect(world.reference, envs, episodes=episodes, seed=seed + 1_000)


def compared(log: Rollout, seed: int) -> Pairs:
    """Responses two by two, the first preferred with probability σ(gold difference)."""
    first, second = log[0::2], log[1::2]
    chance = torch.sigmoid(first.score - second.score)
    drawn = torch.rand(len(chance), generator=torch.Generator().manual_seed(seed)) < chance
    return Pairs(*(replace(half, ref_logp=half.logp) for half in (first, second)), preference=drawn.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--agents", nargs="+", default=AGENTS + VARIANTS, choices=AGENTS + VARIANTS)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(range(10)), help="seeds of worlds and agents")
    parser.add_argument("--tokens", type=int, default=200_000, help="that each run samples, or has data of")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = run_all(partial(run, args.tokens), args.agents, args.worlds, args.out, args.jobs)
    for agent, found in rows.items():
        for row in found:
            row["bound"] = bound(make_world(row["seed"]), agent)
    columns = [
        ("gain", "gain", ".1%"),
        ("bound", "gain of what it aims at", ".1%"),
        ("gold", "gold", ".3f"),
        ("kl", "KL, nats", ".3f"),
    ]
    columns += [("of_frontier", "gold, of the frontier's at this KL", ".1%"), ("seconds", "seconds", ".0f")]
    print_table(rows, columns)
    if "bon_distillation" in rows:
        names = ("best_of_n", "bon_distillation")
        print(f"\nKL to the distribution of best of {BEST_OF}, nats:\n")
        print_table({name: rows[name] for name in names if name in rows}, [("to_bon", "KL", ".3f")])
    labels = ("part of the budget used", "share of the optimum's gain")
    plot_beside_ppo(rows, args.out / "optimum.png", labels=labels, limits=(0.0, 1.02))


if __name__ == "__main__":
    main()
