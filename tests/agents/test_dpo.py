"""DPO: its gradient is the loss written out, its optimum is the one of the KL-regularised reward."""

from __future__ import annotations

import dataclasses
import math
from itertools import islice

import pytest
import torch

from rlhf_env.agents.dpo import DPO, DPOConfig
from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.functional import inverse_cdf_sample
from rlhf_env.types import OfflineAgent, Pairs
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.agents.pairs import (
    TablePolicy,
    all_pairs,
    float64_world,
    gradient,
    gradient_of,
    listed,
    make_pairs,
    poisoned,
    swapped,
    written_log_ratios,
)
from tests.builders import random_model

STILL = DPOConfig(learning_rate=0.0, batch_size=7, max_grad_norm=math.inf)


def test_the_gradient_is_the_loss_written_out():
    """In loops over tokens of unpadded rows: soft labels, a tie, smoothing, a law that is not the model's own."""
    pairs, config = make_pairs(), dataclasses.replace(STILL, beta=0.3, smoothing=0.1)
    policy, written = random_model(dtype="float64", seed=1), random_model(dtype="float64", seed=1)
    agent: OfflineAgent = DPO(policy, config)
    ours = gradient_of(agent, pairs)
    losses = []
    for first, second, p in zip(
        *(written_log_ratios(written, each) for each in (pairs.first, pairs.second)), pairs.preference, strict=True
    ):
        wins = 1 / (1 + torch.exp(-0.3 * (first - second)))
        turned = p * 0.9 + (1 - p) * 0.1
        losses.append(-turned * wins.log() - (1 - turned) * (1 - wins).log())
    for a, b in zip(ours, gradient(torch.stack(losses).mean(), written), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_its_optimum_is_that_of_reward_minus_beta_kl():
    """With preferences σ(r_i − r_j) over all pairs: no gradient at π* ∝ ref exp(r/β), where descent from ref ends."""
    world = float64_world(0, vocab_size=4, length=2)
    pairs = all_pairs(world)
    config = DPOConfig(learning_rate=0.3, batch_size=len(pairs), beta=world.beta)

    at_optimum = DPO(TablePolicy(world, world.optimal_log_probs()), config)
    assert next(at_optimum.fit(pairs))["gradient_norm"] < 1e-12

    policy = TablePolicy(world, world.ref_log_probs)
    rows = list(DPO(policy, config).fit(pairs, updates=600))
    assert rows[0]["gradient_norm"] > 1e-2
    assert world.gain(policy) == pytest.approx(1, abs=1e-9)
    assert world.regret(policy) / world.beta < 1e-9  # KL(π ‖ π*)


def test_another_beta_has_another_optimum():
    world = float64_world(0, vocab_size=4, length=2)
    pairs = all_pairs(world)
    at_optimum = DPO(TablePolicy(world, world.optimal_log_probs(2.0)), DPOConfig(batch_size=len(pairs), beta=2.0))
    assert next(at_optimum.fit(pairs))["gradient_norm"] < 1e-12


def test_a_language_model_gains_from_sampled_comparisons():
    """Pairs drawn from the reference, labels drawn from Bradley–Terry: nothing exact but the measure."""
    world = EnumerableWorld.make(0, vocab_size=4, length=3)
    draw = torch.Generator().manual_seed(0)
    drawn = inverse_cdf_sample(world.ref_log_probs.expand(4000, -1), torch.rand(4000, generator=draw).double())
    first, second = drawn.reshape(2, -1)
    likely = torch.sigmoid(world.gold[first] - world.gold[second])
    preference = (torch.rand(2000, generator=draw) < likely).float()
    policy = world.policy()
    agent = DPO(policy, DPOConfig(learning_rate=1e-3, beta=world.beta, batch_size=128, epochs=3))
    rows = list(agent.fit(Pairs(listed(world)[first], listed(world)[second], preference)))
    assert rows[0]["accuracy"] < rows[-1]["accuracy"]
    assert world.gain(policy) > 0.8


def test_metrics_by_hand():
    """A table of logits: π/ref is ¾ / ½ of the letter a, ¼ / ½ of b. Two decided pairs, a wrong one, and a tie."""
    world = EnumerableWorld.make(0, vocab_size=2, length=1)
    policy = TablePolicy(world, torch.tensor([0.75, 0.25]).log())
    responses = dataclasses.replace(listed(world), ref_logp=torch.tensor([[0.5], [0.5]]).log())
    pairs = Pairs(responses[[0, 1, 1, 0]], responses[[1, 0, 0, 1]], torch.tensor([1.0, 0.0, 1.0, 0.5]))
    row = next(DPO(policy, DPOConfig(beta=2.0, batch_size=4, learning_rate=0.1)).fit(pairs))
    lead = math.log(3)  # of a before b, in nats
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["margin"] == pytest.approx(2 * lead / 3)
    assert row["chosen_log_ratio"] == pytest.approx((2 * math.log(1.5) + math.log(0.5)) / 3)
    assert row["rejected_log_ratio"] == pytest.approx((2 * math.log(0.5) + math.log(1.5)) / 3)
    wins = 1 / (1 + math.exp(-2 * lead))  # 0.9
    assert row["loss"] == pytest.approx(-(2.5 * math.log(wins) + 1.5 * math.log(1 - wins)) / 4)
    assert row["learning_rate"] == 0.1 and row["epoch"] == 1


def test_which_pairs_the_metrics_are_of():
    """Pairs in batches of one: a margin for each, of its own label, in whatever order; ties have none."""
    pairs, policy = make_pairs(), random_model(dtype="float64", seed=1)
    margins = []
    for first, second, p in zip(
        *(written_log_ratios(policy, each) for each in (pairs.first, pairs.second)), pairs.preference, strict=True
    ):
        if p != 0.5:
            margins.append(0.1 * (first - second).item() * (1 if p > 0.5 else -1))
    rows = list(DPO(policy, dataclasses.replace(STILL, batch_size=1)).fit(pairs))
    assert sorted(row["margin"] for row in rows if row["margin"] == row["margin"]) == pytest.approx(sorted(margins))


def test_of_ties_alone_there_is_no_accuracy_but_something_to_learn():
    pairs = dataclasses.replace(make_pairs(), preference=torch.full((7,), 0.5, dtype=torch.float64))
    row = next(DPO(random_model(dtype="float64", seed=1), STILL).fit(pairs))
    assert math.isnan(row["accuracy"]) and math.isnan(row["margin"])  # which a run's record leaves out
    assert row["gradient_norm"] > 0


@pytest.mark.parametrize("poison", [1e6, math.nan])
def test_what_stands_in_the_padding_reaches_nothing(poison):
    pairs, results = make_pairs("float32"), []
    for data in (pairs, poisoned(pairs, poison)):
        policy = random_model(seed=1)
        results.append((list(DPO(policy, DPOConfig(learning_rate=1e-3, batch_size=3)).fit(data)), policy))
    (clean_rows, clean), (dirty_rows, dirty) = results
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), dirty.parameters(), strict=True))
    assert clean_rows == dirty_rows


