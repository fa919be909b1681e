"""95 % intervals, against numbers from books and numerical integration."""

import math

import numpy as np
import pytest

from rlhf_env.intervals import T95, bootstrap_interval, clustered_rate_interval, mean_interval, rate_interval


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


def test_clustered_hits_by_hand():
    """Shares 1, 0 and ½ of two each: p = ½, sums about it 1, −1, 0, so v = 2/36 · (5/6)/(2/3) = 5/72."""
    n = 0.25 / (5 / 72) * (2.570582 / 4.302653) ** 2
    assert n == pytest.approx(1.285, abs=1e-3)
    found = clustered_rate_interval("r", [1, 1, 0, 0, 1, 0], list("aabbcc"))
    assert found == pytest.approx(rate_interval("r", n / 2, n))


def test_hits_of_clusters_of_their_own_are_independent():
    found = clustered_rate_interval("r", [1] * 81 + [0] * 182, range(263))
    assert found == pytest.approx({"r": 81 / 263, "r_low": 0.2553, "r_high": 0.3662}, abs=5e-5)  # Newcombe's, as above


def test_where_no_hits_differ_and_within_one_cluster_clusters_count():
    assert clustered_rate_interval("r", [1] * 60, list("abc") * 20) == rate_interval("r", 3, 3)
    assert clustered_rate_interval("r", [1, 0, 1, 1], "aaaa") == rate_interval("r", 0.75, 1)


def test_repeating_every_hit_tells_nothing():
    """Fifty times the same: n is the number of clusters, but for the estimate of their variance."""
    hits = np.tile([1.0, 0.0, 0.0, 1.0], 25)
    once = clustered_rate_interval("r", hits, range(100))
    again = clustered_rate_interval("r", np.repeat(hits, 50), np.repeat(np.arange(100), 50).tolist())
    assert again == pytest.approx(once, abs=1e-3)


@pytest.mark.parametrize(("clusters", "of", "spread"), [(5, 20, 0.6), (30, 10, 0.6), (30, 10, 0.0), (100, 3, 0.6)])
def test_the_interval_of_clusters_holds_the_truth_95_times_in_100(clusters, of, spread):
    """Shares p_g uniform on 0.65 ± spread/2. Wilson's interval of all hits held it 66 to 93 times."""
    rng, held = np.random.default_rng(0), 0
    names = np.repeat(np.arange(clusters), of).tolist()
    for _ in range(600):
        shares = 0.65 + spread * (rng.random((clusters, 1)) - 0.5)
        found = clustered_rate_interval("r", (rng.random((clusters, of)) < shares).ravel(), names)
        held += found["r_low"] <= 0.65 <= found["r_high"]
    assert 0.92 < held / 600 < 0.98  # 0.95 ± 3 standard errors


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
