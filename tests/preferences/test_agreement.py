"""Coefficients of agreement: published tables, numbers worked by hand, their definitions as loops, and equivalences."""

import itertools
import math

import numpy as np
import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.agreement import (
    cohen_kappa,
    fleiss_kappa,
    kendall_w,
    krippendorff_alpha,
    label_counts,
    majority,
    percent_agreement,
)
from tests.preferences.tables import FLEISS, FOURTEEN, KRIPPENDORFF, digits, labels_of

LEVELS = ["nominal", "ordinal", "interval"]


def random_table(seed, items=12, annotators=4, labels=4, missing=0.3):
    """Labels 1, 2, 4, 8, … by chance; the first two items have all labels."""
    draw = np.random.default_rng(seed)
    table = 2.0 ** draw.integers(labels, size=(items, annotators))
    hidden = draw.random((items, annotators)) < missing
    hidden[:2] = False
    return np.where(hidden, np.nan, table)


# --- as published ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example_with_missing_labels(level, alpha):
    assert krippendorff_alpha(KRIPPENDORFF, level) == pytest.approx(alpha, abs=5e-4)


def test_fleiss_own_example():
    assert fleiss_kappa(labels_of(digits(FLEISS))) == pytest.approx(0.430, abs=5e-4)


def test_fourteen_raters_of_ten_subjects():
    labels = labels_of(FOURTEEN)
    assert percent_agreement(labels) == pytest.approx(0.378, abs=5e-4)
    assert fleiss_kappa(labels) == pytest.approx(0.210, abs=5e-4)


# --- by hand ---------------------------------------------------------------------------------------


def test_cohens_kappa_by_hand():
    # Both yes 20, only the first 5, only the second 10, neither 15: p_o = 0.7, p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5.
    first, second = np.repeat([1, 1, 0, 0], [20, 5, 10, 15]), np.repeat([1, 0, 1, 0], [20, 5, 10, 15])
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_annotators_of_different_habits_have_less_to_agree_about_by_chance():
    # Both yes 8, only the first 6, neither 6: p_o = 0.7, p_e = 0.7 · 0.4 + 0.3 · 0.6 = 0.46.
    first, second = np.repeat([1, 1, 0], [8, 6, 6]), np.repeat([1, 0, 0], [8, 6, 6])
    assert cohen_kappa(first, second) == cohen_kappa(second, first) == pytest.approx(0.24 / 0.54)


def test_quadratic_weights_by_hand():
    # Observed (0 + 1 + 0 + 1)/4; by chance, shares ¼, ¼, ½ each: 2 (1 · ¹⁄₁₆ + 4 · ⅛ + 1 · ⅛) = 1.375.
    assert cohen_kappa([1, 2, 3, 3], [1, 3, 3, 2], "interval") == pytest.approx(1 - 0.5 / 1.375)


def test_kappa_is_of_the_items_that_both_labelled():
    first, second = [1, 1, 0, 0, 1, np.nan], [1, 0, 0, 0, np.nan, 0]
    assert cohen_kappa(first, second) == cohen_kappa(first[:4], second[:4]) == pytest.approx(0.5)


def test_percent_agreement_is_a_mean_over_items():
    # One of three pairs of labels agrees, then the only one; a single label has no pair.
    labels = [[1, 1, 2], [2, 2, np.nan], [1, np.nan, np.nan]]
    assert percent_agreement(labels) == pytest.approx((1 / 3 + 1) / 2)


def test_kendalls_w_by_hand():
    assert kendall_w(np.array([[1, 2, 3], [1, 2, 3]]).T) == 1
    assert kendall_w(np.array([[1, 2, 3], [3, 2, 1]]).T) == 0
    # Sums 4, 6, 8 of three judges: S = 8, most 9 · (27 − 3)/12 = 18.
    assert kendall_w(np.array([[1, 2, 3], [1, 3, 2], [2, 1, 3]]).T) == pytest.approx(8 / 18)


