"""Charts as inline SVG that takes its colours from the page's theme; titles, legends and labels are HTML and wrap."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_env.records.safe_text import safe_html
from rlhf_env.report.content import Chart, Histogram, Point, Series
from rlhf_env.report.scales import bin_edges, domain, drawable, number, tick_labels, ticks

_WIDTH, _HEIGHT, _TOP, _RIGHT, _BOTTOM = 400, 220, 8, 16, 22
_COLOURS = 6
_MOST_TOOLTIPS = 200


def draw_chart(chart: Chart) -> str:
    """A figure with one or more series; a value that is not finite is a gap."""
    points = [point for series in chart.series for point in series.points if _placed(point)]
    legend = [(s.name, "" if any(map(_placed, s.points)) else "no finite values") for s in chart.series]
    if not points:
        return _figure(chart, chart.y_label, legend, "")
    frame = _Frame(
        domain([p.x for p in points]), domain([y for p in points for y in (p.y, p.low, p.high) if drawable(y)])
    )
    marks = _draw_diagonal(frame) if chart.diagonal else ""
    marks += "".join(_group(i, _draw_series(s, chart, frame)) for i, s in enumerate(chart.series))
    return _figure(chart, chart.y_label, legend, frame.axes() + marks)


def draw_histogram(histogram: Histogram) -> str:
    """A figure with the groups' distributions over the same bins; values that are not finite are left out."""
    groups = {name: [value for value in values if drawable(value)] for name, values in histogram.groups.items()}
    legend = [(name, f"mean {number(sum(v) / len(v))}, n {len(v)}" if v else "no values") for name, v in groups.items()]
    values = [value for group in groups.values() for value in group]
    if not values:
        return _figure(histogram, "share", legend, "")
    edges = bin_edges(values)
    counts = {name: _count(group, edges) for name, group in groups.items()}
    shares = {name: [100 * n / max(1, len(groups[name])) for n in count] for name, count in counts.items()}
    frame = _Frame((edges[0], edges[-1]), domain([0.0, *itertools.chain(*shares.values())]), "%")
    marks = [_group(i, _draw_steps(edges, share, frame)) for i, share in enumerate(shares.values())]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        lines = [f"{number(low)} to {number(high)}"]
        lines += [f"{name}: {counts[name][i]} ({number(share[i])} %)" for name, share in shares.items()]
        (x, top), (right, bottom) = frame.place(low, frame.y[1]), frame.place(high, frame.y[0])
        box = f'x="{x:.1f}" y="{top:.1f}" width="{right - x:.1f}" height="{bottom - top:.1f}"'
        marks.append(f'<rect class="bin" {box}>{_tooltip(lines)}</rect>')
    return _figure(histogram, "share", legend, frame.axes() + "".join(marks))


