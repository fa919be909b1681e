"""PPO in one file, in the manner of CleanRL, on a batched text-generation environment.

    python examples/third_party/cleanrl_ppo.py --seed 0

What RLHF adds to CleanRL's `ppo.py` is one line, `push_logprobs`: the environment's KL term needs log π of each action.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import rlhf_env


@dataclass(frozen=True)
class Args:
    num_envs: int = 64  #: responses written side by side
    num_steps: int = 16  #: tokens per environment and update
    learning_rate: float = 3e-3  #: of Adam at the beginning; it falls linearly to 0
    gamma: float = 1.0  #: a token's reward counts the same at every distance: anything else is another objective
    gae_lambda: float = 1.0  #: 1 = the return minus the value; episodes are short
    num_minibatches: int = 4  #: per epoch
    update_epochs: int = 4  #: passes over each rollout
    clip_coef: float = 0.2  #: how far the ratio may leave 1
    vf_coef: float = 0.5  #: weight of the value loss
    max_grad_norm: float = 0.5  #: the gradient is scaled down to this


class Agent(nn.Module):
    def __init__(self, vocab_size: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.vocab_size = vocab_size

        def layers(outputs: int, std: float) -> nn.Sequential:
            sizes, gains = (length * vocab_size, width, width, outputs), (2**0.5, 2**0.5, std)
            linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
            for layer, gain in zip(linear, gains, strict=True):
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
            return nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2])

        self.actor, self.critic = layers(vocab_size, 0.01), layers(1, 1.0)

    def forward(self, obs: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, their log-probabilities and the values, [N] each, in states `obs`."""
        x = nn.functional.one_hot(obs + 1, self.vocab_size + 1)[..., 1:].flatten(1).float()  # −1 = not written yet
        probs = Categorical(logits=self.actor(x))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), self.critic(x).squeeze(-1)


def tokens(observation: dict[str, np.ndarray]) -> Tensor:
    """Prompt and response so far, [N, L], −1 behind them."""
    return torch.as_tensor(np.where(observation["attention_mask"] == 1, observation["input_ids"], -1))


def train(envs: gym.vector.VectorEnv, args: Args, *, total_tokens: int, seed: int) -> Agent:
    torch.manual_seed(seed)
    space = envs.single_observation_space["input_ids"]  # type: ignore[index]
    agent = Agent(int(envs.single_action_space.n), space.shape[0])  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    steps, n = args.num_steps, args.num_envs
    obs = torch.zeros((steps, n, *space.shape), dtype=torch.int64)
    actions = torch.zeros((steps, n), dtype=torch.int64)
    logprobs, rewards, dones, values = (torch.zeros((steps, n)) for _ in range(4))
    updates = max(1, total_tokens // (steps * n))

    next_obs = tokens(envs.reset(seed=seed)[0])
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / updates)
        for t in range(steps):
            obs[t] = next_obs
            with torch.no_grad():
                actions[t], logprobs[t], values[t] = agent(next_obs)
            rlhf_env.push_logprobs(envs, logprobs[t], actions[t])  # from here the KL is this policy's
            observation, reward, terminated, truncated, _ = envs.step(actions[t].numpy())
            rewards[t] = torch.as_tensor(reward)
            dones[t] = torch.as_tensor(terminated | truncated).float()  # the environment has already begun the next
            next_obs = tokens(observation)

        with torch.no_grad():
            following, advantage, advantages = agent(next_obs)[2], torch.zeros(n), torch.zeros_like(rewards)
            for t in reversed(range(steps)):
                delta = rewards[t] + args.gamma * following * (1 - dones[t]) - values[t]
                advantage = delta + args.gamma * args.gae_lambda * (1 - dones[t]) * advantage
                advantages[t], following = advantage, values[t]
            returns = advantages + values

        flat = [x.flatten(0, 1) for x in (obs, actions, logprobs, advantages, returns)]
        for _ in range(args.update_epochs):
            for rows in torch.randperm(steps * n).chunk(args.num_minibatches):
                b_obs, b_actions, b_logprobs, b_advantages, b_returns = (x[rows] for x in flat)
                _, logprob, value = agent(b_obs, b_actions)
                ratio = (logprob - b_logprobs).exp()
                b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = -torch.min(b_advantages * ratio, b_advantages * clipped).mean()
                v_loss = 0.5 * (value - b_returns).square().mean()
                optimizer.zero_grad()
                (pg_loss + args.vf_coef * v_loss).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
    return agent


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import world

    def cleanrl(seed: int, steps: int) -> world.Learned:
        args = Args()
        agent = train(world.make_vec(seed, args.num_envs), args, total_tokens=steps, seed=seed)
        return lambda states: agent.actor(world.features(states)).log_softmax(-1)

    world.main({"CleanRL-style PPO": cleanrl})
