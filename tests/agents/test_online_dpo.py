"""Online DPO: on average over its own pairs, its gradient is the listed objective's, which is 0 at the optimum."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlhf_env.agents.online_dpo import OnlineDPO, OnlineDPOConfig, extremes_of_groups, label
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.training.collect import collect
from rlhf_env.training.loop import train
from rlhf_env.types import Agent, Rollout
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.agents.pairs import TablePolicy, float64_world, gradient, listed, written_log_ratios
from tests.builders import make_envs, random_model

STILL = OnlineDPOConfig(learning_rate=0.0, batch_size=2, max_grad_norm=math.inf)


def groups(policy, size: int = 2, episodes: int = 12) -> Rollout:
    """Episodes of a policy, in groups that answer the same prompt."""
    return collect(policy, make_envs(4, reference=random_model()), episodes=episodes, group_size=size)


def expected_gradient(agent: OnlineDPO, world: EnumerableWorld) -> list[Tensor]:
    """The gradient of an update on each ordered pair of responses, weighted by how likely the policy is to draw it."""
    responses = listed(world)
    with torch.no_grad():
        probability = world.sequence_log_probs(agent.policy).exp()
    parameters = list(agent.policy.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(responses)):
        for j in range(len(responses)):
            agent.update(responses[[i, j]])
            for mean, p in zip(total, parameters, strict=True):
                if p.grad is not None:
                    mean += probability[i] * probability[j] * p.grad
    return total


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    return float(
        torch.cosine_similarity(torch.cat([x.flatten() for x in a]), torch.cat([x.flatten() for x in b]), dim=0)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_the_expected_gradient_is_that_of_the_listed_objective(temperature):
    """Σ_ij π_i π_j ℓ(d_ij), π being where the pairs come from and not differentiated: every pair, no sampling."""
    world = float64_world(3, vocab_size=3, length=2)
    policy = world.policy()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    agent: Agent = OnlineDPO(policy, dataclasses.replace(STILL, label_temperature=temperature))
    ours = expected_gradient(agent, world)  # type: ignore[arg-type]

    log_probs = torch.stack(written_log_ratios(policy, listed(world))) + world.ref_log_probs  # type: ignore[arg-type]
    objective = torch.zeros(())
    for i, r_i in enumerate(world.gold.tolist()):
        for j, r_j in enumerate(world.gold.tolist()):
            d = (log_probs[i] - log_probs[j]) - (world.ref_log_probs[i] - world.ref_log_probs[j])
            wins = torch.sigmoid(world.beta * d)
            first = 1 / (1 + math.exp((r_j - r_i) / temperature)) if temperature else (r_i > r_j) + 0.5 * (r_i == r_j)
            drawn = (log_probs[i] + log_probs[j]).detach().exp()
            objective = objective - drawn * (first * wins.log() + (1 - first) * (1 - wins).log())
    listed_gradient = gradient(objective, policy)
    assert cosine(ours, listed_gradient) > 0.999999
    for a, b in zip(ours, listed_gradient, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_the_optimum_of_reward_minus_beta_kl_is_its_fixed_point():
    """At π* ∝ ref exp(r/β) every pair is as likely as its label says: not only the mean, each gradient is 0."""
    world = float64_world(3, vocab_size=3, length=2)
    agent = OnlineDPO(TablePolicy(world, world.optimal_log_probs()), STILL)
    assert max(float(g.abs().max()) for g in expected_gradient(agent, world)) < 1e-12
    assert agent.update(listed(world)[[2, 7]])["gradient_norm"] < 1e-12

    hard = OnlineDPO(TablePolicy(world, world.optimal_log_probs()), dataclasses.replace(STILL, label_temperature=0.0))
    assert max(float(g.abs().max()) for g in expected_gradient(hard, world)) > 1e-3  # the published labels move on
    warm = dataclasses.replace(STILL, label_temperature=2.0)  # and those of temperature T have the optimum of T·β
    agent = OnlineDPO(TablePolicy(world, world.optimal_log_probs(2 * world.beta)), warm)
    assert max(float(g.abs().max()) for g in expected_gradient(agent, world)) < 1e-12


def test_it_comes_near_the_optimum_of_a_small_world():
    world = EnumerableWorld.make(0, vocab_size=4, length=3)
    policy = world.policy()
    envs = TextGenerationVectorEnv(64, **world.env_kwargs())
    agent = OnlineDPO(policy, OnlineDPOConfig(learning_rate=1e-3, batch_size=256, epochs=4, minibatches=2))
    list(train(agent, envs, updates=12))
    assert 0.95 < world.gain(policy) <= 1.0


def test_best_and_worst_of_each_group():
    worth = torch.tensor([0.0, 3.0, -1.0, 5.0, 5.0, 5.0])
    worst, best = extremes_of_groups(worth, 3).tolist()
    assert (worst, best) == ([2, 3], [1, 5])  # two responses of the second group, though all three are worth the same
    worst, best = extremes_of_groups(worth[:4], 2).tolist()
    assert (worst, best) == ([0, 2], [1, 3])


def test_labels_by_hand():
    lead = torch.tensor([0.0, math.log(3)])
    assert label(lead, 1.0).tolist() == pytest.approx([0.5, 0.75])
    assert label(lead, 0.5).tolist() == pytest.approx([0.5, 0.9])
    assert label(lead, 0.0).tolist() == [0.5, 1]


def test_a_penalty_makes_a_response_worse():
    rollout = groups(random_model(seed=1))
    rollout = dataclasses.replace(rollout, score=torch.zeros(12), penalty=torch.tensor([1.0, 0.0] * 6))
    assert OnlineDPO(random_model(seed=1), STILL).update(rollout)["score_gap"] == 1


def test_identical_responses_give_no_gradient_and_are_counted():
    policy = random_model(dtype="float64", seed=1)
    rollout = collect(policy, make_envs(4, reference=random_model(dtype="float64")), episodes=4, group_size=2)
    twice = rollout[[0, 0, 1, 1]]
    metrics = OnlineDPO(policy, STILL).update(dataclasses.replace(twice, score=torch.arange(4.0).double()))
    assert metrics["identical"] == 1
    assert metrics["gradient_norm"] < 1e-12
    assert metrics["loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("poison", [1e6, math.nan])
def test_what_stands_in_the_padding_reaches_nothing(poison):
    rollout, results = groups(random_model(seed=1)), []
    padding = ~rollout.response_mask
    assert padding.any()
    fields = ("logp", "ref_logp", "values", "reward")
    dirty = dataclasses.replace(
        rollout, **{name: getattr(rollout, name).masked_fill(padding, poison) for name in fields}
    )
    for data in (rollout, dirty):
        policy = random_model(seed=1)
        results.append((OnlineDPO(policy, OnlineDPOConfig(learning_rate=1e-3, epochs=2)).update(data), policy))
    (m1, clean), (m2, spoilt) = results
    assert m1 == m2
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), spoilt.parameters(), strict=True))


def test_with_learning_rate_zero_the_policy_stays_itself():
    policy = random_model()
    before = [p.clone() for p in policy.parameters()]
    config = OnlineDPOConfig(learning_rate=0.0, batch_size=12, group_size=3, minibatches=2)
    for metrics in train(OnlineDPO(policy, config), make_envs(4, reference=random_model()), updates=3):
        assert metrics["margin"] == pytest.approx(0, abs=1e-4)
        assert metrics["gradient_steps"] == 2
        assert abs(metrics["kl"]) < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_continued_it_is_the_run_that_was_never_interrupted():
    config = OnlineDPOConfig(learning_rate=1e-3, minibatches=2, micro_batch_size=2)
    rollouts = [groups(random_model(seed=seed)) for seed in range(4)]
    whole, halves = random_model(seed=1), random_model(seed=1)
    agent = OnlineDPO(whole, config, seed=5)
    rows = [agent.update(rollout, k / 4) for k, rollout in enumerate(rollouts)]
    first, second = (OnlineDPO(halves, config, seed=5) for _ in range(2))
    again = [first.update(rollout, k / 4) for k, rollout in enumerate(rollouts[:2])]
    second.load_state_dict(first.state_dict())
    again += [second.update(rollout, k / 4) for k, rollout in enumerate(rollouts[2:], start=2)]
    assert rows == again
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_a_non_finite_score_is_refused_by_name_and_touches_no_weight():
    rollout, policy = groups(random_model(seed=1)), random_model(seed=1)
    rollout.score[3] = torch.nan
    before = [p.clone() for p in policy.parameters()]
    with pytest.raises(NonFiniteError, match="score of episode 3 of the batch"):
        OnlineDPO(policy).update(rollout)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_without_a_price_on_kl_it_has_no_optimum():
    rollout = groups(random_model(seed=1))
    with pytest.raises(ConfigError, match="needs the environment's beta above 0"):
        OnlineDPO(random_model(seed=1)).update(dataclasses.replace(rollout, beta=torch.zeros(12)))


@pytest.mark.parametrize(
    "settings", [{"batch_size": 9, "group_size": 2}, {"group_size": 1}, {"label_temperature": -1.0}, {"minibatches": 0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="OnlineDPO "):
        OnlineDPOConfig(**settings)
