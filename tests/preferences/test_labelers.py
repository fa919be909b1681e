"""Simulated labelers: what they answer follows the laws they are said to follow."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, DataError, RewardError
from rlhf_env.preferences.labelers import (
    LabelerConfig,
    SimulatedLabeler,
    label_agreement,
    preference_probability,
    present,
    utilities_of,
)
from rlhf_env.types import Comparison
from tests.preferences.binomial import assert_share

N = 10_000


def gold(prompts, responses):
    """A response is its own utility, written as a number."""
    return [float(response) for response in responses]


def answers(utilities, count=N, *, seed=0, **config):
    """`count` answers to queries that all show responses of these utilities."""
    labeler = SimulatedLabeler(gold, LabelerConfig(**config), seed=seed)
    shown = [repr(float(u)) for u in utilities]
    return labeler.rank(["p"] * count, [shown] * count, range(count))


def assert_frequencies(found, probabilities):
    """Each answer occurs as often as its probability says, within 4 standard errors, and no other occurs."""
    total, counts = len(found), Counter(found)
    assert set(counts) <= set(probabilities)
    for answer, p in probabilities.items():
        assert counts[answer] / total == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / total)), answer


# --- the law of the answers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "temperature", "p"),
    [
        (0.0, 1.0, 1 / 2),
        (math.log(3), 1.0, 3 / 4),
        (math.log(3), 0.5, 9 / 10),
        (-math.log(4), 2.0, 1 / 3),
        (0.25, 0.25, 0.7310585786300049),  # one temperature: e / (1 + e)
    ],
)
def test_a_pair_follows_bradley_terry(difference, temperature, p):
    found = answers([difference, 0.0], temperature=temperature)
    assert_frequencies(found, {(0, 1): p, (1, 0): 1 - p})


# Utilities ln 1, ln 2, ln 5 at temperature 1: the best is 1/8, 2/8 or 5/8 likely, and so on among those left.
PLACKETT_LUCE = {  # ranks of the three: probability
    (0, 1, 2): 1 / 8 * 2 / 7,
    (0, 2, 1): 1 / 8 * 5 / 7,
    (1, 0, 2): 2 / 8 * 1 / 6,
    (2, 0, 1): 2 / 8 * 5 / 6,
    (1, 2, 0): 5 / 8 * 1 / 3,
    (2, 1, 0): 5 / 8 * 2 / 3,
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_ranking_of_three_follows_plackett_luce(temperature):
    utilities = [temperature * math.log(weight) for weight in (1, 2, 5)]
    assert_frequencies(answers(utilities, temperature=temperature), PLACKETT_LUCE)


def test_a_flip_turns_the_whole_ranking_upside_down():
    utilities = [math.log(weight) for weight in (1, 2, 5)]
    flipped = {tuple(2 - rank for rank in ranks): p for ranks, p in PLACKETT_LUCE.items()}
    mixture = {ranks: 0.8 * p + 0.2 * flipped[ranks] for ranks, p in PLACKETT_LUCE.items()}
    assert_frequencies(answers(utilities, temperature=1.0, flip_rate=0.2), mixture)


def test_each_pair_of_a_ranking_is_a_bradley_terry_pair_flips_included():
    found = answers([math.log(weight) for weight in (1, 2, 5)], temperature=1.0, flip_rate=0.1)
    for i, j, p in [(0, 1, 1 / 3), (0, 2, 1 / 6), (1, 2, 2 / 7)]:
        observed = 0.9 * p + 0.1 * (1 - p)
        assert_frequencies([ranks[i] < ranks[j] for ranks in found], {True: observed, False: 1 - observed})


def test_flips_come_at_their_rate_where_there_is_no_other_noise():
    assert_frequencies(answers([1.0, 0.0], temperature=0.0, flip_rate=0.3), {(0, 1): 0.7, (1, 0): 0.3})


def test_flip_rate_one_reverses_every_answer():
    plain = answers([0.1, 0.3, 0.2, 0.3], 100, temperature=0.2)
    assert len(set(plain)) > 10
    assert answers([0.1, 0.3, 0.2, 0.3], 100, temperature=0.2, flip_rate=1.0) == [
        tuple(3 - rank for rank in ranks) for ranks in plain
    ]


def test_at_temperature_zero_the_order_is_golds_and_equal_utilities_are_a_tie():
    assert set(answers([0.5, 2.0, 0.5, -1.0], 50, temperature=0.0)) == {(1, 0, 1, 2)}
    assert set(answers([0.0, -0.0], 50, temperature=0.0)) == {(0, 0)}
    assert set(answers([0.5, 2.0, 0.5, -1.0], 50, temperature=0.0, flip_rate=1.0)) == {(1, 2, 1, 0)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0.0, 1e-12, 0.25, 1e6])
def test_extreme_utilities_are_nothing_special(temperature):
    found = answers([1e6, -1e6, 0.0], 100, temperature=temperature)
    assert {tuple(sorted(ranks)) for ranks in found} == {(0, 1, 2)}
    if temperature < 1:
        assert set(found) == {(0, 2, 1)}
    settled = LabelerConfig(temperature=temperature or 1.0)
    assert np.isfinite(preference_probability([1e6, -1e6, 2e6, 0.0], settled)).all()


def test_answers_are_plain_integers_that_make_a_comparison():
    ranks = answers([0.1, 0.2, 0.3], 1)[0]
    assert isinstance(ranks, tuple) and {type(rank) for rank in ranks} == {int}
    assert Comparison("p", ("a", "b", "c"), ranks).ranks == ranks


# --- what an answer depends on ---------------------------------------------------------------------

PROMPTS = [f"prompt {i}" for i in range(40)]
RESPONSES = [[str(0.1 * ((7 * i + 3 * j) % 10)) for j in range(2 + i % 4)] for i in range(40)]
QUERIES = [1000 - 3 * i for i in range(40)]


def test_an_answer_does_not_depend_on_what_else_is_asked():
    labeler = SimulatedLabeler(gold, LabelerConfig(temperature=0.5, flip_rate=0.2), seed=11)
    together = labeler.rank(PROMPTS, RESPONSES, QUERIES)
    alone = [labeler.rank([p], [r], [q])[0] for p, r, q in zip(PROMPTS, RESPONSES, QUERIES, strict=True)]
    backwards = labeler.rank(PROMPTS[::-1], RESPONSES[::-1], QUERIES[::-1])
    assert together == alone == backwards[::-1]
    more = [[*those, "0.5", "0.7"] if i % 2 else those for i, those in enumerate(RESPONSES)]  # a larger K elsewhere
    assert labeler.rank(PROMPTS, more, QUERIES)[::2] == together[::2]


def test_seeds_and_queries_err_differently():
    one, other = answers([0.0, 0.0], 2000, seed=1), answers([0.0, 0.0], 2000, seed=2)
    assert_frequencies(
        list(zip(one, other, strict=True)), dict.fromkeys(itertools.product([(0, 1), (1, 0)], repeat=2), 0.25)
    )
    assert_frequencies(
        list(zip(one, one[1:], strict=False)), dict.fromkeys(itertools.product([(0, 1), (1, 0)], repeat=2), 0.25)
    )


def test_gold_is_asked_once_for_all_responses_with_their_prompts():
    calls = []

    def watched(prompts, responses):
        calls.append((prompts, responses))
        return gold(prompts, responses)

    SimulatedLabeler(watched).rank(["p", "q"], [["1", "2"], ["3", "4", "5"]], [0, 1])
    assert calls == [(["p", "p", "q", "q", "q"], ["1", "2", "3", "4", "5"])]


def test_no_queries_are_no_answers_and_gold_is_not_asked():
    assert SimulatedLabeler(lambda *_: 1 / 0).rank([], [], []) == []


def test_a_gold_that_is_not_finite_is_refused_with_its_row():
    labeler = SimulatedLabeler(lambda prompts, responses: [math.nan if r == "bad" else 0.0 for r in responses])
    with pytest.raises(RewardError, match='the first is nan in row 3, for the response "bad"'):
        labeler.rank(["p", "q"], [["a", "b"], ["c", "bad"]], [0, 1])


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(DataError, match="2 prompts cannot be ranked as 1 queries"):
        SimulatedLabeler(gold).rank(["p", "q"], [["1", "2"], ["1", "2"]], [0])
    with pytest.raises(DataError, match="2 prompts were given with the responses to 1"):
        SimulatedLabeler(gold).rank(["p", "q"], [["1", "2"]], [0, 1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, it is -0.1"),
        ({"temperature": math.inf}, "temperature must be at least 0 and finite, it is inf"),
        ({"temperature": math.nan}, "temperature must be at least 0 and finite, it is nan"),
        ({"flip_rate": -0.1}, "flip_rate must be between 0 and 1, it is -0.1"),
        ({"flip_rate": 1.1}, "flip_rate must be between 0 and 1, it is 1.1"),
        ({"flip_rate": math.nan}, "flip_rate must be between 0 and 1, it is nan"),
    ],
)
def test_impossible_errors_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        LabelerConfig(**config)


# --- the order of presentation ---------------------------------------------------------------------


def test_every_order_of_presentation_is_as_likely():
    orders = [present(3, 0, query) for query in range(6000)]
    assert_frequencies(orders, dict.fromkeys(itertools.permutations(range(3)), 1 / 6))
    assert present(3, 0, 5) == orders[5]
    assert [present(3, 1, query) for query in range(100)] != orders[:100]
    assert {type(i) for i in orders[0]} == {int}


def test_who_wins_has_nothing_to_do_with_who_is_shown_first():
    pairs = list(zip((present(2, 0, query) for query in range(4000)), answers([0.0, 0.0], 4000), strict=True))
    assert_frequencies(pairs, dict.fromkeys(itertools.product([(0, 1), (1, 0)], repeat=2), 0.25))


# --- probabilities and agreement -------------------------------------------------------------------


def test_the_probability_of_a_label_by_hand():
    p = preference_probability([math.log(3), 0.0, -math.log(3)], LabelerConfig(temperature=1.0, flip_rate=0.1))
    assert p.tolist() == pytest.approx([0.9 * 0.75 + 0.1 * 0.25, 0.5, 0.9 * 0.25 + 0.1 * 0.75])
    p = preference_probability([[2.0, 0.0, -1e-9]], LabelerConfig(temperature=0.0, flip_rate=0.1))
    assert p.tolist() == [pytest.approx([0.9, 0.5, 0.1])]
    assert preference_probability(-40.0, LabelerConfig(temperature=1.0)) == pytest.approx(math.exp(-40), rel=1e-12)


def test_utilities_are_grouped_as_the_responses_are():
    found = utilities_of(gold, ["p", "q"], [["1", "2"], ["3", "4", "5"]])
    assert [u.tolist() for u in found] == [[1.0, 2.0], [3.0, 4.0, 5.0]]
    assert utilities_of(gold, [], []) == []


def test_agreement_by_hand():
    labels = [Comparison(prompt, ("a", "b"), (0, 1) if prompt in "pqr" else (1, 0)) for prompt in "pqrs"]
    found = label_agreement(labels, [[1.0, 0.0]] * 4)
    assert found["label_agreement"] == 0.75
    # Wilson (1927) for 3 of 4, worked out separately: (0.75 + z²/8 ± z √(0.1875/4 + z²/64)) / (1 + z²/4), z = 1.95996
    assert found["label_agreement_low"] == pytest.approx(0.30064, abs=1e-5)
    assert found["label_agreement_high"] == pytest.approx(0.95441, abs=1e-5)


def test_ties_of_either_side_are_not_counted():
    tie, right = Comparison("p", ("a", "b"), (0, 0)), Comparison("p", ("a", "b"), (0, 1))
    alone = label_agreement([right], [[1.0, 0.0]])
    assert alone["label_agreement"] == 1.0
    assert label_agreement([tie, right, right], [[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]]) == alone
    assert label_agreement([tie], [[1.0, 0.0]]) == label_agreement([], []) == {}


def test_a_prompt_gives_its_pairs_but_is_one_observation():
    ranking = Comparison("p", ("a", "b", "c"), (0, 1, 2))
    found = label_agreement([ranking, ranking], [[3.0, 2.0, 1.0], [2.0, 3.0, 1.0]])  # 3 of 3 and 2 of 3 pairs
    assert found["label_agreement"] == pytest.approx(5 / 6)
    z2, p, n = 1.959963984540054**2, 5 / 6, 1
    half = math.sqrt(z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    assert found["label_agreement_high"] - found["label_agreement_low"] == pytest.approx(2 * half)


def test_agreement_is_what_the_probabilities_promise():
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(5000, 2))
    config = LabelerConfig(temperature=0.5, flip_rate=0.1)
    shown = [[repr(float(u)) for u in pair] for pair in pairs]
    ranks = SimulatedLabeler(gold, config, seed=4).rank(["p"] * 5000, shown, range(5000))
    comparisons = [Comparison("p", tuple(those), r) for those, r in zip(shown, ranks, strict=True)]
    sigmoid = 1 / (1 + np.exp(-np.abs(pairs[:, 0] - pairs[:, 1]) / 0.5))
    expected = float(np.mean(0.9 * sigmoid + 0.1 * (1 - sigmoid)))
    found = label_agreement(comparisons, list(pairs))["label_agreement"]
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 5000))


def test_utilities_that_do_not_fit_are_refused():
    pair = Comparison("p", ("a", "b"), (0, 1))
    with pytest.raises(DataError, match=r"comparison 1 has 2 responses, but utilities of shape \[3\]"):
        label_agreement([pair, pair], [[1.0, 0.0], [1.0, 0.0, 2.0]])
    with pytest.raises(DataError, match="1 comparisons were given with the utilities of 0"):
        label_agreement([pair], [])


# --- thresholds, places, distance, fatigue ---------------------------------------------------------


def test_present_settings_answer_as_they_always_did():
    assert answers([0.1, 0.3, 0.2], 12, seed=11, temperature=0.5, flip_rate=0.2) == [
        *((1, 2, 0), (2, 0, 1), (1, 2, 0), (2, 1, 0), (1, 0, 2), (1, 0, 2)),
        *((2, 1, 0), (0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 1, 0), (1, 2, 0)),
    ]


LOG3 = math.log(3)

# P(the first of utilities (difference, 0), which is shown first, is preferred), each by hand:
# σ(log 3) = 3/4, σ(2 log 3) = 9/10, σ(3 log 3) = 27/28.
BY_HAND = {
    "a bonus of one difference": (LOG3, {"temperature": 1.0, "first_bonus": LOG3}, 9 / 10),
    "a bonus the other way": (LOG3, {"temperature": 1.0, "first_bonus": -LOG3}, 1 / 2),
    "a bonus is in units of gold": (LOG3, {"temperature": 0.5, "first_bonus": LOG3 / 2}, 27 / 28),
    "a bonus without noise": (-0.1, {"temperature": 0.0, "first_bonus": 0.2}, 1.0),
    "a bonus that is too small": (-0.3, {"temperature": 0.0, "first_bonus": 0.2}, 0.0),
    "flips after the bonus": (LOG3, {"temperature": 1.0, "first_bonus": LOG3, "flip_rate": 0.25}, 0.7),
    "flips near": (0.0, {"temperature": 1.0, "first_bonus": LOG3, "flip_rate": 0.5, "flip_scale": 1.0}, 1 / 2),
    "flips one scale off": (2.0, {"temperature": 0.0, "flip_rate": 0.5, "flip_scale": 2.0}, 1 - 0.5 / math.e),
    "flips far off": (9.0, {"temperature": 0.0, "flip_rate": 1.0, "flip_scale": 0.01}, 1.0),
    "adversary": (LOG3, {"temperature": 1.0, "flip_rate": 1.0}, 1 / 4),
    "adversary of near ones": (LOG3, {"temperature": 1.0, "flip_rate": 1.0, "flip_scale": LOG3}, 3 / 4 - 0.5 / math.e),
    "no tie": (LOG3, {"temperature": 1.0, "tie_within": 1.09}, 3 / 4),
    "nearly no temperature": (0.1, {"temperature": 1e-9}, 1.0),
    "nearly all temperature": (0.1, {"temperature": 1e9}, 1 / 2),
}


@pytest.mark.parametrize(("difference", "config", "p"), BY_HAND.values(), ids=BY_HAND)
def test_every_option_prefers_as_often_as_the_exact_probability_says(difference, config, p):
    exact = preference_probability(difference, LabelerConfig(**config), first=True)
    assert float(exact) == pytest.approx(p, abs=1e-9)
    count = 500 if p in (0, 1) else N
    assert_share(sum(ranks == (0, 1) for ranks in answers([difference, 0.0], count, **config)), count, p)
    mirrored = preference_probability(-difference, LabelerConfig(**config), first=False)
    assert float(mirrored) == pytest.approx(1 - p, abs=1e-9)  # the same query, told the other way round


def test_christianos_answers_that_are_uniform_in_a_tenth_are_flips_in_a_twentieth():
    for difference in (LOG3, -LOG3, 0.0):
        uniform = 0.9 / (1 + math.exp(-difference)) + 0.1 * 0.5  # 1706.03741, §2.2.3
        config = LabelerConfig(temperature=1.0, flip_rate=0.05)
        assert float(preference_probability(difference, config)) == pytest.approx(uniform)


def test_in_random_order_a_bonus_is_half_the_time_for_either():
    config = LabelerConfig(temperature=1.0, first_bonus=LOG3)
    assert float(preference_probability(LOG3, config)) == pytest.approx((9 / 10 + 1 / 2) / 2)
    assert preference_probability([LOG3, -LOG3, 0.0], config).tolist() == pytest.approx([0.7, 0.3, 0.5])


def test_without_a_bonus_the_order_shown_plays_no_part():
    for config in ({"temperature": 0.5, "flip_rate": 0.2}, {"temperature": 0.0, "tie_within": 1.0}):
        for first in (True, False, None):
            p = preference_probability([0.7, 2.0], LabelerConfig(**config), first=first)
            assert p.tolist() == preference_probability([0.7, 2.0], LabelerConfig(**config)).tolist()
    wins = sum(ranks == (0, 1) for ranks in answers([LOG3, 0.0], temperature=1.0))
    swapped = sum(ranks == (1, 0) for ranks in answers([0.0, LOG3], seed=1, temperature=1.0))
    for found in (wins, swapped):
        assert_share(found, N, 3 / 4)


def test_places_between_first_and_last_have_their_share_of_the_bonus():
    assert answers([0.0, 0.0, 0.0], 1, temperature=0.0, first_bonus=1.0) == [(0, 1, 2)]
    assert answers([0.0, 0.49, 1.02], 1, temperature=0.0, first_bonus=1.0) == [(1, 2, 0)]  # 1.0, 0.99, 1.02
    assert answers([0.0, 0.51, 0.98], 1, temperature=0.0, first_bonus=1.0) == [(1, 0, 2)]  # 1.0, 1.01, 0.98


def test_two_that_differ_by_less_than_the_threshold_are_a_tie_whatever_the_noise():
    assert set(answers([0.3, 0.0], 200, temperature=1.0, flip_rate=0.3, first_bonus=1.0, tie_within=0.31)) == {(0, 0)}
    assert (0, 0) not in answers([0.3, 0.0], 200, temperature=1.0, tie_within=0.3)  # applied once, and as it is
    p = preference_probability([0.3, 0.29], LabelerConfig(temperature=0.0, tie_within=0.3))
    assert p.tolist() == [1.0, 0.5]


def test_neighbours_in_a_ranking_that_are_near_share_a_rank_and_a_chain_of_them_is_one_tie():
    assert answers([0.0, 1.0, 3.0], 1, temperature=0.0, tie_within=1.5) == [(1, 1, 0)]
    assert answers([0.0, 1.0, 2.0, 9.0], 1, temperature=0.0, tie_within=1.5) == [(1, 1, 1, 0)]
    assert answers([0.0, 1.0, 2.0, 9.0], 1, temperature=0.0, tie_within=1.5, flip_rate=1.0) == [(0, 0, 0, 1)]
    assert answers([0.0, 5.0, 0.1], 1, temperature=0.0, tie_within=0.05) == [(2, 0, 1)]


def test_no_answer_where_the_best_is_below_the_threshold():
    assert answers([0.4, 0.9], 3, temperature=0.0, skip_below=1.0) == [None] * 3
    assert answers([0.4, 1.0], 1, temperature=0.0, skip_below=1.0) == [(1, 0)]
    assert answers([-3.0, -2.0], 1, temperature=0.0, skip_below=-2.5) == [(1, 0)]
    plain = answers([0.4, 1.5], 200, temperature=1.0, flip_rate=0.1)
    assert answers([0.4, 1.5], 200, temperature=1.0, flip_rate=0.1, skip_below=1.0) == plain  # no random number more


def test_a_tired_labeler_sees_less():
    config = LabelerConfig(temperature=0.5, fatigue=0.25)
    difference = LOG3
    p = preference_probability(difference, config, query=[0, 2, 6])  # temperatures 0.5, 1 and 2
    assert p.tolist() == pytest.approx([9 / 10, 3 / 4, 3**0.5 / (1 + 3**0.5)])
    labeler = SimulatedLabeler(gold, LabelerConfig(temperature=0.0, fatigue=1e-4))
    count = 10_000
    found = labeler.rank(["p"] * count, [[repr(LOG3), "0.0"]] * count, range(0, 2 * count, 2))
    expected = preference_probability(LOG3, labeler.config, query=np.arange(0, 2 * count, 2))
    assert expected[0] == 1.0 and expected[5000] == pytest.approx(3 / 4)
    right = np.array([ranks == (0, 1) for ranks in found])
    for part in (slice(0, 5000), slice(5000, None)):
        p = expected[part]
        assert abs(right[part].sum() - p.sum()) < 4.5 * math.sqrt((p * (1 - p)).sum())


def test_flips_of_a_ranking_depend_on_its_best_and_its_worst():
    found = answers([0.0, 1.0, 2.0], 5000, temperature=0.0, flip_rate=0.5, flip_scale=2.0)
    assert_frequencies(found, {(2, 1, 0): 1 - 0.5 / math.e, (0, 1, 2): 0.5 / math.e})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tie_within": -0.1}, "tie_within must be at least 0 and finite, it is -0.1"),
        ({"fatigue": math.inf}, "fatigue must be at least 0 and finite, it is inf"),
        ({"flip_scale": 0.0}, "flip_scale must be positive and finite, it is 0.0"),
        ({"flip_scale": math.nan}, "flip_scale must be positive and finite, it is nan"),
        ({"skip_below": math.nan}, "skip_below must be finite, it is nan"),
        ({"first_bonus": math.inf}, "first_bonus must be finite, it is inf"),
    ],
)
def test_impossible_thresholds_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        LabelerConfig(**config)
