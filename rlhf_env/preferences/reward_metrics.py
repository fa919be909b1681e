"""How well scores predict comparisons: pure functions of comparisons and of the scores [K] of each one's responses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rlhf_env.functional import bradley_terry_loss
from rlhf_env.intervals import bootstrap_interval, clustered_rate_interval, mean_interval
from rlhf_env.preferences.agreement import majority
from rlhf_env.preferences.judged import TIE, judged_items, label_table
from rlhf_env.preferences.splits import normalised
from rlhf_env.preferences.statistics import LENGTHS, logistic_slope, preferred_rate
from rlhf_env.text.prompts import hash_fraction
from rlhf_env.types import Comparison

Floats = NDArray[np.float64]

BINS = 10  # of the reliability diagram
length_of = LENGTHS["characters"]


def accuracy(
    name: str,
    comparisons: Sequence[Comparison],
    scores: Sequence[Floats],
    among: Callable[[Comparison, int, int], bool] = lambda c, better, worse: True,
) -> dict[str, Any]:
    """Share of pairs whose preferred response has the higher score, half where both are equal; ties are left out.

    `among(comparison, better, worse)` says which pairs count, by the numbers of their responses. Beside `name` stand
    "_pairs", their number, and a 95 % interval (`clustered_rate_interval`), since the pairs of a prompt err together.
    Empty where no pair counts.
    """
    hits, prompts = list[float](), list[str]()
    for c, s in zip(comparisons, scores, strict=True):
        ordered = [(i, j) if p > 0.5 else (j, i) for i, j, p in c.pairs if p != 0.5]
        theirs = [0.5 + 0.5 * np.sign(s[better] - s[worse]) for better, worse in ordered if among(c, better, worse)]
        hits += theirs
        prompts += [c.prompt] * len(theirs)
    return clustered_rate_interval(name, hits, prompts) | {f"{name}_pairs": len(hits)} if hits else {}


def ranked_by(comparisons: Sequence[Comparison], values: Sequence[Floats]) -> list[Comparison]:
    """The same responses, ranked by values [K] of each, the highest first; equal values are a tie."""
    ranks = [np.unique(-v, return_inverse=True)[1].tolist() for v in values]
    return [Comparison(c.prompt, c.responses, tuple(r)) for c, r in zip(comparisons, ranks, strict=True)]


def differences(comparison: Comparison, scores: Floats) -> Floats:
    """Score differences [P] of all pairs, as `Comparison.pairs` orders them."""
    return np.array([scores[i] - scores[j] for i, j, _ in comparison.pairs], dtype=np.float64)


def calibration(difference: ArrayLike, preference: ArrayLike) -> dict[str, Any]:
    """How true σ(d) is as the probability of a preference y, for differences d [P] and preferences y [P] in [0, 1].

    log_loss     mean `bradley_terry_loss`, in nats per pair; log 2 = 0.693 for one who knows nothing
    brier        mean (σ(d) − y)²
    ece          expected calibration error: mean |predicted − observed| over the bins, weighted by their counts
    reliability  its bins that are not empty; each pair counts in both orders, so none stands first
    """
    d, y = (torch.as_tensor(np.asarray(x, dtype=np.float64)) for x in (difference, preference))
    # Both orders of every pair; σ(−d) rather than 1 − σ(d), so that the two are treated exactly alike.
    p, seen = torch.sigmoid(torch.cat([d, -d])).numpy(), torch.cat([y, 1 - y]).numpy()
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    reliability = [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "predicted": float(p[bins == k].mean()),
            "observed": float(seen[bins == k].mean()),
            "count": int((bins == k).sum()),
        }
        for k in np.unique(bins).tolist()
    ]
    return {
        "log_loss": float(bradley_terry_loss(d, y).mean()),
        "brier": float(((p - seen) ** 2).mean()),
        "ece": sum(bin["count"] * abs(bin["predicted"] - bin["observed"]) for bin in reliability) / len(p),
        "reliability": reliability,
    }


def measure_logits(
    comparisons: Sequence[Comparison], logits: Sequence[Floats], log_odds: Sequence[Floats] | None
) -> dict[str, Any]:
    """`accuracy`, `margin` (mean lead of the preferred response, ties left out), `calibration`, `pairs` and `ties`.

    `log_odds` [P] of each comparison are those of its pairs as the model states them, for a Bradley–Terry model the
    `differences` of its logits; none: it states no probability, and there is no calibration.
    """
    d, y = _all_pairs(comparisons, [differences(c, s) for c, s in zip(comparisons, logits, strict=True)])
    leads = (d * np.sign(y - 0.5))[y != 0.5]
    return {
        **accuracy("accuracy", comparisons, logits),
        **({"margin": float(leads.mean())} if len(leads) else {}),
        **({} if log_odds is None else calibration(*_all_pairs(comparisons, log_odds))),
        "pairs": len(y),
        "ties": int((y == 0.5).sum()),
    }


def _all_pairs(comparisons: Sequence[Comparison], of_pairs: Sequence[Floats]) -> tuple[Floats, Floats]:
    """What is said of each comparison's pairs, one after the other [P], and their preferences [P]."""
    y = np.array([p for c in comparisons for _, _, p in c.pairs], dtype=np.float64)
    return np.concatenate([np.zeros(0), *of_pairs]), y


