"""The small world that every algorithm of the comparison learns in, and the exact measure of what it learned.

V = 5 letters, T = 4: all 625 responses and all 156 states are listed, so gain, gold and KL are numbers without sampling
error. Run k is world k and seed k. Small networks read `features`; they start from random weights, not the reference.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

import rlhf_env  # noqa: F401  (registers the ids)
from rlhf_env.worlds.enumerable import EnumerableWorld

ENV_ID = "rlhf_env/Enumerable-v0"
VOCAB_SIZE, LENGTH = 5, 4
BETA = 0.25
TOKENS = 60_000  # steps of the environment, the same for all

Observation = Mapping[str, Any]
Learned = Callable[[Observation], Tensor]  #: all states [S, L] → log-probabilities [S, V]
Train = Callable[[int, int], Learned]  #: (seed, tokens) → what was learned


def env_kwargs(seed: int) -> dict[str, Any]:
    return {"world_seed": seed, "beta": BETA, "vocab_size": VOCAB_SIZE, "length": LENGTH}


def make_vec(seed: int, num_envs: int, **more: Any) -> gym.vector.VectorEnv:
    return gym.make_vec(ENV_ID, num_envs=num_envs, **env_kwargs(seed), **more)


def make_world(seed: int) -> EnumerableWorld:
    return EnumerableWorld.make(seed, VOCAB_SIZE, LENGTH, BETA)


def features(observation: Observation) -> Tensor:
    """The letters so far, one-hot at their positions: float32 [N, L·V], zero where nothing is written yet."""
    ids, mask = (torch.as_tensor(observation[key]) for key in ("input_ids", "attention_mask"))
    return (nn.functional.one_hot(ids.long(), VOCAB_SIZE) * mask.unsqueeze(-1)).flatten(1).float()


def network(outputs: int) -> nn.Sequential:
    """Two hidden layers over `features`; a small last layer, so that a policy begins nearly uniform."""
    inputs, width = (1 + LENGTH) * VOCAB_SIZE, 64
    net = nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    )
    nn.init.orthogonal_(net[-1].weight, 0.01)  # type: ignore[arg-type]
    nn.init.zeros_(net[-1].bias)  # type: ignore[arg-type]
    return net


def always(actions: Any) -> Tensor:
    """Log-probabilities [S, V] of the deterministic policy that takes `actions` [S]."""
    return nn.functional.one_hot(torch.as_tensor(actions), VOCAB_SIZE).double().log()


def measured(world: EnumerableWorld, log_probs: Tensor) -> dict[str, float]:
    """Gain, gold and KL of a policy, given as log-probabilities [N] of all responses: exact."""
    return {
        "gain": world.gain(log_probs),
        "gold": float(world.expected_gold(log_probs)),
        "kl": float(world.kl(log_probs)),
    }


def main(algorithms: Mapping[str, Train]) -> None:
    """Train one algorithm in one world and print the exact outcome as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("algorithm", choices=algorithms, nargs="?", default=next(iter(algorithms)))
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the algorithm")
    parser.add_argument("--steps", type=int, default=TOKENS, help="tokens to learn from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)  # noqa: NPY002  (some of the libraries draw from it)
    begin = time.perf_counter()
    learned = algorithms[arguments.algorithm](arguments.seed, arguments.steps)
    seconds = time.perf_counter() - begin
    world = make_world(arguments.seed)
    with torch.no_grad():
        log_probs = world.from_states(learned(world.observations()))
    row = {"algorithm": arguments.algorithm, "seed": arguments.seed, "tokens": arguments.steps, "seconds": seconds}
    print(json.dumps({**row, **measured(world, log_probs)}), flush=True)
