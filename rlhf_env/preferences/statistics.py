"""What a set of comparisons holds, and what is wrong with it: biases, duplicates, contradictions, agreement."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlhf_env.intervals import clustered_rate_interval, student_quantile
from rlhf_env.preferences.splits import normalised
from rlhf_env.types import Comparison

LENGTHS: dict[str, Callable[[str], int]] = {"words": lambda text: len(text.split()), "characters": len}


def describe(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """All that a look at comparisons can tell, as JSON would hold it; what cannot be known is left out.

    - counts: `comparisons`, `prompts`, `near_duplicate_prompts` (that are another but for case or white space),
      `responses` ({K: comparisons of K}), `pairs` (of different responses) and `ties` among them, `labelers`,
      `policies`; comparisons with `soft_labels`, `strengths`, `orders`, `times`; `identical` (all responses the same)
    - `repeated`: comparisons equal to an earlier one in all that is known of them; the next four leave them out
    - `judged_again`: pairs that the same labeler had judged before; `contradictions`: pairs judged both ways
    - `cycles`: prompts on which a labeler's preferences, summed by pair, run in a circle, a over b over c over a;
      `cycles_of_all`: those on which the sum of all labelers' does
    - `length`, by words and by characters: `longer_preferred` (`preferred_rate`) and the `logistic_slope` b of
      P(i preferred to j) = σ(b log((1 + length i) / (1 + length j)))
    - `position`: `first_shown_preferred`, where the order is known
    - `first_stored_preferred`: 1, and no bias, where files store the chosen response first, as TRL's do
    - `by_labeler`, the busiest first: comparisons, rate of ties; preferred what is longer (in characters), was shown
      first, is stored first

    How far labelers agree says `judged.agreement_report`.
    """
    pairs = [pair for c in comparisons for pair in c.pairs]
    prompts = {c.prompt for c in comparisons}
    distinct = list(dict.fromkeys(comparisons))
    return {
        "comparisons": len(comparisons),
        "prompts": len(prompts),
        "near_duplicate_prompts": len(prompts) - len({normalised(prompt) for prompt in prompts}),
        "responses": {str(k): n for k, n in sorted(Counter(len(c.responses) for c in comparisons).items())},
        "pairs": len(pairs),
        "ties": sum(preference == 0.5 for _, _, preference in pairs),
        "labelers": len({c.labeler for c in comparisons if c.labeler}),
        "policies": len({policy for c in comparisons for policy in c.writers if policy}),
        "soft_labels": sum(c.preference is not None for c in comparisons),
        "strengths": sum(c.strength is not None for c in comparisons),
        "orders": sum(c.order is not None for c in comparisons),
        "times": sum(c.time is not None for c in comparisons),
        "identical": sum(len(set(c.responses)) == 1 for c in comparisons),
        "repeated": len(comparisons) - len(distinct),
        **_consistency(distinct),
        "length": {unit: _length_bias(comparisons, length) for unit, length in LENGTHS.items()},
        "position": preferred_rate("first_shown_preferred", comparisons, _shown_earlier),
        **preferred_rate("first_stored_preferred", comparisons, lambda c, i, j: 1),
        "by_labeler": [_labeler(name, theirs) for name, theirs in _by_labeler(comparisons)],
    }


def preferred_rate(
    name: str, comparisons: Iterable[Comparison], leads: Callable[[Comparison, int, int], int]
) -> dict[str, Any]:
    """How often the response that leads is preferred: `name`, its 95 % interval, and with "_pairs" of how many pairs.

    `leads` says of a comparison's responses i and j which does: above 0 i, below 0 j, 0 neither. Pairs of which neither
    does, and ties, do not count. In the interval (`clustered_rate_interval`) the pairs of a prompt are alike.
    """
    decided = [
        (lead * (p - 0.5) > 0, c.prompt)
        for c in comparisons
        for i, j, p in c.pairs
        if p != 0.5 and (lead := leads(c, i, j))
    ]
    if not decided:
        return {}
    won, prompts = zip(*decided, strict=True)
    return clustered_rate_interval(name, won, prompts) | {f"{name}_pairs": len(won)}


def logistic_slope(x: ArrayLike, y: ArrayLike, clusters: Sequence[Hashable]) -> dict[str, float]:
    """The b that makes P(y = 1) = σ(b x) likeliest, x and y [N] with y in [0, 1]: `slope` and its 95 % interval.

    Without an intercept: turning a pair round, x to −x and y to 1 − y, changes nothing. Newton's method. What belongs
    to one of the `clusters` [N] is alike: with U_g the sum of (y − σ(b x)) x over the g-th of G and I the information,
    the variance is Σ_g U_g² / I² · G / (G − 1) (Liang and Zeger 1986), and the interval Student's with G − 1 degrees of
    freedom; none for one cluster. Empty where no finite b is likeliest, since all pairs, or none, go with x.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(c for c, d in zip(clusters, x, strict=True) if d))}
    group = [number[cluster] for cluster, d in zip(clusters, x, strict=True) if d]
    x, y = x[x != 0], y[x != 0]
    with_x = np.where(x > 0, y, 1 - y)
    if not len(x) or with_x.min() == 1 or with_x.max() == 0:
        return {}
    scale = math.sqrt(float((x * x).mean()))
    x, b, information = x / scale, 0.0, 1.0
    for _ in range(100):
        p = 0.5 + 0.5 * np.tanh(b * x / 2)
        information = float((p * (1 - p) * x * x).sum())
        step = float(((y - p) * x).sum()) / information
        b += max(-1.0, min(1.0, step))  # the likelihood is concave, but far from its maximum Newton's step is too long
        if abs(step) < 1e-12:
            break
    if (groups := len(number)) < 2:
        return {"slope": b / scale}
    sums = np.bincount(group, (y - 0.5 - 0.5 * np.tanh(b * x / 2)) * x)
    variance = float((sums * sums).sum()) / information**2 * groups / (groups - 1)
    half = student_quantile(groups - 1) * math.sqrt(variance)
    return {"slope": b / scale, "slope_low": (b - half) / scale, "slope_high": (b + half) / scale}