def test_which_response_stands_first_does_not_matter():
    first, second = (
        gradient_of(DPO(random_model(dtype="float64", seed=1), dataclasses.replace(STILL, smoothing=0.2)), data)
        for data in (make_pairs(), swapped(make_pairs()))
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_micro_batches_have_the_gradient_and_the_metrics_of_the_batch():
    rows, gradients = [], []
    for size in (0, 1, 3):
        agent = DPO(random_model(dtype="float64", seed=1), dataclasses.replace(STILL, micro_batch_size=size))
        rows.append(next(agent.fit(make_pairs())))
        gradients.append([p.grad for p in agent.policy.parameters() if p.grad is not None])
    for row, those in zip(rows[1:], gradients[1:], strict=True):
        assert row == pytest.approx(rows[0], abs=1e-6)
        for a, b in zip(those, gradients[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_with_learning_rate_zero_nothing_changes():
    policy = random_model()  # the reference itself
    before = [p.clone() for p in policy.parameters()]
    for row in DPO(policy, DPOConfig(learning_rate=0.0, batch_size=3)).fit(make_pairs("float32"), updates=4):
        assert row["margin"] == pytest.approx(0, abs=1e-5)
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_the_learning_rate_falls_linearly_over_the_steps():
    agent = DPO(random_model(), DPOConfig(learning_rate=1e-3, batch_size=3, epochs=2))
    rows = list(agent.fit(make_pairs("float32")))
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * (1 - k / 6) for k in range(6)])
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_continued_it_is_the_run_that_was_never_interrupted():
    """The same seed gives the same bits, in one go or in two."""
    config, pairs = DPOConfig(learning_rate=1e-3, batch_size=3), make_pairs("float32")

    def run(policy, updates, *, state=None, start=0):
        agent = DPO(policy, config, seed=5)
        if state is not None:
            agent.load_state_dict(state)
        rows = list(islice(agent.fit(pairs, updates=7, start=start), updates))
        return rows, agent.state_dict()

    whole, again, halves = (random_model(seed=1) for _ in range(3))
    rows, _ = run(whole, 7)
    assert run(again, 7)[0] == rows
    some, state = run(halves, 4)
    rest, _ = run(halves, 3, state=state, start=4)
    assert some + rest == rows
    for a, b, c in zip(*(m.parameters() for m in (whole, again, halves)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_non_finite_reference_is_refused_by_name_and_touches_no_weight():
    pairs, policy = make_pairs("float32"), random_model(seed=1)
    pairs.second.ref_logp[4, 0] = torch.nan
    before = [p.clone() for p in policy.parameters()]
    with pytest.raises(NonFiniteError, match="episode 4 of the batch"):
        list(DPO(policy, DPOConfig(batch_size=7)).fit(pairs))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.0}, {"beta": -1.0}, {"beta": math.inf}, {"smoothing": 0.6}, {"batch_size": 0}, {"learning_rate": -1.0}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"DPO needs {next(iter(settings))}"):
        DPOConfig(**settings)
