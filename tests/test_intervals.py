"""95 % intervals, against numbers from books and numerical integration."""

import math

import numpy as np
import pytest

from rlhf_env.intervals import T95, bootstrap_interval, mean_interval, rate_interval


def test_mean_interval_by_hand():
    # Mean 3, standard deviation √2.5, four degrees of freedom: t = 2.776445.
    half = 2.776445 * math.sqrt(2.5 / 5)
    interval = mean_interval("x", np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert interval == pytest.approx({"x": 3.0, "x_low": 3 - half, "x_high": 3 + half})
    assert mean_interval("x", np.array([2.0])) == {"x": 2.0}


def test_many_values_have_the_normal_interval():
    x = np.tile([0.0, 1.0], 500)
    half = 1.959964 * math.sqrt(0.25 / 999)  # variance 0.25 · 1000/999
    assert mean_interval("x", x)["x_high"] == pytest.approx(0.5 + half)


@pytest.mark.parametrize("freedom", range(1, len(T95) + 1))
def test_students_quantiles_leave_two_and_a_half_percent_above(freedom):
    # ∫ over the tail of t's density, substituting t = √ν tan u.
    u = np.linspace(math.atan(T95[freedom - 1] / math.sqrt(freedom)), math.pi / 2, 200_001)
    density = np.cos(u) ** (freedom - 1)
    constant = math.gamma((freedom + 1) / 2) / (math.gamma(freedom / 2) * math.sqrt(math.pi))
    assert constant * np.trapezoid(density, u) == pytest.approx(0.025, abs=1e-7)


def test_wilsons_interval_as_published():
    # Newcombe (1998), table I, method 3.
    assert rate_interval("r", 81, 263) == pytest.approx({"r": 81 / 263, "r_low": 0.2553, "r_high": 0.3662}, abs=5e-5)
    assert rate_interval("r", 0, 20) == pytest.approx({"r": 0, "r_low": 0.0, "r_high": 0.1611}, abs=5e-5)


def test_the_bootstrap_of_a_share_is_binomial():
    # Resampled, 30 ones among 100 are Binomial(100, 0.3); its exact 2.5 % and 97.5 % points by summing.
    cumulative = np.cumsum([math.comb(100, k) * 0.3**k * 0.7 ** (100 - k) for k in range(101)])
    low, high = (int(np.searchsorted(cumulative, q)) / 100 for q in (0.025, 0.975))
    found = bootstrap_interval("x", np.mean, np.repeat([1.0, 0.0], [30, 70]), draws=20_000)
    assert found == pytest.approx({"x": 0.3, "x_low": low, "x_high": high}, abs=0.01 + 1e-9)  # one step of the share


def test_the_bootstrap_draws_whole_items():
    rows = np.column_stack([np.arange(50.0), -np.arange(50.0)])
    assert bootstrap_interval("x", np.sum, rows) == {"x": 0, "x_low": 0, "x_high": 0}


def test_the_bootstrap_repeats_itself_and_depends_on_its_seed():
    x = np.arange(20.0)
    one, again, other = (bootstrap_interval("x", np.mean, x, seed=seed) for seed in (0, 0, 1))
    assert one == again != other


def test_a_statistic_that_is_not_defined_has_no_interval():
    x = np.arange(20.0)
    assert bootstrap_interval("x", lambda drawn: math.nan, x) == {}
    assert bootstrap_interval("x", np.mean, x[:1]) == {"x": 0.0}
    as_given = bootstrap_interval("x", lambda drawn: 1.0 if (drawn == x).all() else math.nan, x)
    assert as_given == {"x": 1.0}  # and no draw


def test_draws_in_which_a_statistic_is_not_defined_are_left_out():
    x = np.array([1.0, 2.0, 3.0])  # all three equal in 3 of 27 draws
    found = bootstrap_interval("x", lambda drawn: math.nan if np.ptp(drawn) == 0 else drawn.mean(), x)
    assert found["x_low"] == pytest.approx(4 / 3) and found["x_high"] == pytest.approx(8 / 3)
