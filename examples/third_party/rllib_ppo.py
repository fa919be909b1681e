"""PPO of RLlib, unmodified: its new API stack with the batched environment in this process.

    python examples/third_party/rllib_ppo.py --seed 0

RLlib calls back when it has made its environments, and there they are told whom to ask for log π: `bind_policy`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
import world
from gymnasium.vector import AutoresetMode
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.tune.registry import register_env

import rlhf_env

NUM_ENVS = 64
BATCH = 1024  # tokens per update


class Small(TorchRLModule, ValueFunctionAPI):
    """RLlib's kind of policy: action logits and values from the letters so far."""

    def setup(self) -> None:
        self.actor, self.critic = world.network(world.VOCAB_SIZE), world.network(1)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.actor(world.features(batch[Columns.OBS]))}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        return self.critic(world.features(batch[Columns.OBS])).squeeze(-1)


def bind(*, env_runner: Any, env: Any, **_: Any) -> None:
    """RLlib has made its environments: their KL is that of the policy which the runner then has."""

    def log_pi(observation: world.Observation, actions: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return next_token(env_runner.module, observation).gather(-1, torch.as_tensor(actions)[:, None]).squeeze(-1)

    rlhf_env.bind_policy(env, log_pi)


def next_token(module: Any, observation: world.Observation) -> torch.Tensor:
    output = module.forward_inference({Columns.OBS: observation})
    return output[Columns.ACTION_DIST_INPUTS].log_softmax(-1)


def ppo(seed: int, steps: int) -> world.Learned:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    register_env(
        "enumerable",
        lambda context: world.make_vec(seed, context["num_envs"], autoreset_mode=AutoresetMode.NEXT_STEP),
    )
    updates = max(1, steps // BATCH)
    config = (
        PPOConfig()
        .environment("enumerable")
        .env_runners(
            num_env_runners=0,  # in this process, where the policy can be asked
            num_envs_per_env_runner=NUM_ENVS,
            gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
            rollout_fragment_length=BATCH // NUM_ENVS,
        )
        .learners(num_learners=0)
        .callbacks(on_environment_created=bind)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=Small))
        .training(
            gamma=1.0,
            lambda_=1.0,
            lr=[[0, 3e-3], [updates * BATCH, 0.0]],
            train_batch_size_per_learner=BATCH,
            minibatch_size=256,
            num_epochs=4,
            clip_param=0.2,
            vf_loss_coeff=0.5,
            vf_clip_param=float("inf"),
            use_kl_loss=False,
            entropy_coeff=0.0,
            grad_clip=0.5,
        )
        .debugging(seed=seed, log_level="ERROR")
    )
    algorithm = config.build_algo()
    for _ in range(updates):
        algorithm.train()
    module = algorithm.get_module()
    algorithm.stop()
    ray.shutdown()
    return lambda states: next_token(module, states)


if __name__ == "__main__":
    world.main({"RLlib PPO": ppo})
