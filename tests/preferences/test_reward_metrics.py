"""Metrics of scores by numbers worked by hand, and by what must not change them."""

import json
import math

import numpy as np
import pytest

from rlhf_env.intervals import rate_interval
from rlhf_env.preferences.reward_metrics import (
    accuracy,
    accuracy_by,
    annotator_ceiling,
    average_ranks,
    calibration,
    correlation,
    differences,
    kendall_tau,
    length_effect,
    measure_scores,
    ranked_by,
    scaled_calibration,
)
from rlhf_env.types import Comparison


def pair(better, worse, prompt="p", labeler=""):
    return Comparison(prompt, (better, worse), (0, 1), labeler=labeler)


def arrays(*rows):
    return [np.array(row, dtype=np.float64) for row in rows]


# --- accuracy --------------------------------------------------------------------------------------


def test_accuracy_counts_equal_scores_half_and_ties_not_at_all():
    comparisons = [pair("a", "b"), pair("a", "b", "q"), pair("a", "b", "r"), Comparison("s", ("a", "b"), (0, 0))]
    found = accuracy("accuracy", comparisons, arrays([2, 1], [1, 2], [1, 1], [5, 0]))
    assert found == {**rate_interval("accuracy", 1.5, 3), "accuracy_pairs": 3}


def test_accuracy_s_interval_counts_the_same_responses_once_however_many_labelers_and_pairs():
    ranking = Comparison("p", ("a", "b", "c"), (0, 1, 2), labeler="x")
    again = Comparison("p", ("c", "b", "a"), (2, 1, 0), labeler="y")
    found = accuracy("accuracy", [ranking, again], arrays([3, 2, 1], [1, 2, 3]))
    assert found == {**rate_interval("accuracy", 1, 1), "accuracy_pairs": 6}


def test_comparisons_of_one_prompt_are_alike_in_the_interval_of_accuracy():
    """Prompts p and q, right and wrong ten times each: as much as one comparison says, not as twenty do."""
    comparisons = [pair(f"a{i}", f"b{i}", prompt) for prompt in "pq" for i in range(10)]
    found = accuracy("x", comparisons, arrays(*[[1, 0]] * 10, *[[0, 1]] * 10))
    assert found == {**rate_interval("x", 0.5, 1), "x_pairs": 20}


def test_accuracy_among_some_pairs_only():
    comparisons, scores = [pair("long", "s"), pair("s", "long", "q")], arrays([1, 0], [0, 1])
    right = accuracy("x", comparisons, scores, lambda c, better, worse: len(c.responses[better]) > 1)
    assert (right["x"], right["x_pairs"]) == (1, 1)
    assert accuracy("x", comparisons, scores, lambda c, better, worse: False) == {}


def test_accuracy_by_group_largest_first():
    comparisons = [pair("a", "b", labeler="x"), pair("a", "b", "q", "y"), pair("a", "b", "r", "y"), pair("a", "b", "s")]
    rows = accuracy_by("labeler", lambda c: c.labeler, comparisons, arrays([1, 0], [0, 1], [1, 0], [1, 0]))
    assert [(row["labeler"], row["comparisons"], row["accuracy"]) for row in rows] == [("y", 2, 0.5), ("x", 1, 1)]


def test_tiny_differences_still_count():
    assert accuracy("x", [pair("a", "b")], arrays([5e-324, 0]))["x"] == 1


# --- calibration -----------------------------------------------------------------------------------


def test_calibration_by_hand_in_both_orders():
    found = calibration([math.log(3)] * 3, [1, 1, 0])  # P = 0.75 came true in 2 of 3; 0.25 in 1 of 3
    assert found["ece"] == pytest.approx(1 / 12)
    assert found["brier"] == pytest.approx((2 * 0.25**2 + 0.75**2) / 3)
    assert found["log_loss"] == pytest.approx(-(2 * math.log(0.75) + math.log(0.25)) / 3)
    assert [(bin["predicted"], bin["observed"], bin["count"]) for bin in found["reliability"]] == [
        pytest.approx((0.25, 1 / 3, 3)),
        pytest.approx((0.75, 2 / 3, 3)),
    ]


