"""PPO of Tianshou 2, unmodified: its policy, its collector, its trainer.

    python examples/third_party/tianshou_ppo.py --seed 0

Tianshou's own `DummyVectorEnv([lambda: gym.make(id), …])` works too, with `bind_policy` for each environment and a
wrapper that drops the infos; but it steps them one by one, where `Batched` asks the reference once for all of them.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
import world
from gymnasium.vector import AutoresetMode
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import ModuleWithVectorOutput
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

import rlhf_env

NUM_ENVS = 64
BATCH = 1024  # tokens per update


class Letters(ModuleWithVectorOutput):
    """Tianshou's "preprocessing network": an observation's letters, one-hot."""

    def __init__(self) -> None:
        super().__init__((1 + world.LENGTH) * world.VOCAB_SIZE)

    def forward(self, obs: Any, state: Any = None) -> tuple[torch.Tensor, Any]:
        return world.features(obs), state


class Batched:
    """The batched environment as Tianshou's collector takes it: EnvPool's interface, restarted by id.

    Infos stay here: Tianshou stores them, and refuses the steps that lack what only an episode's last step has.
    """

    is_async = False

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        self.envs, self.action_space = envs, envs.single_action_space

    def __len__(self) -> int:
        return self.envs.num_envs

    def reset(self, env_id: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        ids = np.arange(len(self)) if env_id is None else env_id
        mask = np.isin(np.arange(len(self)), ids)
        observation, _ = self.envs.reset(options={"reset_mask": mask}, **kwargs)
        return Batch(observation)[ids], np.array([{} for _ in ids])

    def step(self, actions: Any, ids: Any) -> tuple[Any, ...]:
        assert len(ids) == len(self)  # as it is where steps are collected, not episodes
        observation, reward, terminated, truncated, _ = self.envs.step(actions)
        return Batch(observation), reward, terminated, truncated, np.array([{} for _ in ids])


def ppo(seed: int, steps: int) -> world.Learned:
    envs = world.make_vec(seed, NUM_ENVS, autoreset_mode=AutoresetMode.DISABLED)
    space = envs.single_action_space
    assert isinstance(space, gym.spaces.Discrete)
    actor = DiscreteActor(
        preprocess_net=Letters(), action_shape=int(space.n), hidden_sizes=(64, 64), softmax_output=False
    )
    critic = DiscreteCritic(preprocess_net=Letters(), hidden_sizes=(64, 64))
    falling = LRSchedulerFactoryLinear(max_epochs=1, epoch_num_steps=steps, collection_step_num_env_steps=BATCH)
    algorithm = PPO(
        policy=DiscreteActorPolicy(
            actor=actor, action_space=space, observation_space=envs.single_observation_space, deterministic_eval=False
        ),
        critic=critic,
        optim=AdamOptimizerFactory(lr=3e-3).with_lr_scheduler_factory(falling),
        gamma=1.0,
        gae_lambda=1.0,
        ent_coef=0.0,
        max_grad_norm=0.5,
    )

    def log_pi(observation: world.Observation, actions: Any) -> torch.Tensor:
        with torch.no_grad():
            return actor(observation)[0].log_softmax(-1).gather(-1, torch.as_tensor(actions)[:, None]).squeeze(-1)

    rlhf_env.bind_policy(envs, log_pi)
    collector = Collector(algorithm, Batched(envs), VectorReplayBuffer(4 * BATCH, NUM_ENVS))  # type: ignore[arg-type]
    collector.reset(gym_reset_kwargs={"seed": seed})
    algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=steps,
            collection_step_num_env_steps=BATCH,
            update_step_num_repetitions=4,
            batch_size=256,
            verbose=False,
            show_progress=False,
        )
    )
    return lambda states: actor(states)[0].log_softmax(-1)


if __name__ == "__main__":
    world.main({"Tianshou PPO": ppo})
