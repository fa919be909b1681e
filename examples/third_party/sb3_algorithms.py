"""Algorithms of Stable-Baselines3 and sb3-contrib, unmodified, with a small GRU that starts from random weights.

    python examples/third_party/sb3_algorithms.py PPO --seed 0

Actor-critics learn the whole objective: `attach_sb3` tells the environment log π. Q-learners are deterministic policies
with log π = 0, for which `kl_mode="reference"`, the reward + β log ref, is exact.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import world
from sb3_contrib import QRDQN, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from torch import Tensor

from rlhf_env.agents.sb3 import GRUExtractor, SB3VecEnv, attach_sb3

NUM_ENVS = 64
STEPS = 16  # tokens per environment and update
SMALL = {"features_extractor_class": GRUExtractor, "net_arch": [64]}


def falling(rate: float) -> Any:
    return lambda remaining: rate * remaining


ON_POLICY: dict[str, Any] = {"gamma": 1.0, "gae_lambda": 1.0, "device": "cpu"}
PPO_LIKE = {**ON_POLICY, "n_steps": STEPS, "batch_size": 256, "n_epochs": 4, "learning_rate": falling(3e-3)}
OFF_POLICY: dict[str, Any] = {
    **{"gamma": 1.0, "device": "cpu", "learning_rate": falling(1e-3), "buffer_size": 60_000, "learning_starts": 2_000},
    **{"batch_size": 128, "train_freq": 1, "gradient_steps": 1, "target_update_interval": 1_000},
    **{"exploration_fraction": 0.5, "exploration_final_eps": 0.05},
}


def actor_critic(algorithm: Any, settings: dict[str, Any], seed: int, steps: int) -> world.Learned:
    envs = SB3VecEnv(world.make_vec(seed, NUM_ENVS))
    recurrent = algorithm is RecurrentPPO
    kwargs = {**SMALL, "lstm_hidden_size": 64} if recurrent else SMALL
    policy = "MultiInputLstmPolicy" if recurrent else "MultiInputPolicy"
    model = algorithm(policy, envs, seed=seed, policy_kwargs=kwargs, **settings)
    attach_sb3(model)
    model.learn(steps)
    return partial(through_lstm if recurrent else next_token, model.policy)


def q_learner(algorithm: Any, settings: dict[str, Any], seed: int, steps: int) -> world.Learned:
    envs = SB3VecEnv(world.make_vec(seed, 16, kl_mode="reference"))
    kwargs = {**SMALL, "n_quantiles": 32} if algorithm is QRDQN else SMALL
    model = algorithm("MultiInputPolicy", envs, seed=seed, policy_kwargs=kwargs, **settings)
    model.learn(steps)

    def learned(states: world.Observation) -> Tensor:
        return world.always(model.predict(dict(states), deterministic=True)[0])

    return learned


def next_token(policy: Any, states: world.Observation) -> Tensor:
    policy.set_training_mode(False)
    return policy.get_distribution(policy.obs_to_tensor(dict(states))[0]).distribution.logits


def through_lstm(policy: Any, states: world.Observation) -> Tensor:
    """The same for a policy with a memory, which is walked down the tree of states level by level."""
    policy.set_training_mode(False)
    width, first, levels = world.VOCAB_SIZE, 0, []
    memory = torch.zeros(policy.lstm_hidden_state_shape)[:, :1], torch.zeros(policy.lstm_hidden_state_shape)[:, :1]
    for level in range(world.LENGTH):
        rows = slice(first, first + width**level)
        first += width**level
        observation = policy.obs_to_tensor({name: part[rows] for name, part in states.items()})[0]
        begins = torch.full((width**level,), float(level == 0))
        distribution, memory = policy.get_distribution(observation, memory, begins)
        levels.append(distribution.distribution.logits)
        memory = tuple(part.repeat_interleave(width, 1) for part in memory)  # every state has V children
    return torch.cat(levels)


ALGORITHMS: dict[str, world.Train] = {
    "PPO": partial(actor_critic, PPO, PPO_LIKE),
    "A2C": partial(actor_critic, A2C, {**ON_POLICY, "n_steps": 4, "learning_rate": falling(3e-3)}),
    "TRPO": partial(actor_critic, TRPO, {**ON_POLICY, "n_steps": STEPS, "batch_size": 256}),
    "MaskablePPO": partial(actor_critic, MaskablePPO, PPO_LIKE),
    "RecurrentPPO": partial(actor_critic, RecurrentPPO, PPO_LIKE),
    "DQN": partial(q_learner, DQN, OFF_POLICY),
    "QR-DQN": partial(q_learner, QRDQN, OFF_POLICY),
}


if __name__ == "__main__":
    world.main(ALGORITHMS)
