"""95 % intervals of what a run measures, under names that go into its summary: `x`, `x_low`, `x_high`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
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


def student_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t with `freedom` ≥ 1 degrees of freedom; above 30, that of the normal one."""
    return T95[freedom - 1] if freedom <= len(T95) else Z95


def mean_interval(name: str, x: NDArray[Any] | Sequence[float]) -> dict[str, float]:
    """Mean of independent values and its 95 % interval: Student's t up to 31 values, then normal; none for one."""
    x = np.asarray(x, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return {name: mean}
    half = student_quantile(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def rate_interval(name: str, successes: float, n: float) -> dict[str, float]:
    """Share of successes and its 95 % interval by Wilson (1927), which stays within [0, 1] and works at 0 and 1."""
    rate, z2 = successes / n, Z95 * Z95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return {name: rate, f"{name}_low": centre - half, f"{name}_high": centre + half}


def clustered_rate_interval(
    name: str, hits: NDArray[Any] | Sequence[float], clusters: Sequence[Hashable]
) -> dict[str, float]:
    """Share of `hits` [N], each in [0, 1], and its 95 % interval where those of one cluster are alike; `clusters` [N].

    Wilson's, of the number of independent hits that would say as much (Korn and Graubard 1998): of G clusters and p the
    share,

        n = p (1 − p) / v · (t_{N − 1} / t_{G − 1})²,    v = Σ_g (Σ_{i in g} (hit_i − p))² / N² · (1 − 1/N) / (1 − 1/G)

    within 1 and N: N where each hit is a cluster of its own, and G where no hits differ.
    """
    hit = np.asarray(hits, dtype=np.float64)
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    rate, count, groups = float(hit.mean()), len(hit), len(number)
    if groups == 1 or hit.min() == hit.max():
        return rate_interval(name, rate * groups, groups)
    sums = np.bincount([number[cluster] for cluster in clusters], hit - rate)
    variance = float((sums * sums).sum()) / count**2 * (1 - 1 / count) / (1 - 1 / groups)
    few = (student_quantile(count - 1) / student_quantile(groups - 1)) ** 2
    worth = rate * (1 - rate) * few
    n = count if worth >= count * variance else max(1.0, worth / variance)
    return rate_interval(name, rate * n, n)


def bootstrap_interval(
    name: str,
    statistic: Callable[[NDArray[Any]], float],
    items: NDArray[Any],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """A statistic of independent items [N, …] and the 2.5 % and 97.5 % points of it over resamples of whole items.

    Efron 1979, the percentile bootstrap. Draws for which the statistic is NaN (not defined) are left out. Empty where
    it is NaN for the items themselves; no interval for one item or where fewer than half of the draws are left.
    """
    value, rng = float(statistic(items)), np.random.default_rng([seed, _BOOTSTRAP_STREAM])
    if math.isnan(value):
        return {}
    picked = (rng.integers(len(items), size=len(items)) for _ in range(draws if len(items) > 1 else 0))
    drawn = np.array([statistic(items[index]) for index in picked])
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) == 0 or len(drawn) < draws / 2:
        return {name: value}
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}


_BOOTSTRAP_STREAM = 6
