import math
import re

import pytest

from rlhf_env.report.charts import draw_chart, draw_histogram
from rlhf_env.report.content import Chart, Histogram, Point, Series
from tests.report.pages import Page

NAN = math.nan


def chart(*series, **kwargs) -> str:
    return draw_chart(Chart("title", "tokens", "score", series, **kwargs))


def path(html: str, kind: str) -> list[str]:
    return re.findall(f'<path class="{kind}" d="([^"]*)"', html)


def test_points_are_placed_by_hand():
    # x of 0 … 100 is drawn to 0 … 104 between left and 400 − 16, y to 0 … 104 between 198 (bottom) and 8 (top);
    # the left margin is 10 + 6.3 × 3 letters of the label 100.
    html = chart(Series("a", (Point(0, 0), Point(100, 100))))
    right, top = 28.9 + 355.1 * 100 / 104, 198 - 190 * 100 / 104
    assert path(html, "line") == [f"M28.9,198.0L{right:.1f},{top:.1f}"]
    assert Page(html).text["text"] == ["0", "20", "40", "60", "80", "100"] * 2


def test_a_value_that_is_not_finite_is_a_gap():
    points = [Point(0, 1), Point(1, 2), Point(2, NAN), Point(3, 1), Point(math.inf, 1), Point(5, 2), Point(6, 1)]
    html = chart(Series("a", tuple(points)))
    assert [line.count(",") for line in path(html, "line")] == [2, 2, 2]  # the lone third point as a dot
    first, last = re.split("[ML]", path(html, "line")[1])[1:]
    assert first == last
    assert html.count("<circle") == 5
    assert "nan" not in html and "inf" not in html


def test_intervals_are_bands_around_lines_and_bars_at_markers():
    points = (Point(0, 1, 0, 2), Point(1, 2, 1, 3), Point(2, 2, NAN, 3), Point(3, 2))
    line, both, dots = (chart(Series("a", points, style)) for style in ("line", "both", "dots"))
    assert [band.count(",") for band in path(line, "band")] == [4]
    assert [len(path(html, "bar")) for html in (line, both, dots)] == [0, 2, 2]
    assert [len(path(html, "line")) for html in (line, both, dots)] == [1, 1, 0]
    assert [html.count('class="dot"') for html in (line, both, dots)] == [0, 4, 4]


def test_every_marker_says_its_numbers():
    html = chart(Series("best of n", (Point(0.5, 0.25, 0.2, 0.3, "n = 4"), Point(1, 1)), "dots"))
    assert Page(html).text["title"] == [
        "best of n\nn = 4\nscore: 0.25 (0.2 to 0.3)\ntokens: 0.5",
        "best of n\nscore: 1\ntokens: 1",
    ]


def test_long_lines_have_at_most_two_hundred_tooltips():
    html = chart(Series("a", tuple(Point(x, x) for x in range(1000))))
    assert path(html, "line")[0].count(",") == 1000
    assert 100 <= html.count("<title>") <= 200


def test_the_diagonal_is_where_both_axes_agree():
    html = chart(Series("a", (Point(0, 0), Point(100, 50)), "dots"), diagonal=True)
    left = 10 + 6.3 * 2  # y labels have two letters
    end = left + (384 - left) * 52 / 104  # y ends at 52, x at 104
    assert path(html, "diagonal") == [f"M{left:.1f},198.0L{end:.1f},8.0"]


@pytest.mark.parametrize("points", [(), (Point(NAN, 1), Point(1, NAN), Point(-math.inf, math.inf))])
def test_nothing_finite_is_said_so(points):
    html = chart(Series("lost", points))
    assert "<svg" not in html
    assert "Nothing to draw" in html and "no finite values" in html


def test_each_series_has_its_colour_and_legend():
    html = chart(Series("a", (Point(0, 1),)), Series("b", (Point(0, NAN),)), Series("", (Point(0, 2),)))
    assert re.findall(r'<span class="(s\d)"><i></i>(\w+) <small>(.*?)</small>', html) == [
        ("s0", "a", ""),
        ("s1", "b", "no finite values"),
    ]
    assert re.findall(r'<g class="(s\d)">', html) == ["s0", "s1", "s2"]


def test_a_histogram_shows_shares_of_each_group_over_the_same_bins():
    html = draw_histogram(Histogram("lengths", "tokens", {"before": [1, 1, 1, 2], "after": [3, NAN], "lost": [NAN]}))
    assert Page(html).text["title"] == [
        "0.5 to 1.5\nbefore: 3 (75 %)\nafter: 0 (0 %)\nlost: 0 (0 %)",
        "1.5 to 2.5\nbefore: 1 (25 %)\nafter: 0 (0 %)\nlost: 0 (0 %)",
        "2.5 to 3.5\nbefore: 0 (0 %)\nafter: 1 (100 %)\nlost: 0 (0 %)",
    ]
    assert Page(html).text["small"] == ["mean 1.25, n 4", "mean 3, n 1", "no values"]
    # Bottom, up to 75 % of an axis to 104 %, down to 25 %, down to 0.
    heights = [float(y) for y in re.findall(r",([\d.]+)", path(html, "steps")[0])]
    quarter = 190 * 25 / 104
    expected = [198, *[198 - 3 * quarter] * 2, *[198 - quarter] * 2, 198, 198, 198]
    assert heights == pytest.approx(expected, abs=0.06)


def test_an_empty_histogram_says_so():
    assert "Nothing to draw" in draw_histogram(Histogram("lengths", "tokens", {}))
    assert "Nothing to draw" in draw_histogram(Histogram("lengths", "tokens", {"a": [NAN]}))
