"""What an agent's update is: on average, by listing all that it might have been given, or written out in loops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlhf_env.functional import gather_logp, token_rewards
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.training.collect import collect
from rlhf_env.types import Rollout
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.agents.pairs import listed
from tests.builders import make_envs, random_model

STILL: dict[str, Any] = {"learning_rate": 0.0, "max_grad_norm": math.inf}  # gradients to read, weights that stay


def moved(world: EnumerableWorld, seed: int = 0) -> Any:
    """A policy away from the reference, where the KL term's gradient would vanish."""
    policy = world.policy()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
    return policy


def every_response(world: EnumerableWorld, policy: Any, *, kl_mode: str = "reward") -> tuple[Rollout, Tensor]:
    """Every response of the world once, as `collect` gives it for this policy, and its probability [N]."""
    rollout = listed(world)
    with torch.no_grad():
        logp = gather_logp(policy.response_log_probs(rollout)[0], rollout.response_ids)
    charged = logp if kl_mode == "reward" else torch.zeros_like(logp)
    reward = token_rewards(world.gold, charged, rollout.ref_logp, rollout.response_mask, world.beta)
    values = torch.zeros_like(logp)
    return dataclasses.replace(rollout, logp=logp, reward=reward, values=values), logp.sum(1).exp()


def copies(probability: Tensor, total: int) -> list[int]:
    """Row numbers, each as often as `total` times its probability: what a very large batch looks like."""
    exact = probability * total
    counts = exact.floor().long()
    rest = (exact - counts).argsort(descending=True)[: total - int(counts.sum())]
    counts[rest] += 1
    return torch.arange(len(probability)).repeat_interleave(counts).tolist()


def mean_gradient(agent: Any, cases: Iterable[tuple[tuple[Rollout, ...], float]]) -> Tensor:
    """What `update` adds to the weights' gradient, over cases (rollouts, probability); against descent, one vector."""
    parameters = [p for p in agent.policy.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for rollouts, probability in cases:
        agent.update(*rollouts)
        total -= probability * flat([p.grad for p in parameters], parameters)
    return total


def flat(gradients: Iterable[Tensor | None], parameters: Iterable[Tensor]) -> Tensor:
    """All gradients as one vector, zeros where there is none."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).double()


def gradient_of(objective: Tensor, policy: Any) -> Tensor:
    """What autograd says of an objective written out, as one vector."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return flat(torch.autograd.grad(objective, parameters, allow_unused=True, retain_graph=True), parameters)


def cosine(a: Tensor, b: Tensor) -> float:
    """1 where two gradients point the same way."""
    return float(torch.cosine_similarity(a, b, dim=0))


# --- written out ------------------------------------------------------------------------------------


def float64_policy(seed: int = 1) -> CausalLM:
    """A random model whose values are not 0."""
    policy = random_model(dtype="float64", seed=seed)
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
    return policy


def sampled(episodes: int = 6, group_size: int = 1, **kwargs: Any) -> Rollout:
    """Episodes of `float64_policy` of unequal lengths, at a temperature; each has its row number as its score."""
    envs = make_envs(3, reference=random_model(dtype="float64"), temperature=0.8, **kwargs)
    rollout = collect(float64_policy(), envs, episodes=episodes, seed=3, group_size=group_size)
    assert len(rollout.lengths.unique()) > 1
    return dataclasses.replace(rollout, score=torch.arange(float(episodes), dtype=torch.float64))


def read(policy: CausalLM, rollout: Rollout) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Log-probability, entropy and value at each token of each response: row by row, with no code of ours."""
    rows = []
    for i, n in enumerate(rollout.lengths.tolist()):
        prompt, response = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist(), rollout.response_ids[i, :n]
        output = policy.model(torch.tensor([[*prompt, *response.tolist()]]), output_hidden_states=True)  # type: ignore[operator]
        log_probs = (output.logits[0, len(prompt) - 1 : -1] / rollout.law.temperature).log_softmax(-1)
        head = policy.value_head
        values = output.hidden_states[-1][0, len(prompt) - 1 : -1] @ head.weight[0] + head.bias
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        rows.append((log_probs[range(n), response], entropy, values))
    return rows


def returns_to_go(rewards: list[float]) -> list[float]:
    """What is still to come at each token, its own reward included."""
    return [sum(rewards[t:]) for t in range(len(rewards))]


def assert_gradient_is_that_of(loss: Tensor, policy: CausalLM, updated: Any, tolerance: float = 1e-9) -> None:
    """Whether an update at learning rate 0 left the gradient that autograd gives of a `loss` written out."""
    wanted = gradient_of(loss, policy)
    assert wanted.norm() > 1e-3
    found = flat([p.grad for p in updated.parameters()], list(updated.parameters()))
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-7)