def test_a_vote_without_a_winner_is_reported_and_not_decided():
    labels = [[1, 1, 2], [1, 2, np.nan], [3, np.nan, np.nan], [np.nan] * 3, [2, 2, 2]]
    winner, tied = majority(labels)
    np.testing.assert_array_equal(winner, [1, np.nan, 3, np.nan, 2])
    assert tied.tolist() == [False, True, False, False, False]


def test_counts_of_labels():
    values, counts = label_counts([[5, 2, np.nan], [2, 2, 2]])
    assert values.tolist() == [2, 5] and counts.tolist() == [[1, 1], [3, 0]]


# --- by their definitions --------------------------------------------------------------------------


def alpha_by_loops(table, level):
    """1 − D_o / D_e over all ordered pairs of labels, with Krippendorff's distances as he writes them."""
    units = [[v for v in row if not np.isnan(v)] for row in table]
    units = [unit for unit in units if len(unit) > 1]
    pooled = [v for unit in units for v in unit]
    order = sorted(set(pooled))
    n = {v: pooled.count(v) for v in order}

    def distance(c, k):
        if level == "nominal":
            return float(c != k)
        if level == "interval":
            return (c - k) ** 2
        low, high = min(c, k), max(c, k)
        return (sum(n[g] for g in order if low <= g <= high) - (n[c] + n[k]) / 2) ** 2

    observed = sum(
        distance(unit[i], unit[j]) / (len(unit) - 1)
        for unit in units
        for i, j in itertools.permutations(range(len(unit)), 2)
    ) / len(pooled)
    pairs = itertools.permutations(range(len(pooled)), 2)
    expected = sum(distance(pooled[i], pooled[j]) for i, j in pairs) / (len(pooled) * (len(pooled) - 1))
    return 1 - observed / expected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_alpha_is_one_minus_observed_over_expected_disagreement(level, seed):
    table = random_table(seed)
    assert krippendorff_alpha(table, level) == pytest.approx(alpha_by_loops(table, level), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_w_has_kendalls_correction_for_ties(seed):
    # W = 12 Σ (R_i − R̄)² / (M² (K³ − K) − M Σ_j T_j), T_j = Σ (t³ − t) over the groups of t tied things of judge j.
    scores = np.random.default_rng(seed).integers(4, size=(7, 5))
    k, m = scores.shape
    ranks = np.array([[(column < v).sum() + ((column == v).sum() + 1) / 2 for v in column] for column in scores.T]).T
    ties = sum(int(t) ** 3 - int(t) for column in scores.T for t in np.unique(column, return_counts=True)[1])
    spread = ((ranks.sum(1) - ranks.sum(1).mean()) ** 2).sum()
    assert kendall_w(scores) == pytest.approx(12 * spread / (m**2 * (k**3 - k) - m * ties))


@pytest.mark.parametrize(("k", "m"), [(3, 2), (3, 3), (4, 2)])
def test_w_by_chance_is_one_over_the_number_of_judges(k, m):
    every = [kendall_w(np.array(judges).T) for judges in itertools.product(itertools.permutations(range(k)), repeat=m)]
    assert np.mean(every) == pytest.approx(1 / m)


# --- equivalences ----------------------------------------------------------------------------------


def test_alpha_is_fleiss_kappa_with_a_correction_for_few_labels():
    labels = labels_of(FOURTEEN)
    n = labels.size
    assert 1 - krippendorff_alpha(labels) == pytest.approx((1 - fleiss_kappa(labels)) * (n - 1) / n)


def test_two_annotators_of_equal_shares_have_the_same_kappa_by_cohen_and_fleiss():
    first, second = np.array([1, 1, 2, 2, 3, 3]), np.array([1, 2, 2, 3, 3, 1])
    assert cohen_kappa(first, second) == pytest.approx(fleiss_kappa(np.array([first, second]).T))


@pytest.mark.parametrize("level", LEVELS)
def test_neither_the_order_of_annotators_nor_of_items_matters(level):
    table = random_table(3)
    again = np.random.default_rng(0).permuted(table, axis=1)[::-1]  # and who gave which label does not matter either
    assert krippendorff_alpha(again, level) == pytest.approx(krippendorff_alpha(table, level))
    assert percent_agreement(again) == pytest.approx(percent_agreement(table))


def test_a_level_of_measurement_is_what_may_be_done_to_labels():
    table = random_table(4)
    renamed, stretched, moved = np.where(table == 1, 99, table), np.log2(table), 3 * table - 7
    assert krippendorff_alpha(renamed) == pytest.approx(krippendorff_alpha(table))
    assert krippendorff_alpha(stretched, "ordinal") == pytest.approx(krippendorff_alpha(table, "ordinal"))
    assert krippendorff_alpha(stretched, "interval") != pytest.approx(krippendorff_alpha(table, "interval"), abs=1e-3)
    assert krippendorff_alpha(moved, "interval") == pytest.approx(krippendorff_alpha(table, "interval"))


def test_labels_by_chance_agree_as_chance_does():
    table = np.random.default_rng(0).integers(3, size=(20_000, 3)).astype(float)
    error = 4 / math.sqrt(3 * len(table))  # about four standard errors
    for coefficient in (fleiss_kappa, krippendorff_alpha, lambda t: cohen_kappa(t[:, 0], t[:, 1])):
        assert coefficient(table) == pytest.approx(0, abs=2 * error)
    assert percent_agreement(table) == pytest.approx(1 / 3, abs=error)


# --- where there is nothing to measure -------------------------------------------------------------


def test_perfect_agreement_is_one():
    table = np.repeat([[1.0], [2.0], [2.0]], 3, axis=1)
    assert percent_agreement(table) == fleiss_kappa(table) == 1
    assert [krippendorff_alpha(table, level) for level in LEVELS] == [1, 1, 1]
    assert cohen_kappa(table[:, 0], table[:, 1]) == 1


def test_where_only_one_label_occurs_agreement_cannot_be_told_from_chance():
    table = np.full((4, 3), 2.0)
    assert percent_agreement(table) == 1
    found = [
        fleiss_kappa(table),
        cohen_kappa(table[:, 0], table[:, 1]),
        *(krippendorff_alpha(table, x) for x in LEVELS),
    ]
    assert all(math.isnan(x) for x in found)
    assert math.isnan(kendall_w(table))  # all is tied


@pytest.mark.parametrize("table", [[[1.0], [2.0]], [[1.0, np.nan], [np.nan, 2.0]], [[np.nan, np.nan]]])
def test_without_an_item_in_common_there_is_no_agreement(table):
    for coefficient in (percent_agreement, fleiss_kappa, krippendorff_alpha):
        with pytest.raises(DataError, match="no item has labels of two annotators"):
            coefficient(table)


def test_two_annotators_without_an_item_in_common():
    with pytest.raises(DataError, match="no item in common"):
        cohen_kappa([1, np.nan], [np.nan, 1])


def test_fleiss_names_the_item_that_has_fewer_labels():
    with pytest.raises(DataError, match=r"item 0 has 3 and item 1 has 2; Krippendorff"):
        fleiss_kappa([[1, 1, 2], [1, 2, np.nan]])


@pytest.mark.parametrize("ranks", [[[1.0, np.nan], [2.0, 1.0]], [[1.0], [2.0]], [[1.0, 1.0]]])
def test_w_needs_complete_rankings(ranks):
    with pytest.raises(DataError, match="complete rankings of at least 2 things by at least 2"):
        kendall_w(ranks)


@pytest.mark.parametrize("labels", [[1.0, 2.0], np.zeros((0, 3)), [[1.0, np.inf]]])
def test_what_is_no_table_of_labels_is_refused(labels):
    with pytest.raises(DataError, match="table|infinite"):
        percent_agreement(labels)