def measure_scores(
    comparisons: Sequence[Comparison],
    scores: Sequence[Floats],
    log_odds: Sequence[Floats] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """What the scores of any reward model tell about comparisons, as JSON would hold it; what is not known is left out.

    `accuracy` with its interval; `kendall_tau`; `length` (`length_effect`); `by_labeler` and `by_policies`
    (`accuracy_by`); the `scaled_calibration` of the scores, whose scale is fitted on one half of the prompts and
    measured on the other; `score_mean` and `score_std` over the responses. Where the model states probabilities of
    preferences, give the `log_odds` of each comparison's pairs: then `calibration` says how true they are before any
    scaling, and `scale` is theirs.
    """
    halves: tuple[list[int], list[int]] = ([], [])
    for i, c in enumerate(comparisons):
        halves[hash_fraction(normalised(c.prompt), f"scale {seed}") < 0.5].append(i)
    leads = [differences(c, s) for c, s in zip(comparisons, scores, strict=True)] if log_odds is None else log_odds
    prompts = [comparisons[i].prompt for i in halves[0] for _ in comparisons[i].pairs]
    learned, measured = (_all_pairs([comparisons[i] for i in half], [leads[i] for i in half]) for half in halves)
    found = measure_logits(comparisons, scores, log_odds)
    flat = np.concatenate(scores)
    return {
        **found,
        **scaled_calibration(learned, measured, prompts),
        **rank_correlation(comparisons, scores),
        "length": length_effect(comparisons, scores, seed=seed),
        "by_labeler": accuracy_by("labeler", lambda c: c.labeler, comparisons, scores),
        "by_policies": accuracy_by("policies", lambda c: ", ".join(sorted({*c.writers} - {""})), comparisons, scores),
        "score_mean": float(flat.mean()),
        "score_std": float(flat.std()),
    }


def scaled_calibration(
    learned: tuple[ArrayLike, ArrayLike], measured: tuple[ArrayLike, ArrayLike], prompts: Sequence[Hashable]
) -> dict[str, Any]:
    """`calibration` of scores of any unit, as "scaled_log_loss" and so on: of σ(b d) with the likeliest b.

    `scale` b, with its interval, comes from the differences and preferences of `learned` and the `prompts` they belong
    to (`logistic_slope`), the rest is of `measured` (temperature scaling: Guo et al. 2017, arXiv 1706.04599, §4.2). For
    logits of a Bradley–Terry model b should be 1; below 1 they are too sure, and below 0 they prefer what people do
    not. Empty where no finite b is likeliest.
    """
    slope = logistic_slope(*learned, prompts)
    if not slope or not len(np.asarray(measured[0])):
        return {}
    scale = {name.replace("slope", "scale"): value for name, value in slope.items()}
    found = calibration(slope["slope"] * np.asarray(measured[0]), measured[1])
    return scale | {f"scaled_{name}": value for name, value in found.items()}


def kendall_tau(x: ArrayLike, y: ArrayLike) -> float:
    """τ-b of two rankings [K], [K]: (C − D) / √(pairs not tied in x · pairs not tied in y); Kendall 1945.

    C pairs stand in the same order in both and D in opposite ones. NaN where all of x, or all of y, is tied.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    first, second = np.triu_indices(len(x), 1)
    a, b = np.sign(x[first] - x[second]), np.sign(y[first] - y[second])
    untied = np.abs(a).sum() * np.abs(b).sum()
    return float((a * b).sum() / math.sqrt(untied)) if untied else float("nan")


def rank_correlation(comparisons: Sequence[Comparison], scores: Sequence[Floats]) -> dict[str, Any]:
    """Mean `kendall_tau` between scores and ranks of the rankings of three or more, its interval, and their number.

    Rankings for which it is not defined, since all is tied, are left out. For two responses it would be 2·accuracy − 1.
    """
    taus = [kendall_tau(s, -np.array(c.ranks)) for c, s in zip(comparisons, scores, strict=True) if len(s) > 2]
    defined = [tau for tau in taus if not math.isnan(tau)]
    return mean_interval("kendall_tau", defined) | {"rankings": len(defined)} if defined else {}


def length_effect(comparisons: Sequence[Comparison], scores: Sequence[Floats], *, seed: int = 0) -> dict[str, Any]:
    """How scores go with the length of responses, in characters; what cannot be known is left out.

    pearson, spearman    correlation of score and log(1 + length) within prompts: both are centred on the mean of the
                         different responses to a prompt. Spearman's is that of the ranks of these centred values.
                         Intervals: bootstrap over prompts
    longer_higher        share of pairs in which the longer response has the higher score (half where equal), and
    longer_preferred     in which the longer one was preferred: equal for a reward that likes length as people do
    accuracy_longer      accuracy where the longer response was preferred, and
    accuracy_shorter     where the shorter was. A reward that goes by length has 1 and 0
    """
    by_prompt: dict[str, dict[str, float]] = defaultdict(dict)
    for c, s in zip(comparisons, scores, strict=True):
        by_prompt[c.prompt] |= zip(c.responses, s.tolist(), strict=True)
    groups = [
        (np.array([math.log1p(length_of(text)) for text in those]), np.array(list(those.values())))
        for those in by_prompt.values()
        if len(those) > 1
    ]
    if not groups:
        return {}
    x, y = (np.concatenate([group[k] - group[k].mean() for group in groups]) for k in (0, 1))
    ends = np.cumsum([len(group[0]) for group in groups])[:-1]
    middle = (len(x) + 1) / 2
    sides = {"pearson": (x, y), "spearman": (average_ranks(x) - middle, average_ranks(y) - middle)}
    found: dict[str, Any] = {}
    for name, (a, b) in sides.items():
        moments = np.stack([np.add.reduceat(m, [0, *ends]) for m in (a * a, b * b, a * b)], axis=-1)  # [prompts, 3]
        found |= bootstrap_interval(name, _correlation, moments, seed=seed)

    lengths = [np.array([length_of(text) for text in c.responses], dtype=np.float64) for c in comparisons]

    def is_longer(c: Comparison, i: int, j: int) -> int:
        return int(np.sign(length_of(c.responses[i]) - length_of(c.responses[j])))

    return {
        **found,
        **accuracy("longer_higher", ranked_by(comparisons, lengths), scores),
        **preferred_rate("longer_preferred", comparisons, is_longer),
        **accuracy("accuracy_longer", comparisons, scores, lambda c, i, j: is_longer(c, i, j) > 0),
        **accuracy("accuracy_shorter", comparisons, scores, lambda c, i, j: is_longer(c, i, j) < 0),
    }


def average_ranks(x: ArrayLike) -> Floats:
    """Ranks from 1 to N of values [N]; equal values share the mean of theirs."""
    _, group, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[group].astype(np.float64)


def correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation of [N] and [N]; NaN where one of them is constant."""
    a, b = (values - values.mean() for values in (np.asarray(v, dtype=np.float64) for v in (x, y)))
    return _correlation(np.array([[(a * a).sum(), (b * b).sum(), (a * b).sum()]]))


def annotator_ceiling(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """How often a label of a pair is that of the majority of the other labelers: `annotator_ceiling`.

    Whoever predicts the others' majority perfectly is right about a single label that often, so no reward model can be
    expected to be much better. Ties, and pairs on which the others share their votes, do not count. In the interval the
    labels of a prompt are alike. Empty where no pair was judged by two labelers.
    """
    items = [item for item in judged_items(comparisons) if len(item.ranks) > 1 and len(item.responses) == 2]
    if not items:
        return {}
    labels, labelers = label_table(items)
    agrees, prompts = list[bool](), list[str]()
    for k in range(len(labelers)):
        others, _ = majority(np.delete(labels, k, axis=1))
        decided = ~np.isnan(labels[:, k]) & ~np.isnan(others) & (labels[:, k] != TIE) & (others != TIE)
        agrees += (labels[decided, k] == others[decided]).tolist()
        prompts += [items[i].prompt for i in np.flatnonzero(decided)]
    return clustered_rate_interval("annotator_ceiling", agrees, prompts) if agrees else {}


def accuracy_by(
    key: str, of: Callable[[Comparison], str], comparisons: Sequence[Comparison], scores: Sequence[Floats]
) -> list[dict[str, Any]]:
    """Rows of each group of comparisons, the largest first: `key`, which is the name from `of`, and its `accuracy`.

    Comparisons whose name is "" and groups of ties alone are left out.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, c in enumerate(comparisons):
        if name := of(c):
            groups[name].append(i)
    rows = [
        {key: name, "comparisons": len(index)}
        | accuracy("accuracy", [comparisons[i] for i in index], [scores[i] for i in index])
        for name, index in groups.items()
    ]
    return sorted((row for row in rows if "accuracy" in row), key=lambda row: (-row["comparisons"], row[key]))


def _correlation(moments: Floats) -> float:
    """Σxy / √(Σxx Σyy) of rows of Σxx, Σyy, Σxy."""
    xx, yy, xy = moments.sum(0)
    return float(xy / math.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")