def test_one_scale_makes_any_score_a_logit():
    data = [2.0] * 4, [1, 1, 1, 0]  # σ(2b) = 3/4
    found = scaled_calibration(data, data, range(len(data[0])))
    assert found["scale"] == pytest.approx(math.log(3) / 2)
    assert found["scaled_ece"] == pytest.approx(0, abs=1e-9)
    assert found["scaled_log_loss"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_the_scale_of_a_reward_that_prefers_what_people_do_not_is_negative():
    found = scaled_calibration(([1.0] * 4, [0, 0, 0, 1]), ([1.0], [0]), range(4))
    assert found["scale"] == pytest.approx(-math.log(3))
    assert found["scaled_log_loss"] == pytest.approx(-math.log(0.75))


def test_no_scale_where_none_is_likeliest():
    assert scaled_calibration(([1.0, 2.0], [1, 1]), ([1.0], [1]), "ab") == {}  # the larger the better
    assert scaled_calibration(([0.0], [1]), ([1.0], [1]), "a") == {}
    assert scaled_calibration(([1.0] * 2, [1, 0]), ([], []), "ab") == {}


# --- rank correlation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "tau"),
    [
        ([1, 2, 3, 4], [1, 3, 2, 4], (5 - 1) / 6),
        ([1, 1, 2, 3], [1, 2, 2, 3], 4 / 5),  # four in order, none turned; five of six are untied in each
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2], [5, 5], math.nan),
        ([0, 0, 0], [1, 2, 3], math.nan),
    ],
)
def test_kendall_tau_b(x, y, tau):
    assert kendall_tau(x, y) == pytest.approx(tau, nan_ok=True) == pytest.approx(kendall_tau(y, x), nan_ok=True)


def test_tau_is_the_mean_over_rankings_of_three_or_more():
    three = [Comparison(p, ("a", "b", "c"), (0, 1, 2)) for p in "pqr"]
    found = measure_scores([*three, pair("a", "b")], arrays([3, 2, 1], [1, 2, 3], [0, 0, 0], [1, 0]))
    assert (found["kendall_tau"], found["rankings"]) == (0, 2)  # 1 and −1; of the third nothing is known


def test_average_ranks_share():
    assert average_ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]


def test_correlation_by_hand():
    assert correlation([0, 1, 2], [0, 2, 1]) == pytest.approx(0.5)
    assert math.isnan(correlation([1, 1], [0, 1]))


# --- length ----------------------------------------------------------------------------------------


def test_a_reward_of_length_is_right_only_where_the_longer_is_preferred():
    comparisons = [pair("aaa", "a"), pair("a", "aaa", "q"), pair("aaa", "a", "r"), pair("ab", "ba", "s")]
    scores = [np.array([len(text) for text in c.responses], dtype=float) for c in comparisons]
    found = length_effect(comparisons, scores)
    assert found["pearson"] == found["spearman"] == pytest.approx(1)
    assert (found["longer_higher"], found["longer_preferred"]) == (1, 2 / 3)
    assert (found["accuracy_longer"], found["accuracy_shorter"]) == (1, 0)


def test_length_correlation_is_within_prompts():
    """Two prompts whose longer response scores 1 more, one whose shorter does; the prompts' levels do not matter."""
    comparisons = [pair("a", "aaa"), pair("a", "aaa", "q"), pair("a", "aaa", "r")]
    found = length_effect(comparisons, arrays([0, 1], [100, 101], [-50, -51]))
    assert (found["pearson"], found["spearman"]) == pytest.approx((1 / 3, 1 / 3))
    assert found["longer_higher"] == pytest.approx(2 / 3)