@dataclass(frozen=True)
class _Frame:
    """A rectangle of the drawing with the ranges of both axes."""

    x: tuple[float, float]
    y: tuple[float, float]
    unit: str = ""  # of y

    @property
    def y_labels(self) -> list[str]:
        return [label + self.unit for label in tick_labels(ticks(*self.y))]

    @property
    def left(self) -> float:
        return 10 + 6.3 * max(map(len, self.y_labels), default=0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        bottom = _HEIGHT - _BOTTOM
        return self.left + across * (_WIDTH - _RIGHT - self.left), bottom - up * (bottom - _TOP)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in itertools.starmap(self.place, points))

    def axes(self) -> str:
        axes = []
        for value, label in zip(ticks(*self.y), self.y_labels, strict=True):
            _, y = self.place(self.x[0], value)
            kind = "axis" if value == 0 else "grid"
            axes.append(f'<path class="{kind}" d="M{self.left:.1f},{y:.1f}H{_WIDTH - _RIGHT}"/>')
            axes.append(f'<text x="{self.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for value, label in zip(ticks(*self.x), tick_labels(ticks(*self.x)), strict=True):
            x, bottom = self.place(value, self.y[0])
            axes.append(f'<path class="axis" d="M{x:.1f},{bottom:.1f}v4"/>')
            axes.append(f'<text x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{label}</text>')
        return "".join(axes)


def _placed(point: Point) -> bool:
    return drawable(point.x) and drawable(point.y)


def _draw_series(series: Series, chart: Chart, frame: _Frame) -> str:
    marks = []
    for placed, run in itertools.groupby(series.points, _placed):
        if placed:
            marks += _draw_run(list(run), series.style, frame)
    points = [point for point in series.points if _placed(point)]
    if series.style == "line":
        points, shape = points[:: len(points) // _MOST_TOOLTIPS + 1], 'class="hit" r="6"'
    else:
        shape = 'class="dot" r="3.5"'
    for point in points:
        x, y = frame.place(point.x, point.y)
        tooltip = _tooltip(_describe(point, series.name, chart))
        marks.append(f'<circle {shape} cx="{x:.1f}" cy="{y:.1f}">{tooltip}</circle>')
    return "".join(marks)


def _draw_run(run: Sequence[Point], style: str, frame: _Frame) -> list[str]:
    marks = []
    intervals = [(p.x, p.low, p.high) if drawable(p.low) and drawable(p.high) else None for p in run]
    for known, part in itertools.groupby(intervals, bool):
        part = [interval for interval in part if interval]
        if known and style == "line":
            edge = [(x, low) for x, low, _ in part] + [(x, high) for x, _, high in reversed(part)]
            marks.append(f'<path class="band" d="{frame.path(edge)}Z"/>')
        else:
            marks += [f'<path class="bar" d="{frame.path([(x, low), (x, high)])}"/>' for x, low, high in part]
    if style != "dots":
        ends = [(p.x, p.y) for p in run]
        marks.append(f'<path class="line" d="{frame.path(ends if len(ends) > 1 else ends * 2)}"/>')
    return marks


def _draw_diagonal(frame: _Frame) -> str:
    low, high = max(frame.x[0], frame.y[0]), min(frame.x[1], frame.y[1])
    return f'<path class="diagonal" d="{frame.path([(low, low), (high, high)])}"/>' if low < high else ""


def _draw_steps(edges: Sequence[float], heights: Sequence[float], frame: _Frame) -> str:
    corners = [(x, y) for (low, high), y in zip(itertools.pairwise(edges), heights, strict=True) for x in (low, high)]
    return f'<path class="steps" d="{frame.path([(edges[0], 0.0), *corners, (edges[-1], 0.0)])}"/>'


def _count(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return counts


def _describe(point: Point, name: str, chart: Chart) -> list[str]:
    bounds = f" ({number(point.low)} to {number(point.high)})" if drawable(point.low) and drawable(point.high) else ""
    numbers = [f"{chart.y_label}: {number(point.y)}{bounds}", f"{chart.x_label}: {number(point.x)}"]
    return [line for line in (name, point.label, *numbers) if line]


def _tooltip(lines: Sequence[str]) -> str:
    return f"<title>{safe_html(chr(10).join(lines))}</title>"


def _group(index: int, marks: str) -> str:
    return f'<g class="s{index % _COLOURS}">{marks}</g>'


def _figure(chart: Chart | Histogram, y_label: str, legend: Sequence[tuple[str, str]], drawing: str) -> str:
    keys = [
        f'<span class="s{i % _COLOURS}"><i></i>{safe_html(name)} <small>{safe_html(remark)}</small></span>'
        for i, (name, remark) in enumerate(legend)
        if name or remark
    ]
    parts = [f"<h3>{safe_html(chart.title)}</h3>", f'<p class="keys">{"".join(keys)}</p>' if keys else ""]
    if drawing:
        size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{safe_html(chart.title)}"'
        parts += [f'<p class="label">↑ {safe_html(y_label)}</p><svg {size}>{drawing}</svg>']
        parts += [f'<p class="label x">{safe_html(chart.x_label)} →</p>']
    else:
        parts += ['<p class="note">Nothing to draw: no finite values.</p>']
    parts += [f'<p class="note">{safe_html(chart.note)}</p>' if chart.note else ""]
    return f'<figure class="card">{"".join(parts)}</figure>'
