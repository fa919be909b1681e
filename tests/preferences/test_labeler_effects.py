"""Weights of each labeler: what the likeliest ones fulfil, how they are pulled together, and two equivalences."""

import math

import numpy as np
import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.arena import bradley_terry
from rlhf_env.preferences.labeler_effects import labeler_effects


def judged(seed=0, count=60, leads=2):
    rng = np.random.default_rng(seed)
    who = [("ann", "ben", "carl")[k] for k in rng.integers(3, size=count)]
    return rng.normal(size=(count, leads)), rng.choice([0.0, 0.5, 1.0], size=count), who


@pytest.mark.parametrize("spread", [0.3, 1.0, 5.0])
def test_the_likeliest_weights_balance_the_gradient_with_the_priors(spread):
    """w / 10² = Σ_a g_a and d_a / spread² = g_a, with g_a = Σ x (y − p) over a's comparisons."""
    x, y, who = judged()
    found = labeler_effects(x, y, who, spread=spread)
    of = np.array([found.labelers.index(name) for name in who])
    p = 1 / (1 + np.exp(-(x * found.own[of]).sum(1)))
    gradient = np.array([((y - p)[of == a, None] * x[of == a]).sum(0) for a in range(3)])
    np.testing.assert_allclose(found.shared / 100, gradient.sum(0), atol=1e-7)
    np.testing.assert_allclose((found.own - found.shared) / spread**2, gradient, atol=1e-7)
    np.testing.assert_allclose(found.probabilities(x, who), p)


def test_by_a_spread_of_0_all_are_alike_and_it_is_bradley_terry_with_a_ridge():
    rng = np.random.default_rng(1)
    first, second = rng.permuted(np.tile(np.arange(4), (50, 1)), axis=1)[:, :2].T
    y, who = rng.integers(2, size=50).astype(float), ["ann", "ben"] * 25
    x = np.eye(4)[first] - np.eye(4)[second]
    found = labeler_effects(x, y, who, spread=0.0)
    np.testing.assert_allclose(found.own, [found.shared] * 2)
    np.testing.assert_allclose(found.shared, bradley_terry(first, second, y, ridge=0.01).strength, atol=1e-7)


def test_without_a_bound_each_has_the_log_odds_of_its_own_share():
    y = [1.0] * 30 + [0.0] * 10 + [1.0] * 10 + [0.0] * 30
    who = ["ann"] * 40 + ["ben"] * 40
    free = labeler_effects(np.ones((80, 1)), y, who, spread=1e3)
    np.testing.assert_allclose(free.own[:, 0], [math.log(3), -math.log(3)], atol=1e-5)
    # The variance of a log-odds estimated alone is 1 / (n p (1 − p)).
    np.testing.assert_allclose(free.error[:, 0], math.sqrt(1 / (40 * 0.75 * 0.25)), rtol=1e-4)
    pulled = labeler_effects(np.ones((80, 1)), y, who, spread=0.3)
    assert 0 < pulled.own[0, 0] < math.log(3) and pulled.error[0, 0] < free.error[0, 0]
    interval = free.interval("first", "ben", 0)
    assert interval["first_high"] - interval["first"] == pytest.approx(1.959964 * free.error[1, 0])


def test_who_judged_little_is_pulled_further():
    y = [1.0] * 40 + [1.0] * 2 + [0.0] * 100
    who = ["busy"] * 40 + ["new"] * 2 + ["other"] * 100
    busy, new, _ = labeler_effects(np.ones((142, 1)), y, who, spread=1.0).own[:, 0]
    assert busy > new > labeler_effects(np.ones((142, 1)), y, who, spread=0.0).shared[0]


def test_of_a_stranger_the_shared_weights_are_believed():
    x, y, who = judged()
    found = labeler_effects(x, y, who, spread=1.0)
    np.testing.assert_allclose(found.probabilities(x[:5], ["nobody"] * 5), 1 / (1 + np.exp(-x[:5] @ found.shared)))


def test_turning_pairs_round_changes_nothing():
    x, y, who = judged()
    turn = np.where(np.arange(60) % 2, -1.0, 1.0)
    one, other = (
        labeler_effects(*given, who, spread=0.5) for given in ((x, y), (x * turn[:, None], 0.5 + turn * (y - 0.5)))
    )
    np.testing.assert_allclose(one.own, other.own, atol=1e-7)
    np.testing.assert_allclose(one.error, other.error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leads": np.ones(3)}, r"leads \[3\], preferences \[3\] and 3 labelers do not match"),
        ({"labelers": ["ann"]}, "1 labelers do not match"),
        ({"leads": [[np.nan], [1], [1]]}, "leads must be finite"),
        ({"preference": [0, 1, 2]}, "preferences between 0 and 1"),
        ({"spread": -1.0}, "the spread at least 0"),
        ({"spread": np.inf}, "the spread at least 0 and finite"),
    ],
)
def test_a_mistake_is_named(change, message):
    given = {"leads": np.ones((3, 1)), "preference": [0, 1, 1], "labelers": ["ann"] * 3, "spread": 1.0, **change}
    with pytest.raises(DataError, match=message):
        labeler_effects(**given)
