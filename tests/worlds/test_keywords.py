"""The world of keywords: gold by hand, the optimum of a proxy by its definition, and over-optimization."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.functional import best_of_n
from rlhf_env.types import SamplingLaw
from rlhf_env.worlds.keywords import LETTERS, KeywordsWorld, LearnedProxy, make_env, make_vector_env
from tests.builders import make_rollout

TEXTS = ["aaaaaaaaaaaaaaaa", "abcdefghijklabcd", "lkjihgfedcbalkji", "eeeggghhhkkkabcd"]


@pytest.fixture(scope="module")
def world() -> KeywordsWorld:
    return KeywordsWorld.make()


@pytest.fixture(scope="module")
def proxy(world: KeywordsWorld) -> LearnedProxy:
    return world.learned_proxy(100)


# --- gold ------------------------------------------------------------------------------------------


def test_gold_counts_keywords_and_pairs_by_hand(world: KeywordsWorld) -> None:
    assert len(world.keywords) == 4 and set(world.keywords) < set(LETTERS)
    assert LETTERS == "abcdefghijkl"
    for text, gold in zip(TEXTS, world.gold([], TEXTS), strict=True):
        counts = Counter(text)
        reward = -sum(abs(counts[keyword] - 3) / 1.5 for keyword in world.keywords)
        for before, after in zip(text, text[1:], strict=False):
            reward += world.bonus[LETTERS.index(before), LETTERS.index(after)]
        assert gold == pytest.approx((reward - world.mean) / world.deviation, abs=1e-12)


def test_gold_does_not_depend_on_batch_mates(world: KeywordsWorld) -> None:
    texts = world.sample(300)
    assert world.gold([], texts).tolist() == [world.gold([], [text]).item() for text in texts]
    assert world.gold([], []).shape == (0,)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gold_has_mean_zero_and_variance_one_under_the_reference(seed: int) -> None:
    """Within four standard errors of two samples, one of them the world's own."""
    world, n = KeywordsWorld.make(seed), 2**16
    gold = world.gold([], world.sample(n))
    error = math.sqrt(1 / n + 1 / 2**17)
    assert abs(gold.mean()) < 4 * error
    assert abs(gold.var() - 1) < 4 * error * np.std((gold - gold.mean()) ** 2)


@pytest.mark.parametrize("text", ["", "a" * 15, "a" * 17, "a" * 15 + "m", "a" * 15 + "A", "aaaaaaa aaaaaaaa", "é" * 16])
def test_text_that_is_no_response_of_this_world(world: KeywordsWorld, proxy: LearnedProxy, text: str) -> None:
    for score in (world.gold, proxy.score):
        with pytest.raises(RewardError, match="response 1 is .* 16 of the letters abcdefghijkl"):
            score(["a", "a"], ["a" * 16, text])


# --- the reference ---------------------------------------------------------------------------------


def test_samples_come_from_the_reference(world: KeywordsWorld) -> None:
    """The mean log-likelihood of a sample is minus the entropy, which a chain of bigrams has in closed form."""
    table = world.reference.logits.detach().double().softmax(1)
    here, expected = torch.eye(12, dtype=torch.float64)[0], 0.0
    for _ in range(16):
        expected += (here @ (table * table.log()).sum(1)).item()
        here = here @ table
    ids = [[LETTERS.index(letter) for letter in text] for text in world.sample(4000)]
    rollout = make_rollout(world.reference, [[0]] * len(ids), ids)
    assert rollout.law == SamplingLaw(12, None)
    log_likelihood = world.reference.evaluate(rollout)[0].sum(1).detach()
    assert abs(log_likelihood.mean().item() - expected) < 4 * log_likelihood.std().item() / math.sqrt(len(ids))


def test_a_larger_sample_begins_with_the_smaller_one(world: KeywordsWorld) -> None:
    assert world.sample(50)[:20] == world.sample(20) != world.sample(20, seed=1)


