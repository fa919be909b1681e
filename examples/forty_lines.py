"""REINFORCE with a learned baseline: all an algorithm needs to optimize a reward under a KL penalty."""

import sys

import gymnasium as gym
import torch
from torch import nn

import rlhf_env
from rlhf_env.worlds.enumerable import EnumerableWorld


class Network(nn.Module):
    def __init__(self, vocab_size, width=64):
        super().__init__()
        self.embed, self.gru = nn.Embedding(vocab_size, width), nn.GRU(width, width, batch_first=True)
        self.logits, self.value = nn.Linear(width, vocab_size), nn.Linear(width, 1)

    def forward(self, observation):
        ids, mask = (torch.as_tensor(observation[name]).long() for name in ("input_ids", "attention_mask"))
        state = self.gru(self.embed(ids))[0][torch.arange(len(ids)), mask.sum(1) - 1]  # after the last token so far
        return torch.distributions.Categorical(logits=self.logits(state)), self.value(state).squeeze(1)


torch.manual_seed(0)
envs = gym.make_vec("rlhf_env/Enumerable-v0", num_envs=256)
envs.reset(seed=0)
network = Network(envs.single_action_space.n)  # type: ignore[attr-defined]
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for update in range(int(sys.argv[1]) if sys.argv[1:] else 200):
    (observation, _), playing, steps = envs.reset(), torch.ones(envs.num_envs), []
    while playing.any():  # one episode in every row; what a row begins after its own does not count
        policy, value = network(observation)
        actions = policy.sample()
        rlhf_env.push_logprobs(envs, policy.log_prob(actions), actions)
        observation, reward, over, *_ = envs.step(actions.numpy())
        steps.append((policy.log_prob(actions), value, torch.from_numpy(reward).float() * playing, playing))
        playing = playing * torch.from_numpy(~over)
    logp, value, reward, mask = map(torch.stack, zip(*steps, strict=True))  # [T, N] each
    returns = reward.flip(0).cumsum(0).flip(0)  # from each token to the end: score − β·KL of what is still to come
    loss = (((returns - value) ** 2 - (returns - value).detach() * logp) * mask).sum() / mask.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if update % 20 == 0:
        print(f"update {update:>3}  objective {returns[0].mean():6.3f}", flush=True)
print(f"the optimum's     {EnumerableWorld.make(0).optimal_value():9.3f}")
