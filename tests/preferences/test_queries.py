"""Queries: what each rule says a pair is worth, which are chosen, and how many labels each round gets."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.queries import (
    ACQUISITIONS,
    bald,
    differing,
    disagreement,
    double_thompson,
    label_schedule,
    pair_leads,
    predictive_entropy,
    select,
    uniform,
)

LOG2, LOG3 = math.log(2), math.log(3)
WORTH = [rule for rule in ACQUISITIONS if rule != "uniform"]
RULES = [*ACQUISITIONS, "double_thompson"]


def scores_of(members: int, prompts: int, responses: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(members, prompts, responses))


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


# --- what a pair is worth


def test_two_members_with_opposite_minds_by_hand():
    """One says 3/4, the other 1/4: mean ½, deviation ¼, and each is only 0.5623 nats unsure."""
    leads = [LOG3, -LOG3]
    assert disagreement(leads) == pytest.approx(0.25)
    assert predictive_entropy(leads) == pytest.approx(LOG2)
    assert bald(leads) == pytest.approx(LOG2 - 0.5623351446188083)


def test_three_members_by_hand():
    """P = 1/2, 2/3, 5/6: mean 2/3, deviation √(2/108), entropies of ½, ⅔ and ⅚."""
    leads = [0.0, LOG2, math.log(5)]
    assert disagreement(leads) == pytest.approx(math.sqrt(2 / 108))
    assert predictive_entropy(leads) == pytest.approx(entropy(2 / 3))
    assert bald(leads) == pytest.approx(entropy(2 / 3) - (LOG2 + entropy(2 / 3) + entropy(5 / 6)) / 3)


def test_entropy_seeks_coins_that_bald_and_disagreement_know_to_be_coins():
    coin, quarrel, sure = [0.0, 0.0], [4.0, -4.0], [9.0, 9.0]
    leads = np.transpose([coin, quarrel, sure])  # [members, pairs]
    np.testing.assert_allclose(predictive_entropy(leads), [LOG2, LOG2, entropy(1 / (1 + math.exp(-9)))])
    assert bald(leads)[1] > 0.6 and disagreement(leads)[1] > 0.48
    np.testing.assert_allclose([bald(leads)[[0, 2]], disagreement(leads)[[0, 2]]], 0, atol=1e-12)


def test_leads_without_bounds_stay_numbers():
    leads = np.array([[1e4, 800.0, 0.0], [-1e4, 900.0, 0.0]])
    np.testing.assert_allclose(disagreement(leads), [0.5, 0, 0], atol=1e-12)
    np.testing.assert_allclose(predictive_entropy(leads), [LOG2, 0, LOG2], atol=1e-12)
    np.testing.assert_allclose(bald(leads), [LOG2, 0, 0], atol=1e-12)


def test_every_pair_is_worth_what_it_is_worth_when_listed():
    scores = scores_of(3, 4, 5)
    leads = pair_leads(scores)
    assert leads.shape == (3, 4, 5, 5) and leads[1, 2, 3, 4] == scores[1, 2, 3] - scores[1, 2, 4]
    for worth in ACQUISITIONS.values():
        every, listed = worth(leads), worth(scores[:, :, 1] - scores[:, :, 3])
        assert every.shape == (4, 5, 5)
        np.testing.assert_allclose(every[:, 1, 3], listed)
        np.testing.assert_allclose(every, every.swapaxes(1, 2), atol=1e-12)  # who stands first does not matter


@pytest.mark.parametrize("rule", WORTH)
def test_only_differences_within_a_prompt_count_and_members_have_no_order(rule):
    scores, rng = scores_of(4, 6, 3), np.random.default_rng(1)
    worth = ACQUISITIONS[rule]
    shifted = scores + rng.normal(size=(4, 6, 1))  # a number for each member and prompt
    np.testing.assert_allclose(worth(pair_leads(shifted)), worth(pair_leads(scores)), atol=1e-12)
    np.testing.assert_allclose(worth(pair_leads(scores[[2, 0, 3, 1]])), worth(pair_leads(scores)), atol=1e-12)
    first, second = (select(rule, x, 3, np.random.default_rng(0)) for x in (scores, shifted[[3, 2, 1, 0]]))
    assert first.tolist() == second.tolist()


def test_bald_is_the_mean_divergence_of_the_members_from_their_mean():
    """H(mean p) − mean H(p) = mean over members of KL(p_m ‖ mean p), which is never negative."""
    leads = scores_of(5, 7, 2)[:, :, 0]
    p = 1 / (1 + np.exp(-leads))
    mean = p.mean(0)
    kl = p * np.log(p / mean) + (1 - p) * np.log((1 - p) / (1 - mean))
    np.testing.assert_allclose(bald(leads), kl.mean(0))


def test_one_member_has_nobody_to_disagree_with():
    leads = scores_of(1, 5, 2)[:, :, 0]
    assert not disagreement(leads).any() and not bald(leads).any() and not uniform(leads).any()


# --- which are chosen


def test_the_best_pair_of_each_prompt_and_the_best_prompts_are_chosen():
    # Two members who agree but for one response: of prompt 0 (by 1), of prompt 1 (by 3), of prompt 2 (not at all).
    scores = np.zeros((2, 3, 3))
    scores[0, 0, 2], scores[0, 1, 1] = 1.0, 3.0
    rng = np.random.default_rng(0)
    assert select("disagreement", scores, 1, rng)[0, 0] == 1
    chosen = select("disagreement", scores, 2, rng)
    assert chosen[:, 0].tolist() == [0, 1]
    assert 2 in chosen[0, 1:] and 1 in chosen[1, 1:]  # a pair with the response that they differ about


@pytest.mark.parametrize("rule", RULES)
def test_a_prompt_is_asked_once_and_a_pair_is_of_two(rule):
    chosen = select(rule, scores_of(3, 20, 4), 12, np.random.default_rng(5))
    assert chosen.shape == (12, 3) and chosen.dtype == np.int64
    assert len(set(chosen[:, 0].tolist())) == 12 and (np.diff(chosen[:, 0]) > 0).all()
    assert (chosen[:, 1] != chosen[:, 2]).all() and chosen[:, 1:].min() >= 0 and chosen[:, 1:].max() < 4


@pytest.mark.parametrize("rule", RULES)
def test_the_seed_decides(rule):
    scores = np.zeros((2, 30, 4)) if rule in WORTH else scores_of(2, 30, 4)  # where there is anything to decide
    one, same, other = (select(rule, scores, 10, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("rule", RULES)
def test_identical_texts_are_never_compared(rule):
    texts = [("a", "a", "b"), ("c", "c", "c"), ("d", "e", "d")]
    allowed = differing(texts)
    assert allowed[0].tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    scores = np.array([[[9.0, 9, 0], [0, 0, 0], [9, 0, 9]], [[9.0, 9, 1], [1, 1, 1], [8, 0, 8]]])
    for seed in range(20):
        chosen = select(rule, scores, 3, np.random.default_rng(seed), allowed)
        assert chosen[:, 0].tolist() == [0, 2]  # prompt 1 has nothing to ask
        assert all(texts[n][i] != texts[n][j] for n, i, j in chosen)


def test_what_is_allowed_in_one_order_only_is_not_allowed():
    allowed = np.zeros((1, 2, 2), dtype=bool)
    allowed[0, 0, 1] = True
    assert len(select("uniform", np.zeros((1, 1, 2)), 1, np.random.default_rng(0), allowed)) == 0


def binomial_bounds(n: int, p: float, tail: float = 1e-4) -> tuple[int, int]:
    """The exact quantiles of a binomial count: outside them with probability of at most 2 · `tail`."""
    log_ways = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    mass = np.exp([ways + k * math.log(p) + (n - k) * math.log1p(-p) for k, ways in enumerate(log_ways)])
    return int(np.searchsorted(mass.cumsum(), tail)), n - int(np.searchsorted(mass[::-1].cumsum(), tail))


def test_binomial_bounds_by_hand():
    assert binomial_bounds(2, 0.5, tail=0.2) == (0, 2) and binomial_bounds(2, 0.5, tail=0.3) == (1, 1)


def in_binomial_bounds(counts: Counter, probabilities: dict) -> bool:
    n = sum(counts.values())
    bounds = {key: binomial_bounds(n, p) for key, p in probabilities.items()}
    return set(counts) <= set(bounds) and all(low <= counts[key] <= high for key, (low, high) in bounds.items())


@pytest.mark.parametrize("rule", [*ACQUISITIONS])
def test_ties_are_broken_evenly(rule):
    """Equal scores: every one of 3 prompts × 3 pairs is as likely."""
    scores = np.ones((2, 3, 3))
    counts = Counter(tuple(select(rule, scores, 1, np.random.default_rng(seed))[0].tolist()) for seed in range(900))
    pairs = [(n, i, j) for n in range(3) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert in_binomial_bounds(counts, dict.fromkeys(pairs, 1 / 9))


# --- double Thompson sampling


def enumerated(scores: np.ndarray, draws: int, allowed: np.ndarray) -> dict[tuple[int, int], float]:
    """P(pair) by listing every sequence of members; for members with one best response each."""
    members, k = scores.shape
    found: dict[tuple[int, int], float] = {}
    for sequence in itertools.product(range(members), repeat=draws + 1):
        first, *later = (int(scores[m].argmax()) for m in sequence)
        second = next((best for best in later if allowed[first, best]), None)
        ways = [second] if second is not None else [j for j in range(k) if allowed[first, j]]
        for j in ways:
            found[first, j] = found.get((first, j), 0.0) + members ** -(draws + 1) / len(ways)
    return found


BESTS = np.array([[3.0, 1, 0, 2], [5.0, 1, 0, 2], [0.0, 1, 2, 0], [2.0, 3, 0, 1]])  # bests 0, 0, 2, 1


def test_enumeration_of_double_thompson_by_hand():
    """Bests 0, 0, 2, 1 and one draw: 0 then 1 is ½ · ¼ = ⅛, and with a vain draw, ½ · ½ · ⅓ = 1/12, 5/24 in all."""
    exact = enumerated(BESTS, 1, ~np.eye(4, dtype=bool))
    assert sum(exact.values()) == pytest.approx(1)
    assert exact[0, 1] == pytest.approx(5 / 24) and exact[0, 3] == pytest.approx(1 / 12)
    assert exact[1, 0] == pytest.approx(1 / 4 * (1 / 2 + 1 / 4 * 1 / 3))
    assert exact.get((3, 0)) is None  # nobody's best is never first


@pytest.mark.parametrize("draws", [0, 1, 4])
@pytest.mark.parametrize("alike", [None, (0, 1)])
def test_double_thompson_has_the_enumerated_probabilities(draws, alike):
    allowed = ~np.eye(4, dtype=bool)
    if alike is not None:
        allowed[alike] = allowed[alike[::-1]] = False
    counts = Counter(
        double_thompson(BESTS, np.random.default_rng([draws, seed]), draws=draws, allowed=allowed)
        for seed in range(2000)
    )
    assert in_binomial_bounds(counts, enumerated(BESTS, draws, allowed))


def test_double_thompson_draws_among_equals_and_asks_of_no_lonely_response():
    scores, rng = np.zeros((3, 4)), np.random.default_rng(0)
    assert {double_thompson(scores, rng) for _ in range(400)} == {*itertools.permutations(range(4), 2)}
    allowed = np.zeros((4, 4), dtype=bool)
    allowed[1, 2] = allowed[2, 1] = True  # the other two have nobody to be compared with
    assert {double_thompson(BESTS, rng, allowed=allowed) for _ in range(50)} == {(1, 2), (2, 1)}


def test_double_thompson_asks_about_the_bests_only_where_members_differ():
    chosen = select("double_thompson", np.repeat(BESTS[:, None], 200, axis=1), 200, np.random.default_rng(0))
    assert set(chosen[:, 1:].ravel().tolist()) == {0, 1, 2}  # 3 is nobody's best; 30 draws are never in vain


# --- how many


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [10, 30, 30, 30]),
        # 90 in proportion to 1, 2/3, 1/2: 41.54, 27.69, 20.77; the two left over go to 27.69 and 20.77.
        ("hyperbolic", [10, 41, 28, 21]),
        # … to 1, 4/5, 1/2: 39.13, 31.30, 19.57.
        ("inverse_quadratic", [10, 39, 31, 20]),
    ],
)
def test_schedules_by_hand(kind, expected):
    assert label_schedule(100, 4, kind) == expected


@pytest.mark.parametrize(("total", "initial"), [(100, 0.29), (100, 0.57), (1000, 0.115), (10, 0.7)])
def test_the_first_round_gets_the_share_that_is_written(total, initial):
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert label_schedule(total, 2, initial=initial)[0] == {0.29: 29, 0.57: 57, 0.115: 115, 0.7: 7}[initial]


@pytest.mark.parametrize("kind", ["constant", "hyperbolic", "inverse_quadratic"])
def test_a_schedule_adds_up_and_does_not_rise_after_the_first(kind):
    for total, rounds, initial in itertools.product((40, 97, 1000), (1, 2, 3, 7), (0.05, 0.1, 0.5)):
        schedule = label_schedule(total, rounds, kind, initial)
        assert sum(schedule) == total and len(schedule) == rounds
        if rounds > 1:
            assert schedule[0] == math.floor(total * initial)
        assert all(later <= before for before, later in itertools.pairwise(schedule[1:]))


# --- mistakes


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: label_schedule(5, 4), ConfigError, r"leave a round without any: \[0, 2, 2, 1\]; give more labels"),
        (lambda: label_schedule(50, 0), ConfigError, "at least 1 round"),
        (lambda: label_schedule(50, 2, initial=1.0), ConfigError, "a share between 0 and 1"),
        (lambda: label_schedule(50, 2, "linear"), ConfigError, "no schedule 'linear': choose one of constant, hyp"),
        (lambda: select("best", np.zeros((1, 1, 2)), 1, None), ConfigError, "no rule 'best' .* disagreement, entropy"),
        (lambda: select("bald", np.zeros((1, 2)), 1, None), DataError, r"\[members, prompts, responses ≥ 2\]"),
        (lambda: select("bald", np.zeros((2, 3, 1)), 1, None), DataError, r"they are \[2, 3, 1\]"),
        (lambda: select("bald", [[[0, 1]], [[0, math.nan]]], 1, None), DataError, "member 1 .* prompt 0 .* not finite"),
        (
            lambda: select("bald", np.zeros((2, 3, 2)), 1, None, np.ones((3, 2))),
            DataError,
            r"allowed must be \[3, 2, 2\]",
        ),
        (
            lambda: double_thompson(np.zeros((2, 2)), np.random.default_rng(0), allowed=np.zeros((2, 2))),
            DataError,
            "no pair of responses that may be compared",
        ),
    ],
)
def test_a_mistake_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
