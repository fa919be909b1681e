"""KTO: its gradient is the loss written out, with the KL estimated on responses to other prompts."""

from __future__ import annotations

import dataclasses
import math
from itertools import islice

import pytest
import torch

from rlhf_env.agents.kto import KTO, KTOConfig, mismatched
from rlhf_env.errors import ConfigError, DataError, NonFiniteError
from rlhf_env.types import Pairs, Rollout, SamplingLaw
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.agents.pairs import (
    all_pairs,
    gradient,
    gradient_of,
    make_pairs,
    poisoned,
    swapped,
    written_log_prob,
    written_log_ratios,
)
from tests.builders import random_model

STILL = KTOConfig(learning_rate=0.0, batch_size=7, beta=0.3, lambda_d=1.2, lambda_u=0.7, max_grad_norm=math.inf)


def moved(seed: int = 2, scale: float = 0.02, dtype: str = "float64"):
    """The reference, model 0, after it has learned something."""
    policy = random_model(dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(scale * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return policy


def asked_as_reference(config: KTOConfig, pairs: Pairs, dtype: str = "float64") -> KTO:
    """An agent that began as the reference, and whose policy has moved since."""
    agent = KTO(random_model(dtype=dtype), config)
    next(agent.fit(pairs))
    agent.policy.load_state_dict(moved(dtype=dtype).state_dict())  # type: ignore[attr-defined]
    return agent


def test_the_gradient_is_the_loss_written_out():
    """z = max(0, mean log(π/ref) of prompts with the responses to another one), in loops; no gradient through it."""
    pairs = make_pairs()
    agent = asked_as_reference(STILL, pairs)
    ours = gradient_of(agent, pairs, start=1, updates=2)
    policy, reference = moved(), random_model(dtype="float64")
    others = mismatched(pairs)
    ahead = []
    for i in (0, 1, 3, 4, 5, 6):  # 2 is a tie
        for each in (others.first, others.second):
            prompt = each.prompt_ids[i][each.prompt_mask[i]].tolist()
            response = each.response_ids[i, : each.lengths[i]].tolist()
            of_policy, of_reference = (
                written_log_prob(m, prompt, response, each.law).item() for m in (policy, reference)
            )
            ahead.append(of_policy - of_reference)
    z = max(0.0, sum(ahead) / len(ahead))
    assert z > 0
    losses = []
    for i, (first, second) in enumerate(
        zip(*(written_log_ratios(policy, each) for each in (pairs.first, pairs.second)), strict=True)
    ):
        if i != 2:
            good, bad = (first, second) if pairs.preference[i] > 0.5 else (second, first)
            losses.append(1.2 * (1 - 1 / (1 + torch.exp(-0.3 * (good - z)))))
            losses.append(0.7 * (1 - 1 / (1 + torch.exp(-0.3 * (z - bad)))))
    for a, b in zip(ours, gradient(torch.stack(losses).mean(), policy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_the_baseline_is_never_negative():
    """Every log-ratio of a policy that has unlearned what the data hold is below 0."""
    pairs = make_pairs()
    agent = asked_as_reference(STILL, pairs)
    assert agent.ref_mismatched is not None
    agent.ref_mismatched += 100
    assert next(agent.fit(pairs, start=1, updates=2))["baseline"] == 0


def test_no_response_meets_its_own_prompt():
    prompts = [[1], [2, 1], [1], [3], [2, 1], [1], [4]]
    responses = [[i] for i in range(7)]
    law = SamplingLaw(8, eos_token_id=None)
    rollout = Rollout.of_tokens(prompts, responses, law)
    others = mismatched(Pairs(rollout, rollout, torch.ones(7)))
    met = others.first.response_ids[:, 0].tolist()
    assert sorted(met) == list(range(7))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(met))
    assert torch.equal(others.first.prompt_ids, rollout.prompt_ids)


def test_of_one_prompt_the_responses_change_places():
    rollout = Rollout.of_tokens([[1]] * 3, [[0], [1], [2]], SamplingLaw(8, eos_token_id=None))
    assert mismatched(Pairs(rollout, rollout, torch.ones(3))).first.response_ids[:, 0].tolist() == [1, 2, 0]


def test_a_longer_prompt_leaves_another_response_less_room():
    rollout = Rollout.of_tokens([[1], [2, 2, 2]], [[0, 1, 2, 3], [4]], SamplingLaw(8, eos_token_id=None))
    others = mismatched(Pairs(rollout, rollout, torch.ones(2)), context_length=5)
    assert others.first.response_ids[1].tolist() == [0, 1, 2, 3]
    assert others.first.lengths.tolist() == [1, 2]


def test_it_needs_to_begin_as_the_reference():
    with pytest.raises(ConfigError, match="the reference of these pairs is another"):
        next(KTO(random_model(dtype="float64", seed=1), STILL).fit(make_pairs()))


def test_ties_teach_nothing():
    pairs = make_pairs()
    untied = pairs[[0, 1, 3, 4, 5, 6]]
    with_tie, without = (asked_as_reference(STILL, data) for data in (pairs, untied))
    rows = [next(agent.fit(data, start=1, updates=2)) for agent, data in ((with_tie, pairs), (without, untied))]
    assert rows[0]["chosen_log_ratio"] == pytest.approx(rows[1]["chosen_log_ratio"])
    tie = dataclasses.replace(untied, preference=torch.full((6,), 0.5))
    with pytest.raises(DataError, match="nothing from ties"):
        next(KTO(random_model(dtype="float64"), STILL).fit(tie))


def test_which_response_stands_first_does_not_matter():
    first, second = (
        gradient_of(asked_as_reference(STILL, data), data, start=1, updates=2)
        for data in (make_pairs(), swapped(make_pairs()))
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_micro_batches_have_the_gradient_of_the_batch():
    """The baseline is the whole batch's, however it is cut."""
    pairs = make_pairs()
    whole, cut = (
        gradient_of(
            asked_as_reference(dataclasses.replace(STILL, micro_batch_size=n), pairs), pairs, start=1, updates=2
        )
        for n in (0, 2)
    )
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


@pytest.mark.parametrize("poison", [1e6, math.nan])
def test_what_stands_in_the_padding_reaches_nothing(poison):
    pairs, results = make_pairs("float32"), []
    for data in (pairs, poisoned(pairs, poison)):
        policy = random_model()
        results.append((list(KTO(policy, KTOConfig(learning_rate=1e-3, batch_size=3)).fit(data)), policy))
    (clean_rows, clean), (dirty_rows, dirty) = results
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), dirty.parameters(), strict=True))
    assert clean_rows == dirty_rows


def test_continued_it_is_the_run_that_was_never_interrupted():
    """Its state holds the reference's word, so that a policy which has moved is never taken for the reference."""
    config, pairs = KTOConfig(learning_rate=1e-2, batch_size=3, lambda_u=0.0), make_pairs("float32")
    whole, halves = random_model(), random_model()
    rows = list(KTO(whole, config, seed=5).fit(pairs, updates=6))
    assert any(row["baseline"] > 0 for row in rows)
    agent = KTO(halves, config, seed=5)
    some = list(islice(agent.fit(pairs, updates=6), 4))
    fresh = KTO(halves, config, seed=5)
    fresh.load_state_dict(agent.state_dict())
    assert some + list(fresh.fit(pairs, updates=6, start=4)) == rows
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    with pytest.raises(ConfigError, match="begins with as the reference"):
        next(KTO(halves, config).fit(pairs, start=4))  # without the state


def test_it_gains_in_an_enumerable_world():
    world = EnumerableWorld.make(0, vocab_size=4, length=2)
    pairs, policy = all_pairs(world), world.policy()
    agent = KTO(policy, KTOConfig(learning_rate=1e-3, beta=world.beta, batch_size=len(pairs)))
    *_, last = agent.fit(pairs, updates=60)
    assert last["accuracy"] > 0.85
    assert world.gain(policy) > 0.2  # and not 1: what KTO maximises is no reward minus β·KL


def test_a_non_finite_reference_is_refused_by_name_and_touches_no_weight():
    pairs, policy = make_pairs("float32"), random_model()
    pairs.first.ref_logp[6, 0] = torch.nan
    before = [p.clone() for p in policy.parameters()]
    with pytest.raises(NonFiniteError, match="episode 6 of the batch"):
        list(KTO(policy, KTOConfig(batch_size=7)).fit(pairs))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"lambda_d": -1.0}, {"lambda_u": -0.1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"KTO needs {next(iter(settings))}"):
        KTOConfig(**settings)
