"""How far annotators agree, beyond what chance would give them: pure functions of a table of labels.

`labels` [N, A] holds what A annotators said of N items: numbers, the same number for the same label, and NaN where an
annotator said nothing. κ and α are 1 for perfect agreement and 0 for that of chance; they may be negative. They are NaN
where only one label occurs at all, since then nothing tells agreement from chance. `DataError` is raised where no item
has two labels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_env.errors import DataError

Level = Literal["nominal", "ordinal", "interval"]
Floats = NDArray[np.float64]


def label_counts(labels: ArrayLike) -> tuple[Floats, Floats]:
    """The C different labels, ascending, and how often each was given to each item: [C], [N, C]."""
    labels = _table(labels)
    values = np.unique(labels[~np.isnan(labels)])
    return values, (labels[:, :, None] == values).sum(1).astype(np.float64)


def percent_agreement(labels: ArrayLike) -> float:
    """The share of equal labels among all pairs of labels of an item, averaged over items with two labels or more.

    P̄ = mean_i Σ_j n_ij (n_ij − 1) / (m_i (m_i − 1)) with n_ij labels j among the m_i of item i; Fleiss 1971. Not
    corrected for chance: two who always say "first" agree perfectly.
    """
    _, n = _shared(labels)
    m = n.sum(1)
    return float(((n * (n - 1)).sum(1) / (m * (m - 1))).mean())


def cohen_kappa(first: ArrayLike, second: ArrayLike, level: Literal["nominal", "interval"] = "nominal") -> float:
    """κ = 1 − Σ d o / Σ d e of two annotators' labels [N], [N], over the items that both labelled.

    o is the table of how often each pair of labels occurred, e what their separate shares would give. With d = 1 off
    the diagonal this is (p_o − p_e)/(1 − p_e), Cohen 1960, eq. 1; with level "interval", d = (c − k)² of the labels'
    values: quadratic weights, Cohen 1968.
    """
    both = _table(np.stack([np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)], axis=-1))
    both = both[~np.isnan(both).any(1)]
    if len(both) == 0:
        raise DataError("the two annotators have no item in common, so how far they agree cannot be said")
    values = np.unique(both)
    one, other = (both[:, [k]] == values for k in (0, 1))  # [N, C]
    observed = one.T.astype(np.float64) @ other / len(both)
    return _beyond_chance(observed, np.outer(one.mean(0), other.mean(0)), _distance(values, level))


def fleiss_kappa(labels: ArrayLike) -> float:
    """κ = (P̄ − P̄_e)/(1 − P̄_e), where every item has the same number of labels, by whomever; Fleiss 1971.

    P̄ is `percent_agreement`, P̄_e = Σ_j p_j² with p_j the share of label j. Where numbers differ, `DataError` is
    raised; `krippendorff_alpha` takes those.
    """
    _, n = label_counts(labels)
    m = n.sum(1)
    if (m != m[0]).any():
        odd = int(np.argmax(m != m[0]))
        raise DataError(
            f"Fleiss's kappa needs equally many labels of every item, but item 0 has {m[0]:.0f} and item {odd} has "
            f"{m[odd]:.0f}; Krippendorff's alpha does not"
        )
    chance = float(((n.sum(0) / n.sum()) ** 2).sum()) if n.sum() else 0.0
    agreement = percent_agreement(labels)
    return (agreement - chance) / (1 - chance) if n.shape[1] > 1 else float("nan")


def krippendorff_alpha(labels: ArrayLike, level: Level = "nominal") -> float:
    """α = 1 − D_o / D_e, for any number of annotators and with labels missing; Krippendorff 2011, §C and §D.

    D is the mean squared distance of two labels: D_o of those of one item, D_e of any two. An item of m labels has
    m(m − 1) ordered pairs, each of weight 1/(m − 1), so that a label weighs 1; an item of one label has none. The
    distance is 1 between different labels (nominal), the number of labels that lie between, with half of the two
    themselves (ordinal), or the difference of the labels' values (interval).
    """
    values, n = _shared(labels)
    # Coincidences o_ck = Σ_u n_uc (n_uk − [c = k]) / (m_u − 1), whose margins n_c count the labels that can be paired.
    per_pair = n / (n.sum(1, keepdims=True) - 1)
    coincidences = per_pair.T @ n - np.diag(per_pair.sum(0))
    margins = n.sum(0)
    if level == "ordinal":
        values = margins.cumsum() - margins / 2  # Σ_{g=c..k} n_g − (n_c + n_k)/2 is the difference of mean ranks
    expected = (np.outer(margins, margins) - np.diag(margins)) / (margins.sum() - 1)
    return _beyond_chance(coincidences, expected, _distance(values, "nominal" if level == "nominal" else "interval"))


def kendall_w(ranks: ArrayLike) -> float:
    """Concordance of M rankings of K things, [K, M], between 0 and 1; its mean by chance is 1/M, not 0.

    W = Σ_i (R_i − R̄)² / (M Σ_j Σ_i (r_ij − r̄)²) with R_i = Σ_j r_ij: the spread of the sums of ranks over that of M
    equal rankings. Without ties this is 12 S / (M²(K³ − K)); tied things share the mean of their ranks, and then it is
    W with the correction for ties (Kendall & Babington Smith 1939; Kendall 1948, ch. 6). NaN where all is tied. Any
    numbers are taken as ranks by their order. No rank may be missing.
    """
    ranks = _table(ranks)
    if np.isnan(ranks).any() or min(ranks.shape) < 2:
        raise DataError(
            f"Kendall's W needs complete rankings of at least 2 things by at least 2 annotators; these are "
            f"{ranks.shape[0]} things by {ranks.shape[1]}{', with ranks missing' * bool(np.isnan(ranks).any())}"
        )
    lower, equal = ((ranks[None] < ranks[:, None]).sum(1), (ranks[None] == ranks[:, None]).sum(1))  # [K, M]
    centred = lower + (equal + 1) / 2 - (len(ranks) + 1) / 2  # ranks from 1 to K, those that are tied sharing theirs
    most = ranks.shape[1] * (centred**2).sum()
    return float((centred.sum(1) ** 2).sum() / most) if most else float("nan")


def majority(labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """The label that most annotators gave to each item, [N], and whether several labels share the most votes, [N].

    It is NaN where they do, and where nobody said anything: no vote is decided by the order of the labels.
    """
    values, n = label_counts(labels)
    if len(values) == 0:
        return np.full(len(n), np.nan), np.zeros(len(n), dtype=bool)
    tied = ((n == n.max(1, keepdims=True)).sum(1) > 1) & (n.max(1) > 0)
    return np.where(tied | (n.max(1) == 0), np.nan, values[n.argmax(1)]), tied


def _beyond_chance(observed: Floats, expected: Floats, distance: Floats) -> float:
    """1 − Σ d o / Σ d e over a table of pairs of labels; NaN where chance cannot disagree either."""
    by_chance = (distance * expected).sum()
    return float(1 - (distance * observed).sum() / by_chance) if by_chance else float("nan")


def _distance(values: Floats, level: Literal["nominal", "interval"]) -> Floats:
    """Squared distances of C labels, [C, C]: 1 or 0, or those of their values."""
    difference = values[:, None] - values
    return (difference != 0).astype(np.float64) if level == "nominal" else difference**2


def _shared(labels: ArrayLike) -> tuple[Floats, Floats]:
    """`label_counts` of the items that have two labels or more."""
    values, n = label_counts(labels)
    shared = n.sum(1) > 1
    if not shared.any():
        raise DataError("no item has labels of two annotators, so how far they agree cannot be said")
    return values, n[shared]


def _table(labels: ArrayLike) -> Floats:
    labels = np.asarray(labels, dtype=np.float64)
    if labels.ndim != 2 or labels.shape[0] == 0:
        raise DataError(f"labels are a table [items, annotators] with an item at least, not {list(labels.shape)}")
    if np.isinf(labels).any():
        raise DataError("a label is infinite; labels are finite numbers, and NaN where there is none")
    return labels
