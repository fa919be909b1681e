"""IPO: its gradient is the loss written out, its optimum the published one, which no sure label drives away."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from rlhf_env.agents.ipo import IPO, IPOConfig
from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.types import Pairs
from rlhf_env.worlds.enumerable import gibbs_log_probs
from tests.agents.pairs import (
    TablePolicy,
    all_pairs,
    float64_world,
    gradient,
    gradient_of,
    make_pairs,
    poisoned,
    swapped,
    written_log_ratios,
)
from tests.builders import random_model

STILL = IPOConfig(learning_rate=0.0, batch_size=7, beta=0.3, max_grad_norm=math.inf)


def test_the_gradient_is_the_loss_written_out():
    pairs = make_pairs()
    policy, written = random_model(dtype="float64", seed=1), random_model(dtype="float64", seed=1)
    ours = gradient_of(IPO(policy, STILL), pairs)
    losses = []
    for first, second, p in zip(
        *(written_log_ratios(written, each) for each in (pairs.first, pairs.second)), pairs.preference, strict=True
    ):
        lead = first - second
        losses.append(p * (lead - 1 / 0.6) ** 2 + (1 - p) * (-lead - 1 / 0.6) ** 2)
    for a, b in zip(ours, gradient(torch.stack(losses).mean(), written), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_its_optimum_goes_by_the_probability_of_being_preferred():
    """π ∝ ref exp(p(y)/β), p(y) being how often y is preferred to the others it is compared with (Azar et al. 2023).

    Those are all responses alike here, y itself included, to which it is preferred half the time.
    """
    world = float64_world(0, vocab_size=4, length=2, beta=0.1)
    pairs = all_pairs(world)
    preferred = torch.sigmoid(world.gold[:, None] - world.gold).mean(1)  # [N]
    optimum = gibbs_log_probs(world.ref_log_probs, preferred, world.beta)
    config = IPOConfig(learning_rate=0.1, batch_size=len(pairs), beta=world.beta, max_grad_norm=math.inf)
    assert next(IPO(TablePolicy(world, optimum), config).fit(pairs))["gradient_norm"] < 1e-11

    policy = TablePolicy(world, world.ref_log_probs)
    list(IPO(policy, config).fit(pairs, updates=600))
    log_probs = world.sequence_log_probs(policy).detach()
    assert float((log_probs.exp() * (log_probs - optimum)).sum()) < 1e-9  # KL(π ‖ optimum)


def test_a_sure_label_leads_by_one_over_two_beta_and_stays_there():
    world = float64_world(0, vocab_size=4, length=2)
    one = all_pairs(world)[[5]]
    pair = Pairs(one.first, one.second, torch.ones(1, dtype=torch.float64))
    policy = TablePolicy(world, world.ref_log_probs)
    *_, last = IPO(policy, IPOConfig(learning_rate=0.03, beta=0.25, batch_size=1, max_grad_norm=math.inf)).fit(
        pair, updates=600
    )
    assert last["chosen_log_ratio"] - last["rejected_log_ratio"] == pytest.approx(2, abs=1e-3)
    assert last["margin"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("poison", [1e6, math.nan])
def test_what_stands_in_the_padding_reaches_nothing(poison):
    pairs, results = make_pairs("float32"), []
    for data in (pairs, poisoned(pairs, poison)):
        policy = random_model(seed=1)
        results.append((list(IPO(policy, IPOConfig(learning_rate=1e-3, batch_size=3)).fit(data)), policy))
    (clean_rows, clean), (dirty_rows, dirty) = results
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), dirty.parameters(), strict=True))
    assert clean_rows == dirty_rows


def test_which_response_stands_first_does_not_matter():
    first, second = (
        gradient_of(IPO(random_model(dtype="float64", seed=1), STILL), data)
        for data in (make_pairs(), swapped(make_pairs()))
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_continued_it_is_the_run_that_was_never_interrupted():
    config, pairs = IPOConfig(learning_rate=1e-3, batch_size=3, micro_batch_size=2), make_pairs("float32")
    whole, halves = random_model(seed=1), random_model(seed=1)
    rows = list(IPO(whole, config, seed=5).fit(pairs, updates=5))
    agent = IPO(halves, config, seed=5)
    some = list(islice(agent.fit(pairs, updates=5), 2))
    fresh = IPO(halves, config, seed=5)
    fresh.load_state_dict(agent.state_dict())
    assert some + list(fresh.fit(pairs, updates=5, start=2)) == rows
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_broken_weights_name_the_episode_and_stay():
    policy = random_model(seed=1)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(torch.inf)  # type: ignore[operator]
    with pytest.raises(NonFiniteError, match="episode [0-9]+ of the batch"):
        list(IPO(policy, IPOConfig(batch_size=7)).fit(make_pairs("float32")))


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"epochs": 0}, {"micro_batch_size": -1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"IPO needs {next(iter(settings))}"):
        IPOConfig(**settings)
