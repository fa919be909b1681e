"""95 % intervals of what a run measures, under names that go into its summary: `x`, `x_low`, `x_high`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution
# … and of Student's t with 1 to 30 degrees of freedom.
T95 = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
    *(2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272),
)


def mean_interval(name: str, x: NDArray[Any] | Sequence[float]) -> dict[str, float]:
    """Mean of independent values and its 95 % interval: Student's t up to 31 values, then normal; none for one."""
    x = np.asarray(x, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return {name: mean}
    quantile = T95[len(x) - 2] if len(x) - 1 <= len(T95) else Z95
    half = quantile * float(x.std(ddof=1)) / math.sqrt(len(x))
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def rate_interval(name: str, successes: float, n: int) -> dict[str, float]:
    """Share of successes and its 95 % interval by Wilson (1927), which stays within [0, 1] and works at 0 and 1."""
    rate, z2 = successes / n, Z95 * Z95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return {name: rate, f"{name}_low": centre - half, f"{name}_high": centre + half}
