"""Pairs of responses for the tests of those who learn from them, and a policy that can be any distribution."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_env.functional import entropy, gather_logp
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.types import Pairs, Rollout, SamplingLaw
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.builders import EOS, random_model

PROMPT_IDS = ([0, 1, 2], [3], [4, 5, 6, 7, 0, 1], [2, 0], [5, 5])
PREFERENCES = (1.0, 0.0, 0.5, 0.8, 0.0, 1.0, 0.3)


def make_pairs(dtype: str = "float64") -> Pairs:
    """Seven pairs of unequal lengths to five prompts, one of them a tie, two of them soft; the reference is model 0."""
    draw = torch.Generator().manual_seed(3)
    law = SamplingLaw(11, EOS, temperature=0.8, banned_tokens=(8, 10))
    prompts = [PROMPT_IDS[i % len(PROMPT_IDS)] for i in range(len(PREFERENCES))]
    reference = random_model(dtype=dtype)

    def responses() -> Rollout:
        lengths = torch.randint(1, 6, (len(prompts),), generator=draw).tolist()
        ids = [[*torch.randint(0, 8, (n - 1,), generator=draw).tolist(), EOS] for n in lengths]
        rollout = Rollout.of_tokens(prompts, ids, law)
        return dataclasses.replace(rollout, ref_logp=teacher_forced_logp(reference, rollout))

    return Pairs(responses(), responses(), torch.tensor(PREFERENCES, dtype=reference.dtype))


def poisoned(pairs: Pairs, poison: float) -> Pairs:
    """The same pairs, with `poison` and another token's id wherever nothing is."""

    def spoil(rollout: Rollout) -> Rollout:
        padding = ~rollout.response_mask
        assert padding.any()
        floats = {name: getattr(rollout, name).masked_fill(padding, poison) for name in ("logp", "ref_logp", "reward")}
        ids = rollout.response_ids.masked_fill(padding, 3)
        return dataclasses.replace(rollout, response_ids=ids, **floats)

    return Pairs(spoil(pairs.first), spoil(pairs.second), pairs.preference)


def swapped(pairs: Pairs) -> Pairs:
    """The same judgements, with the second responses first."""
    return Pairs(pairs.second, pairs.first, 1 - pairs.preference)


def gradient_of(agent: Any, pairs: Pairs, **fit: Any) -> list[Tensor]:
    """The gradient of the first step on all pairs, by an agent of learning rate 0 that clips nothing."""
    next(agent.fit(pairs, **fit))
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in agent.policy.parameters()]


def gradient(loss: Tensor, policy: Any) -> list[Tensor]:
    """What autograd says of a loss written out."""
    parameters = list(policy.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def written_log_prob(policy: CausalLM, prompt: list[int], response: list[int], law: SamplingLaw) -> Tensor:
    """log π(response | prompt) of one unpadded row, token by token, with none of our code but the model."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0]  # type: ignore[operator]
    logits[:, list(law.banned_tokens)] = -torch.inf
    log_probs = (logits / law.temperature).log_softmax(-1)
    return torch.stack([log_probs[len(prompt) - 1 + t, token] for t, token in enumerate(response)]).sum()


def written_log_ratios(policy: CausalLM, rollout: Rollout) -> list[Tensor]:
    """log(π/ref) of each response, by loops over unpadded rows."""
    ratios = []
    for i, n in enumerate(rollout.lengths.tolist()):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        logp = written_log_prob(policy, prompt, rollout.response_ids[i, :n].tolist(), rollout.law)
        ratios.append(logp - sum(rollout.ref_logp[i, t] for t in range(n)))
    return ratios


# --- worlds -----------------------------------------------------------------------------------------


def float64_world(seed: int, vocab_size: int, length: int, **settings: Any) -> EnumerableWorld:
    """A small world whose reference is computed in float64."""
    world = EnumerableWorld.make(seed, vocab_size, length, **settings)
    reference = world.reference.double()
    return dataclasses.replace(world, reference=reference, ref_log_probs=world.sequence_log_probs(reference))


def listed(world: EnumerableWorld) -> Rollout:
    """Every response of a world, with its reference's log-probabilities and its gold as the score."""
    rollout = Rollout.of_tokens([[0]] * len(world.sequences), world.sequences.tolist(), world.law)
    return dataclasses.replace(
        rollout,
        ref_logp=teacher_forced_logp(world.reference, rollout),
        score=world.gold,
        beta=torch.full_like(world.gold, world.beta),
    )


def all_pairs(world: EnumerableWorld) -> Pairs:
    """Every pair of different responses, each labelled with its exact Bradley–Terry probability σ(r_i − r_j)."""
    i, j = map(list, zip(*combinations(range(len(world.sequences)), 2), strict=True))
    responses = listed(world)
    return Pairs(responses[i], responses[j], torch.sigmoid(world.gold[i] - world.gold[j]))


class TablePolicy(nn.Module):
    """A row of logits for every beginning of a response, made from any `log_probs` [N] of a world's responses."""

    def __init__(self, world: EnumerableWorld, log_probs: Tensor) -> None:
        super().__init__()
        self.vocab_size = world.vocab_size
        known = [log_probs.reshape(self.vocab_size ** (t + 1), -1).logsumexp(1) for t in range(world.length)]
        self.logits = nn.Parameter(torch.cat([x.reshape(-1, self.vocab_size).log_softmax(-1) for x in known]))

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        state = first = torch.zeros(len(rollout), dtype=torch.int64)
        rows = []
        for t, letters in enumerate(rollout.response_ids.T):
            rows.append(first + state)
            first, state = first + self.vocab_size**t, state * self.vocab_size + letters
        log_probs = self.logits[torch.stack(rows, dim=1)].log_softmax(-1)  # [B, T, V]
        return gather_logp(log_probs, rollout.response_ids), torch.zeros(rollout.response_ids.shape), entropy(log_probs)