def test_text_survives_the_tokenizer(world: KeywordsWorld) -> None:
    tokenizer = world.reference.tokenizer
    for text in TEXTS + world.sample(20):
        ids = tokenizer.encode(text)
        assert ids == [LETTERS.index(letter) for letter in text] and tokenizer.decode(ids) == text


def test_a_world_is_its_seed(world: KeywordsWorld) -> None:
    torch.manual_seed(4)
    again, other = KeywordsWorld.make(), KeywordsWorld.make(1)
    assert (again.keywords, again.mean, again.deviation) == (world.keywords, world.mean, world.deviation)
    assert torch.equal(again.reference.logits, world.reference.logits)
    assert np.array_equal(again.bonus, world.bonus) and not np.array_equal(other.bonus, world.bonus)
    assert not torch.equal(other.reference.logits, world.reference.logits)
    assert again.learned_proxy(7).worth.tobytes() == world.learned_proxy(7).worth.tobytes()


# --- a learned proxy -------------------------------------------------------------------------------


def test_a_proxy_is_a_sum_over_neighbours_with_mean_zero_and_variance_one(
    world: KeywordsWorld, proxy: LearnedProxy
) -> None:
    worth = [[proxy.worth[LETTERS.index(a), LETTERS.index(b)] for a, b in zip(t, t[1:], strict=False)] for t in TEXTS]
    np.testing.assert_allclose(proxy.score([], TEXTS), np.sum(worth, 1), rtol=0, atol=1e-12)
    score = proxy.score([], world.sample(2**16, seed=5))
    assert abs(score.mean()) < 0.02 and abs(score.std() - 1) < 0.02


def test_more_comparisons_make_a_better_proxy(world: KeywordsWorld) -> None:
    texts = world.sample(5000)
    gold = world.gold([], texts)
    agreement = [np.corrcoef(world.learned_proxy(m).score([], texts), gold)[0, 1] for m in (100, 1000, 10_000)]
    assert agreement[0] + 0.2 < agreement[1] < agreement[2]


def test_proxies_of_other_comparisons_differ(world: KeywordsWorld, proxy: LearnedProxy) -> None:
    assert not np.allclose(world.learned_proxy(100, seed=1).worth, proxy.worth)
    with pytest.raises(ConfigError, match="at least 1 comparison, got 0"):
        world.learned_proxy(0)


# --- the optimum of a proxy --------------------------------------------------------------------------


def table_log_prob(table: np.ndarray, text: str) -> float:
    letters = [LETTERS.index(letter) for letter in "a" + text]
    return sum(table[t, a, b] for t, (a, b) in enumerate(zip(letters, letters[1:], strict=False)))


@pytest.mark.parametrize("beta", [0.05, 0.5, 4.0])
def test_the_optimum_is_the_reference_times_exp_proxy_over_beta(
    world: KeywordsWorld, proxy: LearnedProxy, beta: float
) -> None:
    """π* / (ref · exp(proxy/β)) is one number for all responses, and π* is normalised at every step."""
    best = world.optimal_log_probs(proxy, beta)
    np.testing.assert_allclose(np.exp(best).sum(2), 1, rtol=0, atol=1e-12)
    texts = TEXTS + world.sample(50)
    log_ratio = [table_log_prob(best, text) - table_log_prob(world.ref_log_probs, text) for text in texts]
    log_z = proxy.score([], texts) / beta - log_ratio
    np.testing.assert_allclose(log_z, log_z[0], rtol=0, atol=1e-9)
    value = beta * log_z[0]  # = E[proxy] − β KL, here with the proxy's mean over 20,000 responses
    score = proxy.score([], world.sample(20_000, log_probs=best))
    assert abs(score.mean() - beta * world.kl(best) - value) < 4 * score.std() / math.sqrt(20_000) + 1e-12


