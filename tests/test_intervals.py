"""95 % intervals, against numbers from books and numerical integration."""

import math

import numpy as np
import pytest

from rlhf_env.intervals import T95, mean_interval, rate_interval


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
