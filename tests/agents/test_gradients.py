"""Every online agent's expected gradient is that of the objective that it states: by listing, without sampling."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch

from rlhf_env.agents.a2c import A2C, A2CConfig
from rlhf_env.agents.bon_distillation import BonDistillation, BonDistillationConfig
from rlhf_env.agents.grpo import GRPO, GRPOConfig
from rlhf_env.agents.nlpo import NLPO, NLPOConfig
from rlhf_env.agents.ppo import PPO, PPOConfig
from rlhf_env.agents.reinforce import Reinforce, ReinforceConfig
from rlhf_env.agents.rejection_sampling import RejectionSampling, RejectionSamplingConfig
from rlhf_env.agents.remax import ReMax, ReMaxConfig
from rlhf_env.agents.rloo import RLOO, RLOOConfig
from rlhf_env.agents.soft_q import SoftQ, SoftQConfig
from rlhf_env.functional import gather_logp, kl_k1, kl_k2, kl_k3
from rlhf_env.types import Rollout, SamplingLaw
from rlhf_env.worlds.enumerable import EnumerableWorld, best_of_n_log_probs
from tests.agents.gradients import (
    STILL,
    copies,
    cosine,
    every_response,
    flat,
    gradient_of,
    mean_gradient,
    moved,
)
from tests.agents.pairs import TablePolicy, float64_world
from tests.builders import EOS, random_model

ONE_STEP = {**STILL, "epochs": 1, "minibatches": 1}


@pytest.fixture
def world() -> EnumerableWorld:
    return float64_world(3, vocab_size=2, length=3)


def exact(world: EnumerableWorld, policy) -> torch.Tensor:
    """The gradient of gold − β·KL, from the world itself."""
    _, gradient = world.exact_gradient(policy)
    return flat(gradient, gradient)


def groups(rollout, probability, size):
    """Every ordered group of `size` responses as (its rollout, its probability)."""
    for members in product(range(len(rollout)), repeat=size):
        yield (rollout[list(members)],), float(probability[list(members)].prod())


def test_reinforce(world):
    policy = moved(world)
    agent = Reinforce(policy, ReinforceConfig(**STILL, batch_size=2))
    found = mean_gradient(agent, groups(*every_response(world, policy), 2))
    torch.testing.assert_close(found * world.length, exact(world, policy), atol=1e-8, rtol=1e-6)


def test_rloo(world):
    policy = moved(world)
    agent = RLOO(policy, RLOOConfig(**STILL, batch_size=2, group_size=2))
    found = mean_gradient(agent, groups(*every_response(world, policy), 2))
    torch.testing.assert_close(found * world.length, exact(world, policy), atol=1e-8, rtol=1e-6)


def test_remax(world):
    policy = moved(world)
    rollout, probability = every_response(world, policy)
    greedy = rollout[int(probability.argmax())]  # any response may be the baseline: it must not matter
    agent = ReMax(policy, ReMaxConfig(**STILL, batch_size=1))
    cases = (((rollout[i], greedy), float(p)) for i, p in enumerate(probability))
    found = mean_gradient(agent, cases)
    torch.testing.assert_close(found * world.length, exact(world, policy), atol=1e-8, rtol=1e-6)


def test_a2c_whatever_its_values_are_at_lambda_1(world):
    policy = moved(world)
    torch.nn.init.normal_(policy.value_head.weight)
    rollout, probability = every_response(world, policy)
    with torch.no_grad():
        rollout = dataclasses.replace(rollout, values=policy.evaluate(rollout)[1])
    agent = A2C(policy, A2CConfig(**STILL, batch_size=1, lam=1.0, value_coef=0.0))
    found = mean_gradient(agent, (((rollout[i],), float(p)) for i, p in enumerate(probability)))
    torch.testing.assert_close(found * world.length, exact(world, policy), atol=1e-8, rtol=1e-6)


def test_ppo_in_a_large_batch(world):
    """Advantages are whitened, so it is the direction that is exact, and only as the batch grows."""
    policy = moved(world)
    rollout, probability = every_response(world, policy)
    agent = PPO(policy, PPOConfig(**ONE_STEP, batch_size=8192, lam=1.0, value_coef=0.0))
    found = mean_gradient(agent, [((rollout[copies(probability, 8192)],), 1.0)])
    assert cosine(found, exact(world, policy)) > 0.9995


def test_nlpo_is_the_gradient_of_the_masked_policys_objective():
    world = float64_world(3, vocab_size=4, length=2)
    own = moved(world)
    agent = NLPO(own, NLPOConfig(**ONE_STEP, batch_size=8192, lam=1.0, value_coef=0.0, mask_top_p=0.9))
    rollout, probability = every_response(world, agent.policy)
    assert 0 < (probability == 0).sum() < len(probability) - 3, "the mask must forbid something and leave something"
    found = mean_gradient(agent, [((rollout[copies(probability, 8192)],), 1.0)])
    inside = probability > 0  # outside the mask, where 0 · log 0 is no gradient
    log_probs, ref = agent.policy.evaluate(rollout[inside])[0].sum(1), rollout.ref_logp[inside].sum(1)
    objective = (log_probs.exp() * (world.gold[inside] - world.beta * (log_probs - ref))).sum()
    assert cosine(found, gradient_of(objective, agent.policy)) > 0.9995


@pytest.mark.parametrize("average", ["response", "constant"])
def test_grpo_with_the_kl_in_the_reward(world, average):
    """(K − 1)/K of the exact gradient, because the mean of the group contains the member."""
    policy = moved(world)
    agent = GRPO(policy, GRPOConfig(**ONE_STEP, batch_size=2, group_size=2, scale=False, average=average))
    found = mean_gradient(agent, groups(*every_response(world, policy), 2))
    torch.testing.assert_close(found * world.length * 2, exact(world, policy), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("kl", "least"), [("k2", 0.99), ("k3", 0.97)])
def test_grpo_with_the_kl_as_a_loss_is_biased(world, kl, least):
    """Each token's loss forgets what the token does to the KL of later ones; k3 is another divergence besides."""
    policy = moved(world)
    agent = GRPO(policy, GRPOConfig(**ONE_STEP, batch_size=2, group_size=2, scale=False, kl=kl))
    rollout, probability = every_response(world, policy)
    # The score's part is halved by the group's own mean, the KL's is not.
    rollout = dataclasses.replace(rollout, score=2 * rollout.score)
    assert least < cosine(mean_gradient(agent, groups(rollout, probability, 2)), exact(world, policy)) < 0.99999


