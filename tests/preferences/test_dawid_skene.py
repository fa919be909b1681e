"""Dawid & Skene: their own data, exact recovery from exact frequencies, and what EM promises."""

import itertools
import math

import numpy as np
import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.agreement import majority
from rlhf_env.preferences.dawid_skene import dawid_skene
from tests.preferences.tables import ANAESTHETISTS, digits

PATIENTS, WHOSE = digits(ANAESTHETISTS), [0, 0, 0, 1, 2, 3, 4]


def some_table(seed, items=40, annotators=5, classes=3, missing=0.3):
    """Labels of people who are right 70 % of the time; everyone labels the first two items."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(classes, size=(items, 1))
    said = np.where(draw.random((items, annotators)) < 0.7, truth, draw.integers(classes, size=(items, annotators)))
    hidden = draw.random((items, annotators)) < missing
    hidden[:2], hidden[:, 0] = False, False
    return np.where(hidden, np.nan, said)


def log_likelihood(labels, found):
    """Σ_i log Σ_j p_j Π_a π_ajl over the labels that there are, one item after another."""
    total = 0.0
    for row in labels:
        given = [
            p * math.prod(found.confusion[a, j, int(label)] for a, label in enumerate(row) if not np.isnan(label))
            for j, p in enumerate(found.prevalence)
        ]
        total += math.log(sum(given))
    return total


# --- as published ----------------------------------------------------------------------------------


def test_the_anaesthetists_are_as_in_the_paper():
    found = dawid_skene(PATIENTS, WHOSE)
    assert found.converged and found.classes.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(found.prevalence.round(2), [0.40, 0.42, 0.11, 0.07])
    np.testing.assert_array_equal(
        found.confusion[0].round(2),
        [[0.89, 0.11, 0, 0], [0.07, 0.88, 0.05, 0], [0, 0.34, 0.66, 0], [0, 0, 0.56, 0.44]],
    )


# --- exact -----------------------------------------------------------------------------------------


def exact_table(prevalence, confusion, total):
    """Every pattern of two labels by three annotators, as often as its probability says: integers, so no chance."""
    rows = []
    for pattern in itertools.product(range(2), repeat=3):
        p = sum(
            q * math.prod(confusion[a][j][label] for a, label in enumerate(pattern)) for j, q in enumerate(prevalence)
        )
        assert round(p * total) == pytest.approx(p * total, abs=1e-6)
        rows += [pattern] * round(p * total)
    return np.array(rows, dtype=float)


def test_exact_frequencies_give_the_parameters_back():
    prevalence = [0.6, 0.4]
    confusion = [[[0.9, 0.1], [0.2, 0.8]], [[0.8, 0.2], [0.3, 0.7]], [[0.7, 0.3], [0.1, 0.9]]]
    found = dawid_skene(exact_table(prevalence, confusion, 10_000), tolerance=1e-15)
    np.testing.assert_allclose(found.prevalence, prevalence, atol=1e-4)
    np.testing.assert_allclose(found.confusion, confusion, atol=1e-4)
    np.testing.assert_allclose(found.accuracy, [0.86, 0.76, 0.78], atol=1e-4)


def test_posteriors_of_equal_annotators_by_hand():
    # Right 9 times of 10: three votes to none are 0.729 against 0.001, two to one 0.081 against 0.009.
    labels = exact_table([0.5, 0.5], [[[0.9, 0.1], [0.1, 0.9]]] * 3, 2000)
    found = dawid_skene(labels, tolerance=1e-15)
    of_zero = found.posterior[:, 0][np.argsort(labels.sum(1), kind="stable")]
    np.testing.assert_allclose(of_zero[[0, 729, 730, 999]], [0.729 / 0.73, 0.729 / 0.73, 0.9, 0.9], atol=1e-5)


# --- what EM promises ------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_the_log_likelihood_never_falls(seed, smoothing):
    found = dawid_skene(some_table(seed), smoothing=smoothing)
    assert len(found.log_likelihood) > 3
    assert np.diff(found.log_likelihood).min() > -1e-9


def test_the_log_likelihood_is_that_of_the_labels():
    labels = some_table(5)
    found = dawid_skene(labels)
    assert found.log_likelihood[-1] == pytest.approx(log_likelihood(labels, found), abs=1e-9)
    smoothed = dawid_skene(labels, smoothing=0.5)
    prior = 0.5 * np.log(smoothed.confusion).sum()
    assert smoothed.log_likelihood[-1] == pytest.approx(log_likelihood(labels, smoothed) + prior, abs=1e-9)


def test_where_it_ends_every_parameter_is_its_expected_share():
    labels = some_table(6)
    found = dawid_skene(labels, tolerance=1e-15)
    np.testing.assert_allclose(found.prevalence, found.posterior.mean(0), atol=1e-6)
    for a, column in enumerate(labels.T):
        given = np.array([[found.posterior[column == label, j].sum() for label in range(3)] for j in range(3)])
        np.testing.assert_allclose(found.confusion[a], given / given.sum(1, keepdims=True), atol=1e-6)


def test_nothing_is_random():
    one, two = dawid_skene(some_table(7)), dawid_skene(some_table(7))
    np.testing.assert_array_equal(one.posterior, two.posterior)


def test_a_limit_of_steps_is_said():
    found = dawid_skene(some_table(8), max_steps=2)
    assert not found.converged and len(found.log_likelihood) == 2


# --- what it is for --------------------------------------------------------------------------------


def test_equal_and_symmetric_annotators_are_a_vote():
    draw = np.random.default_rng(0)
    truth = draw.integers(2, size=(3000, 1))
    labels = np.where(draw.random((3000, 5)) < 0.8, truth, 1 - truth).astype(float)
    found = dawid_skene(labels)
    np.testing.assert_array_equal(found.posterior.argmax(1), majority(labels)[0])


def test_error_rates_are_recovered_within_their_errors():
    draw, items = np.random.default_rng(1), 4000
    truth = draw.integers(3, size=items)
    right = [0.9, 0.8, 0.7, 0.6, 0.5]
    wrong = (truth[:, None] + draw.integers(1, 3, size=(items, 5))) % 3
    labels = np.where(draw.random((items, 5)) < right, truth[:, None], wrong).astype(float)
    labels[draw.random(labels.shape) < 0.2] = np.nan
    labels = labels[~np.isnan(labels).all(1)]
    found = dawid_skene(labels)
    each = 4000 / 3 * 0.8  # labels of an annotator for a class, of which the class itself is not known
    np.testing.assert_allclose(found.prevalence, 1 / 3, atol=6 * math.sqrt(2 / 9 / items))
    for a, p in enumerate(right):
        np.testing.assert_allclose(found.confusion[a].diagonal(), p, atol=6 * math.sqrt(p * (1 - p) / each))


def test_the_contrary_are_understood_and_beat_the_vote():
    draw = np.random.default_rng(2)
    truth = draw.integers(2, size=(2000, 1))
    labels = np.where(draw.random((2000, 5)) < [0.95, 0.85, 0.75, 0.1, 0.5], truth, 1 - truth).astype(float)
    found = dawid_skene(labels)
    right = np.mean(found.posterior.argmax(1) == truth[:, 0])
    assert right > np.mean(majority(labels)[0] == truth[:, 0]) + 0.05
    assert found.accuracy[3] < 0.2


# --- edges -----------------------------------------------------------------------------------------


def test_labels_that_are_missing_say_nothing():
    labels = some_table(9)
    silent = np.column_stack([labels, np.full(len(labels), np.nan)])
    silent[0, -1] = labels[0, 0]  # somebody who labelled one item
    one, two = dawid_skene(labels), dawid_skene(silent[:, :-1])
    np.testing.assert_array_equal(one.posterior, two.posterior)
    assert np.isfinite(dawid_skene(silent).posterior).all()


def test_an_annotator_says_nothing_of_a_class_that_he_never_saw():
    found = dawid_skene([[0, 0, 0], [0, 0, 0], [1, 1, np.nan], [1, 1, np.nan]])
    np.testing.assert_allclose(found.confusion[2], [[1, 0], [0.5, 0.5]], atol=1e-12)


def test_smoothing_counts_labels_of_each_kind_in_addition():
    # Unanimous, so that posteriors stay what they are: 3 labels 0, and ½ of each kind.
    found = dawid_skene(np.repeat([[0.0], [0.0], [0.0], [1.0]], 40, axis=1), smoothing=0.5)
    np.testing.assert_allclose(found.confusion[0], [[3.5 / 4, 0.5 / 4], [0.5 / 2, 1.5 / 2]], atol=1e-6)


def test_the_names_of_labels_do_not_matter():
    labels = some_table(10)
    renamed = np.where(labels == 0, 7, -labels)  # 0, 1, 2 → 7, −1, −2
    found, again = dawid_skene(labels), dawid_skene(renamed)
    assert again.classes.tolist() == [-2, -1, 7]
    np.testing.assert_allclose(again.posterior, found.posterior[:, [2, 1, 0]], atol=1e-6)


def test_one_label_is_one_class():
    found = dawid_skene(np.full((3, 2), 4.0))
    assert found.classes.tolist() == [4] and found.posterior.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([[1, 2], [np.nan, np.nan]], {}, "item 1 has no label"),
        ([[1, 2]], {"annotators": [0, 2]}, "counted from 0 without a gap"),
        ([[1, 2]], {"annotators": [0]}, "each of the 2 columns"),
        ([[1, 2]], {"smoothing": -1.0}, "at least 0"),
    ],
)
def test_what_cannot_be_used_is_refused(labels, settings, message):
    with pytest.raises(DataError, match=message):
        dawid_skene(labels, **settings)
