import math

import pytest

from rlhf_env.report.scales import bin_edges, domain, drawable, nice_step, number, tick_labels, ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.2164, "2.22"),
        (-0.04567, "−0.0457"),
        (25, "25"),
        (999.4, "999"),
        (999.6, "1,000"),
        (100352.0, "100,352"),
        (1e20, "1e+20"),
        (math.nan, "—"),
        (-math.inf, "—"),
        ("eos", "eos"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_numbers_of_four_digits():
    assert number(1.0034, 4) == "1.003"


@pytest.mark.parametrize(
    ("span", "parts", "step"), [(10, 5, 2), (11, 5, 5), (1, 4, 0.5), (0.3, 6, 0.05), (1e5, 6, 2e4)]
)
def test_steps_are_one_two_or_five(span, parts, step):
    assert nice_step(span, parts) == pytest.approx(step)


def test_ticks_are_multiples_within_the_range():
    assert ticks(0, 100_000) == [0, 20_000, 40_000, 60_000, 80_000, 100_000]
    assert ticks(-0.3, 0.31) == pytest.approx([-0.2, 0, 0.2])
    assert ticks(1.2, 4.1) == pytest.approx([1.5, 2, 2.5, 3, 3.5, 4])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 2e4, 1e5], ["0", "20k", "100k"]),
        ([0, 500, 1000], ["0", "500", "1000"]),
        ([0, 5e5, 1e6], ["0", "0.5M", "1.0M"]),
        ([2e9, 4e9], ["2B", "4B"]),
        ([-0.25, 0, 0.25], ["−0.25", "0", "0.25"]),
        ([3 * 0.1, 4 * 0.1], ["0.3", "0.4"]),
        ([1e-5, 2e-5], ["1e−05", "2e−05"]),
        ([1_000_000, 1_000_001], ["1.000000M", "1.000001M"]),
        ([], []),
    ],
)
def test_tick_labels_share_a_unit_and_differ(values, labels):
    assert tick_labels(values) == labels


def test_a_domain_is_a_little_wider_but_stops_at_zero():
    assert domain([0, 100]) == (0, 104)
    assert domain([-100, 0]) == (-104, 0)
    assert domain([100, 200]) == (96, 204)


def test_a_domain_of_one_value_has_a_width():
    assert domain([5, 5]) == (4.5, 5.5)
    assert domain([0]) == (-1, 1)


def test_whole_numbers_lie_in_the_middle_of_their_bins():
    assert bin_edges([1, 2, 4]) == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert bin_edges([7]) == [6.5, 7.5]
    assert bin_edges([0, 39]) == [-0.5 + 2 * i for i in range(21)]


def test_bins_of_fractions_begin_at_multiples_of_the_step():
    assert bin_edges([0.0, 0.35], parts=4) == [0.0, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    "values", [[5e-324], [5e-324, 1e-310], [9e299, -9e299], [1e20], [1e20 + 1e5, 1e20], [1, 1 + 1e-15]]
)
def test_extreme_numbers_have_scales_too(values):
    low, high = domain(values)
    assert low < high and math.isfinite(high - low)
    assert len(ticks(low, high)) <= 7
    edges = bin_edges(values)
    assert 2 <= len(edges) <= 30 and edges[0] < edges[-1]


def test_what_can_be_drawn():
    assert drawable(0.0) and drawable(-1e299)
    assert not any(map(drawable, [None, math.nan, math.inf, -math.inf, 1e301]))