def test_kl_of_a_table(world: KeywordsWorld, proxy: LearnedProxy) -> None:
    assert world.kl(world.ref_log_probs) == 0
    always = np.full((16, 12, 12), -np.inf)
    always[:, :, 3] = 0  # "dddddddddddddddd", whatever happens
    assert world.kl(always) == pytest.approx(-table_log_prob(world.ref_log_probs, "d" * 16), abs=1e-12)
    assert world.sample(2, log_probs=always) == ["d" * 16] * 2
    assert world.kl(world.optimal_log_probs(proxy, 1e6)) == pytest.approx(0, abs=1e-9)
    assert np.array_equal(world.optimal_log_probs(proxy), world.optimal_log_probs(proxy, world.beta))
    with pytest.raises(ConfigError, match="beta must be positive, got 0"):
        world.optimal_log_probs(proxy, 0)


# --- over-optimization -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_optimizing_a_proxy_of_100_comparisons_raises_gold_and_then_ruins_it(seed: int) -> None:
    """Along the proxy's exact frontier, 4,096 samples at each β: differences of more than 0.3 are beyond chance."""
    world = KeywordsWorld.make(seed)
    proxy = world.learned_proxy(100)
    scores, golds, kls = [], [], []
    for beta in (4.0, 2.0, 1.0, 0.5, 0.25, 0.12, 0.06):
        best = world.optimal_log_probs(proxy, beta)
        texts = world.sample(4096, log_probs=best)
        scores.append(proxy.score([], texts).mean())
        golds.append(world.gold([], texts).mean())
        kls.append(world.kl(best))
    assert (np.diff(scores) > 0).all() and (np.diff(kls) > 0).all()
    peak = int(np.argmax(golds))
    assert 0 < peak < len(golds) - 1
    assert golds[peak] - golds[0] > 0.3 and golds[peak] - golds[-1] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_of_4096_by_a_proxy_gains_less_and_less_of_what_it_promises(seed: int) -> None:
    """Not so far that gold falls in every world: best-of-n stays near the reference."""
    world = KeywordsWorld.make(seed)
    proxy, texts = world.learned_proxy(100), world.sample(2**17)
    score, gold = (torch.from_numpy(f([], texts)) for f in (proxy.score, world.gold))
    ns = [4**k for k in range(7)]
    promised = np.diff([best_of_n(score, n).item() for n in ns])
    gained = np.diff([best_of_n(score, n, gold).item() for n in ns])
    assert (promised > 0.2).all()
    assert gained[0] > 0.3 and gained[3:].max() < gained[0] / 1.5
    assert gained.sum() < 0.55 * best_of_n(gold, ns[-1]).item()


# --- as an environment -----------------------------------------------------------------------------


def test_an_episode_is_scored_by_gold_or_by_the_proxy(world: KeywordsWorld) -> None:
    for comparisons, score in ((0, world.gold), (30, world.learned_proxy(30).score)):
        env = make_env(proxy_comparisons=comparisons, kl_mode="off")
        env.reset(seed=0)
        for letter in "eeeggghhhkkkabc":
            assert env.step(LETTERS.index(letter))[1:3] == (0.0, False)
        _, reward, terminated, _, info = env.step(3)
        assert terminated and info["stop_reason"] == "length"
        assert reward == info["score"] == score([], [TEXTS[3]]).item()


def test_environments_of_one_world_share_it() -> None:
    one, two = make_env(), make_vector_env(num_envs=2)
    assert one.task.reference is two.task.reference
    assert one.beta == 0.1 and make_env(beta=0.3).beta == 0.3
    assert make_env(world_seed=1).task.reference is not one.task.reference


def test_the_policy_starts_as_the_reference(world: KeywordsWorld) -> None:
    rollout = make_rollout(world.reference, [[0]], [[LETTERS.index(letter) for letter in TEXTS[1]]])
    policy = world.policy()
    assert torch.equal(policy.evaluate(rollout)[0], world.reference.evaluate(rollout)[0])
    assert any(p.requires_grad for p in policy.parameters())