def _length_bias(comparisons: Sequence[Comparison], length: Callable[[str], int]) -> dict[str, Any]:
    lengths = {id(c): [length(response) for response in c.responses] for c in comparisons}
    ratios = [math.log((1 + n[i]) / (1 + n[j])) for c in comparisons for n in [lengths[id(c)]] for i, j, _ in c.pairs]
    preferences = [preference for c in comparisons for _, _, preference in c.pairs]
    prompts = [c.prompt for c in comparisons for _ in c.pairs]
    rate = preferred_rate("longer_preferred", comparisons, lambda c, i, j: _sign(lengths[id(c)][i] - lengths[id(c)][j]))
    return rate | logistic_slope(ratios, preferences, prompts)


def _shown_earlier(c: Comparison, i: int, j: int) -> int:
    return 0 if c.order is None else _sign(c.order.index(j) - c.order.index(i))


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _by_labeler(comparisons: Iterable[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """The comparisons of each labeler that is known, who has the most first."""
    theirs: dict[str, list[Comparison]] = defaultdict(list)
    for c in comparisons:
        if c.labeler:
            theirs[c.labeler].append(c)
    return sorted(theirs.items(), key=lambda each: (-len(each[1]), each[0]))


def _labeler(name: str, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    preferences = [preference for c in comparisons for _, _, preference in c.pairs]
    length = LENGTHS["characters"]
    longer = preferred_rate(
        "longer_preferred", comparisons, lambda c, i, j: _sign(length(c.responses[i]) - length(c.responses[j]))
    )
    shown = preferred_rate("first_shown_preferred", comparisons, _shown_earlier)
    ties = {"ties": sum(p == 0.5 for p in preferences) / len(preferences)} if preferences else {}
    stored = preferred_rate("first_stored_preferred", comparisons, lambda c, i, j: 1)
    return {"labeler": name, "comparisons": len(comparisons)} | ties | longer | shown | stored


_Key = tuple[str, str, str, str]  # prompt, one text, the other, of which the first is smaller, and labeler


def _verdicts(comparisons: Iterable[Comparison]) -> dict[_Key, list[int]]:
    """What each labeler said of each pair of texts: 1: the first is better, −1: the second, 0: a tie."""
    said: dict[_Key, list[int]] = defaultdict(list)
    for c in comparisons:
        for i, j, preference in c.pairs:
            a, b, verdict = c.responses[i], c.responses[j], _sign(preference - 0.5)
            key, verdict = ((a, b), verdict) if a < b else ((b, a), -verdict)
            said[c.prompt, *key, c.labeler].append(verdict)
    return said


def _consistency(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """Of comparisons without repetitions; where the labeler is not known, only `cycles_of_all` counts them."""
    said = _verdicts(comparisons)
    known = [verdicts for (*_, labeler), verdicts in said.items() if labeler]
    pooled = _verdicts(replace(c, labeler="") for c in comparisons)
    return {
        "judged_again": sum(len(verdicts) - 1 for verdicts in known),
        "contradictions": sum({1, -1} <= set(verdicts) for verdicts in known),
        "cycles": _cycles({key: verdicts for key, verdicts in said.items() if key[3]}),
        "cycles_of_all": _cycles(pooled),
    }


def _cycles(said: Mapping[_Key, list[int]]) -> int:
    """On how many (prompt, labeler) the preferences, each pair's verdicts summed, run in a circle."""
    worse: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for (prompt, first, second, labeler), verdicts in said.items():
        if total := sum(verdicts):
            better, other = (first, second) if total > 0 else (second, first)
            worse[prompt, labeler][better].add(other)
    return sum(map(_is_cyclic, worse.values()))


def _is_cyclic(graph: Mapping[str, set[str]]) -> bool:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return True
    return False
