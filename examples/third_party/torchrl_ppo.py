"""PPO of TorchRL, unmodified: `GymWrapper` around the batched environment, its collector, GAE and clipped loss.

    python examples/third_party/torchrl_ppo.py --seed 0

TorchRL's policies are modules over TensorDicts; the environment asks this one for log π: `bind_policy`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
import world
from gymnasium.vector import AutoresetMode
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import rlhf_env

NUM_ENVS = 64
BATCH, MINIBATCH, EPOCHS = 1024, 256, 4
KEYS = ["input_ids", "attention_mask"]


class Reads(nn.Module):
    """A small network over an observation's letters."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net = world.network(outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch = input_ids.shape[:-1]  # [N] from the environment, [N, T] in GAE
        observation = {"input_ids": input_ids.flatten(0, -2), "attention_mask": attention_mask.flatten(0, -2)}
        return self.net(world.features(observation)).unflatten(0, batch)


def ppo(seed: int, steps: int) -> world.Learned:
    envs = world.make_vec(seed, NUM_ENVS, autoreset_mode=AutoresetMode.DISABLED)  # TorchRL resets by mask
    network = Reads(world.VOCAB_SIZE)

    def log_pi(observation: world.Observation, actions: Any) -> Tensor:
        with torch.no_grad():
            logits = network(*(torch.as_tensor(observation[key]) for key in KEYS))
            return logits.log_softmax(-1).gather(-1, torch.as_tensor(actions)[:, None]).squeeze(-1)

    rlhf_env.bind_policy(envs, log_pi)
    env = GymWrapper(envs, categorical_action_encoding=True)
    env.set_seed(seed)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(network, in_keys=KEYS, out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["action"], distribution_class=Categorical, return_log_prob=True
        ),
    )
    critic = ValueOperator(Reads(1), in_keys=KEYS)
    advantage = GAE(gamma=1.0, lmbda=1.0, value_network=critic)
    loss_module = ClipPPOLoss(actor, critic, entropy_coeff=0.0, critic_coeff=0.5, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=3e-3, eps=1e-5)
    updates = max(1, steps // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / updates)
    for data in Collector(env, actor, frames_per_batch=BATCH, total_frames=updates * BATCH):
        with torch.no_grad():
            advantage(data)
        flat = data.reshape(-1)
        for _ in range(EPOCHS):
            for rows in torch.randperm(BATCH).split(MINIBATCH):
                losses = loss_module(flat[rows])
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss_module.parameters(), 0.5)
                optimizer.step()
        schedule.step()
    return lambda states: network(*(torch.as_tensor(states[key]) for key in KEYS)).log_softmax(-1)


if __name__ == "__main__":
    world.main({"TorchRL PPO": ppo})
