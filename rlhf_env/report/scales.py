"""Numbers for people: which ones can be drawn, where ticks and bins lie, how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

_UNITS = ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))


def drawable(value: float | None) -> TypeGuard[float]:
    """Whether `value` is a number that fits on a page: finite, and so far from the largest that sums are finite too."""
    return value is not None and math.isfinite(value) and abs(value) < 1e300


def number(value: float | str, digits: int = 3) -> str:
    """`value` in so many significant digits, or whole from 1,000 on; "—" if it is not finite; a text as it is."""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "—"
    text = f"{value:,.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def domain(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis for `values`: a little more than theirs, but an end at 0 stays there."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(-low, high, 1e-290):
        margin = abs(low) / 10 if abs(low) > 1e-200 else 1.0
        return low - margin, high + margin
    margin = 0.04 * (high - low)
    return (low - margin if low else 0.0, high + margin if high else 0.0)


def nice_step(span: float, parts: int) -> float:
    """The smallest step of 1, 2 or 5 times a power of ten that covers `span` in at most `parts` steps."""
    rough = max(span / parts, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def ticks(low: float, high: float, parts: int = 6) -> list[float]:
    """The multiples of a nice step between `low` and `high`, ends included."""
    step = nice_step(high - low, parts)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Ticks as text in one unit (20k, 1.5M) and with as many decimals as tell them apart."""
    largest = max(map(abs, values), default=0.0)
    if largest and not 1e-4 <= largest < 1e12:
        return [f"{value:.3g}".replace("-", "−") for value in values]
    scale, unit = next(((scale, unit) for limit, scale, unit in _UNITS if largest >= limit), (1.0, ""))
    scaled = [value / scale for value in values]
    apart = scaled[1] - scaled[0] if len(values) > 1 else largest / scale
    decimals = next((d for d in range(10) if all(abs(round(v, d) - v) < 1e-6 * apart for v in scaled)), 10)
    return [f"{v:.{decimals}f}{unit}".replace("-", "−") if v else "0" for v in scaled]


def bin_edges(values: Sequence[float], parts: int = 20) -> list[float]:
    """Edges of about `parts` bins of a nice width that hold all `values`; whole numbers lie in the middle of theirs."""
    low, high = min(values), max(values)
    whole = all(float(value).is_integer() for value in values)
    step = nice_step(high - low or abs(low) or 1.0, parts)
    step, origin = (max(step, 1.0), -0.5) if whole else (step, 0.0)
    first, last = math.floor((low - origin) / step), math.floor((high - origin) / step) + 1
    edges = [float(f"{origin + i * step:.12g}") for i in range(first, last + 1)]  # 0.3, not 0.30000000000000004
    return edges if edges[0] < edges[-1] else list(domain(values))
