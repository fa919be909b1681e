"""Your own algorithm on the token MDP: REINFORCE in plain torch, for a network that is no language model at all.

    python examples/your_own_algorithm.py      # about half a minute

It sees observations, gives actions and says how probable they were; that is all the environment asks for. In the
enumerable world the result is exact: gain 0 is the reference, 1 the optimum π* ∝ π_ref exp(gold/β).
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

import rlhf_env
from rlhf_env.worlds.enumerable import EnumerableWorld


class Network(nn.Module):
    """Log-probabilities of the next token after every prefix."""

    def __init__(self, vocab_size: int, width: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(ids))[0]).log_softmax(-1)

    def act(self, observation: dict[str, Any]) -> tuple[Tensor, Tensor]:
        ids = torch.as_tensor(observation["input_ids"])
        here = torch.as_tensor(observation["attention_mask"]).long().sum(1) - 1  # the last token so far
        policy = torch.distributions.Categorical(logits=self(ids)[torch.arange(len(ids)), here])
        actions = policy.sample()
        return actions, policy.log_prob(actions)


def exact_gain(network: Network, world: EnumerableWorld) -> float:
    with torch.no_grad():
        before = torch.cat([torch.zeros_like(world.sequences[:, :1]), world.sequences[:, :-1]], 1)  # the prompt is id 0
        return world.gain(network(before).double().gather(-1, world.sequences.unsqueeze(-1)).sum((1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=600, help="of 256 episodes each")
    updates = parser.parse_args().updates
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = EnumerableWorld.make(0)
    envs = gym.make_vec("rlhf_env/Enumerable-v0", num_envs=256, world_seed=0)
    network = Network(world.vocab_size)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    observation, _ = envs.reset(seed=0)
    print(f"the optimum's return is {world.optimal_value():.3f}, the reference's 0\n\nupdate    return      gain")
    for update in range(updates + 1):
        logp, rewards = [], []
        for _ in range(world.length):  # all responses have this length, so all episodes end together
            actions, log_prob = network.act(observation)
            rlhf_env.push_logprobs(envs, log_prob, actions)
            observation, reward, *_ = envs.step(actions.numpy())
            logp.append(log_prob)
            rewards.append(torch.from_numpy(reward).float())
        returns = torch.stack(rewards).flip(0).cumsum(0).flip(0)  # [T, N], from each token to the end
        if update % max(1, updates // 10) == 0:
            print(f"{update:>6}  {returns[0].mean():>8.3f}  {exact_gain(network, world):>8.2%}", flush=True)
        loss = -(torch.stack(logp) * (returns - returns.mean(1, keepdim=True))).sum(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