def test_equal_lengths_say_nothing():
    assert length_effect([pair("ab", "ba")], arrays([1, 0])) == {}


# --- ceilings --------------------------------------------------------------------------------------


def test_the_ceiling_is_how_well_the_others_majority_predicts_a_label():
    def judged(prompt, *better_first):
        return [
            Comparison(prompt, ("a", "b"), (0, 1) if first else (1, 0), labeler=name)
            for name, first in zip("xyz", better_first, strict=True)
        ]

    # Of the first pair three labels agree with the others. Of the second x and y see the others divided, z is wrong.
    comparisons = judged("p", True, True, True) + judged("q", True, True, False)
    # What two prompts say of others, as different as they are, is what one label would say.
    assert annotator_ceiling(comparisons) == rate_interval("annotator_ceiling", 0.75, 1)


def test_no_ceiling_of_one_labeler_or_of_ties():
    assert annotator_ceiling([pair("a", "b", labeler="x")]) == {}
    assert annotator_ceiling([Comparison("p", ("a", "b"), (0, 0), labeler=name) for name in "xy"]) == {}


# --- what must hold for any reward -----------------------------------------------------------------


@pytest.fixture
def rankings():
    rng = np.random.default_rng(0)
    texts = [tuple("x" * int(n) + str(k) for k, n in enumerate(rng.integers(1, 30, 4))) for _ in range(60)]
    unranked = [Comparison(f"prompt {i}", those, (0,) * 4, labeler="xy"[i % 2]) for i, those in enumerate(texts)]
    return ranked_by(unranked, list(rng.normal(size=(60, 4)))), list(rng.normal(size=(60, 4)))


def test_a_perfect_reward(rankings):
    comparisons, _ = rankings
    found = measure_scores(comparisons, [-np.array(c.ranks, dtype=float) for c in comparisons])
    assert found["accuracy"] == found["kendall_tau"] == found["length"]["accuracy_shorter"] == 1
    assert "scale" not in found  # the larger, the likelier


def test_a_constant_reward_knows_nothing(rankings):
    comparisons, _ = rankings
    found = measure_scores(comparisons, [np.full(4, 7.0) for _ in comparisons])
    assert found["accuracy"] == found["length"]["longer_higher"] == 0.5
    assert not {"kendall_tau", "scale", "scaled_ece"} & found.keys() and "pearson" not in found["length"]
    json.dumps(found, allow_nan=False)


def test_a_monotone_transform_changes_no_order(rankings):
    comparisons, scores = rankings
    before, after = (measure_scores(comparisons, those) for those in (scores, [np.exp(s) for s in scores]))
    for name in ("accuracy", "accuracy_low", "kendall_tau", "kendall_tau_high"):
        assert before[name] == after[name]
    assert before["length"]["longer_higher"] == after["length"]["longer_higher"]


def test_unit_and_origin_of_scores_change_only_the_scale(rankings):
    comparisons, scores = rankings
    before, after = (measure_scores(comparisons, those) for those in (scores, [5 + 10 * s for s in scores]))
    assert after["scale"] == pytest.approx(before["scale"] / 10)
    for name in ("scaled_log_loss", "scaled_ece", "scaled_brier"):
        assert after[name] == pytest.approx(before[name])


def test_only_logits_are_taken_for_probabilities(rankings):
    comparisons, scores = rankings
    log_odds = [differences(c, s) for c, s in zip(comparisons, scores, strict=True)]
    plain, logits = measure_scores(comparisons, scores), measure_scores(comparisons, scores, log_odds)
    assert logits.keys() - plain.keys() == {"log_loss", "brier", "ece", "reliability"}
    assert {name: logits[name] for name in plain} == plain


def test_values_rank_with_ties():
    (found,) = ranked_by([Comparison("p", ("a", "b", "c"), (0, 1, 2))], arrays([1, 5, 1]))
    assert found.ranks == (1, 0, 1)