def test_what_kl_estimators_are_worth_as_losses_and_rewards(world):
    """Against autograd of the KL of responses: k1 as a reward and k2 of whole responses are it, others are not."""
    policy = moved(world)
    rollout, p = every_response(world, policy)
    logp = policy.evaluate(rollout)[0]
    exact_kl = gradient_of(world.kl(world.sequence_log_probs(policy)), policy)
    total, ref_total = logp.sum(1), rollout.ref_logp.sum(1)
    k1_to_go = (rollout.logp - rollout.ref_logp).flip(1).cumsum(1).flip(1)
    as_loss = {
        "k1 as a reward": (k1_to_go * logp).sum(1),
        "k1 as a loss": kl_k1(total, ref_total),
        "k2 of whole responses": kl_k2(total, ref_total),
        "k2 of tokens": kl_k2(logp, rollout.ref_logp).sum(1),
        "k3 of whole responses": kl_k3(total, ref_total),
    }
    found = {name: gradient_of((p * loss).sum(), policy) for name, loss in as_loss.items()}
    torch.testing.assert_close(found["k1 as a reward"], exact_kl, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(found["k2 of whole responses"], exact_kl, atol=1e-9, rtol=1e-7)
    assert found["k1 as a loss"].norm() < 1e-9 * exact_kl.norm() + 1e-9
    assert cosine(found["k2 of tokens"], exact_kl) < 0.9999
    assert cosine(found["k3 of whole responses"], exact_kl) < 0.999


def test_grpo_as_published_has_no_gradient_that_the_objective_has():
    """With the deviation in the denominator even the part of the score points elsewhere, once prompts differ."""
    worlds = [float64_world(seed, vocab_size=2, length=2) for seed in (0, 1)]
    scores = [worlds[0].gold, 0.1 * worlds[1].gold]  # the second prompt's scores hardly vary
    policy = moved(worlds[0])
    totals = {True: 0.0, False: 0.0}
    for scale in totals:
        for score in scores:
            rollout, probability = every_response(worlds[0], policy)
            rollout = dataclasses.replace(rollout, score=score, reward=torch.zeros_like(rollout.reward))
            rollout.reward[:, -1] = score
            config = GRPOConfig(**ONE_STEP, batch_size=2, group_size=2, scale=scale)
            totals[scale] = totals[scale] + mean_gradient(GRPO(policy, config), groups(rollout, probability, 2))
    wanted = gradient_of(sum((worlds[0].sequence_log_probs(policy).exp() * s).sum() for s in scores), policy)
    assert cosine(totals[False], wanted) == pytest.approx(1, abs=1e-9)
    assert cosine(totals[True], wanted) < 0.99


def test_rejection_sampling_climbs_the_likelihood_of_the_best_of_k_by_return(world):
    policy = moved(world)
    rollout, probability = every_response(world, policy)
    agent = RejectionSampling(policy, RejectionSamplingConfig(**ONE_STEP, batch_size=2, group_size=2))
    found = mean_gradient(agent, groups(rollout, probability, 2))
    best = best_of_n_log_probs(probability.log(), rollout.returns, 2).exp()
    wanted = gradient_of((best * world.sequence_log_probs(policy)).sum(), policy)
    torch.testing.assert_close(found * world.length, wanted, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("forward_weight", [0.0, 0.5, 1.0])
def test_best_of_n_distillation_is_the_gradient_of_its_divergence(forward_weight):
    """Over every pair of the policy's responses with every pair of the reference's."""
    world = float64_world(3, vocab_size=2, length=2)
    policy = moved(world)
    rollout, probability = every_response(world, policy)
    theirs, reference = every_response(world, world.reference)
    settings = {"n": 2, "draws": 2, "batch_size": 2, "group_size": 2, "forward_weight": forward_weight}
    agent = BonDistillation(policy, BonDistillationConfig(**STILL, **settings))
    cases = (
        ((own, other), p * q)
        for (own,), p in groups(rollout, probability, 2)
        for (other,), q in groups(theirs, reference, 2)
    )
    found = mean_gradient(agent, cases)

    log_share = torch.zeros_like(world.gold)  # E[log((1 + wins) / (2 + draws))] of each response, by listing
    for i, j in product(range(len(world.gold)), repeat=2):
        for k, gold in enumerate(world.gold):
            wins = int(world.gold[i] <= gold) + int(world.gold[j] <= gold)
            log_share[k] += reference[i] * reference[j] * torch.log(torch.tensor((1 + wins) / 4, dtype=torch.float64))
    log_probs = world.sequence_log_probs(policy)
    backward = (log_probs.exp() * log_share).sum() - world.kl(log_probs)
    forward = (best_of_n_log_probs(world.ref_log_probs, world.gold, 2).exp() * log_probs).sum()
    wanted = gradient_of((1 - forward_weight) * backward + forward_weight * forward, policy)
    torch.testing.assert_close(found * world.length, wanted, atol=1e-8, rtol=1e-6)


class TableWithValues(TablePolicy):
    """A table that also knows the value of each beginning of a response, [S]."""

    def __init__(self, world, log_probs, values) -> None:
        super().__init__(world, log_probs)
        self.values = torch.nn.Parameter(values)

    def evaluate(self, rollout):
        logp, _, entropy = super().evaluate(rollout)
        state = first = torch.zeros(len(rollout), dtype=torch.int64)
        rows = []
        for t, letters in enumerate(rollout.response_ids.T):
            rows.append(first + state)
            first, state = first + self.vocab_size**t, state * self.vocab_size + letters
        return logp, self.values[torch.stack(rows, dim=1)], entropy

    def response_log_probs(self, rollout):
        raise AssertionError("soft Q-learning needs no whole distributions")


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_soft_q_rests_at_the_optimum_whoever_wrote_the_responses(world, lam):
    """At π* and its values every target is met on every path: the loss is 0, not just its gradient."""
    optimum = world.optimal_log_probs()
    v, beta = world.vocab_size, world.beta
    # V(beginning) = β log E_ref[exp(gold/β) | beginning], from the definition
    values = []
    for t in range(world.length):
        blocks = world.ref_log_probs.reshape(v**t, -1)
        values.append(beta * (((world.gold / beta).reshape(v**t, -1) + blocks).logsumexp(1) - blocks.logsumexp(1)))
    policy = TableWithValues(world, optimum, torch.cat(values))
    agent = SoftQ(policy, SoftQConfig(**STILL, batch_size=8, epochs=1, minibatches=1, lam=lam))
    rollout, _ = every_response(world, world.reference, kl_mode="reference")  # the reference's, and each once
    metrics = agent.update(rollout)
    assert metrics["q_loss"] < 1e-18
    policy.values.data[0] += 1.0  # and nowhere else
    assert agent.update(rollout)["q_loss"] > 0.01


def test_soft_q_targets_by_hand():
    """Two tokens, β = ½: y_2 = r_2, y_1 = r_1 + V̄_2 + λ (r_2 − Q̄_2), loss = mean ½ (Q − y)²."""
    world = float64_world(0, vocab_size=2, length=2)
    uniform = torch.full((4,), -torch.log(torch.tensor(4.0)).item(), dtype=torch.float64)
    policy = TableWithValues(world, uniform, torch.tensor([0.3, 0.7, -0.2], dtype=torch.float64))
    rollout, _ = every_response(world, world.reference, kl_mode="reference")
    rollout = dataclasses.replace(rollout[[1]], beta=torch.tensor([0.5], dtype=torch.float64))  # tokens 0, 1
    rollout.reward[:] = torch.tensor([[0.1, 1.0]])
    half = 0.5 * -0.6931471805599453  # β log ½
    q1, q2 = 0.3 + half, 0.7 + half
    y2 = 1.0
    y1 = 0.1 + 0.7 + 0.5 * (1.0 - q2)
    agent = SoftQ(policy, SoftQConfig(**STILL, batch_size=1, epochs=1, minibatches=1, lam=0.5))
    assert agent.update(rollout)["q_loss"] == pytest.approx(((q1 - y1) ** 2 + (q2 - y2) ** 2) / 4)


def test_where_lengths_differ_a_mean_over_tokens_is_exact_only_in_a_large_batch():
    """Responses E, aE, aaE and aaa: a sum divided by the batch's own tokens is a ratio, biased by O(1/B)."""
    policy = random_model(dtype="float64", seed=1)
    law = SamplingLaw(11, EOS, banned_tokens=tuple(range(1, 9)) + (10,))
    rollout = Rollout.of_tokens([[0]] * 4, [[EOS], [0, EOS], [0, 0, EOS], [0, 0, 0]], law)
    log_probs = gather_logp(policy.response_log_probs(rollout)[0], rollout.response_ids)
    probability = torch.where(rollout.response_mask, log_probs, 0.0).sum(1).exp()
    assert probability.sum().item() == pytest.approx(1)
    score = -rollout.lengths.double()
    reward = torch.zeros_like(log_probs).detach()
    reward[torch.arange(4), rollout.lengths - 1] = score
    numbers = {"logp": log_probs.detach(), "ref_logp": log_probs.detach(), "values": torch.zeros_like(reward)}
    rollout = dataclasses.replace(rollout, score=score, reward=reward, **numbers)
    wanted, p = gradient_of((probability * score).sum(), policy), probability.detach()
    pairs = Reinforce(policy, ReinforceConfig(**STILL, batch_size=2))
    of_two = cosine(mean_gradient(pairs, groups(rollout, p, 2)), wanted)
    large = Reinforce(policy, ReinforceConfig(**STILL, batch_size=4096))
    of_many = cosine(mean_gradient(large, [((rollout[copies(p, 4096)],), 1.0)]), wanted)
    assert of_two < 0.9999 and of_many > 0.99999
