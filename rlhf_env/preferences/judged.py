"""What several labelers said of the same responses: comparisons matched to each other, and how far they agree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_env.errors import DataError
from rlhf_env.intervals import bootstrap_interval, rate_interval
from rlhf_env.preferences.agreement import (
    Floats,
    cohen_kappa,
    fleiss_kappa,
    kendall_w,
    krippendorff_alpha,
    majority,
    percent_agreement,
)
from rlhf_env.types import Comparison

_FEWEST = 10

FIRST, TIE, SECOND = 1.0, 0.5, 0.0  # labels of a pair: the preference for its first response, as `Comparison.pairs`


@dataclass(frozen=True)
class JudgedItem:
    """A prompt and K different responses, with every labeler's ranking of them."""

    prompt: str
    responses: tuple[str, ...]  #: K ≥ 2, in the order of the comparison that came first
    ranks: dict[str, tuple[int, ...]]  #: by labeler: of each response, 0 = best, equal ones for a tie


def judged_items(comparisons: Sequence[Comparison]) -> list[JudgedItem]:
    """Comparisons of the same prompt and the same set of responses, in whatever order, as one item each.

    Where a labeler judged the same several times, the n-th time is matched to the n-th of the others. Left out are
    comparisons without a labeler, who may be anyone, and those in which a text occurs twice, so that ranks cannot be
    told apart.
    """
    items: dict[tuple[Any, ...], JudgedItem] = {}
    times = Counter[tuple[Any, ...]]()
    for c in comparisons:
        if not c.labeler or len(set(c.responses)) < len(c.responses):
            continue
        asked = (c.prompt, frozenset(c.responses))
        times[(c.labeler, *asked)] += 1
        item = items.setdefault((times[(c.labeler, *asked)], *asked), JudgedItem(c.prompt, c.responses, {}))
        rank_of = dict(zip(c.responses, c.ranks, strict=True))
        item.ranks[c.labeler] = tuple(rank_of[response] for response in item.responses)
    return list(items.values())


def label_table(items: Sequence[JudgedItem]) -> tuple[Floats, tuple[str, ...]]:
    """Labels [N, A] of N pairs, and the names of the A labelers, sorted: `FIRST`, `TIE` or `SECOND`, NaN where none.

    `DataError` is raised for items of more than two responses.
    """
    labelers = tuple(sorted({labeler for item in items for labeler in item.ranks}))
    column = {labeler: k for k, labeler in enumerate(labelers)}
    labels = np.full((len(items), len(labelers)), np.nan)
    for row, item in enumerate(items):
        if len(item.responses) != 2:
            raise DataError(f"a table of labels is made of pairs, but item {row} has {len(item.responses)} responses")
        for labeler, (first, second) in item.ranks.items():
            labels[row, column[labeler]] = TIE + 0.5 * float(np.sign(second - first))
    return labels, labelers


def agreement_report(comparisons: Sequence[Comparison], *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How far the labelers of comparisons agree on what two or more of them judged; `judged_items` says what that is.

    Counts: `comparisons`, `without_labeler` and `same_text_twice` (left out), `labelers`. Of pairs: their number
    `pairs`, and `percent_agreement`, `fleiss_kappa` (where all pairs have equally many labels),
    `krippendorff_nominal` and `krippendorff_ordinal` (a tie lies between the two preferences); how often the majority
    says `majority_first`, `majority_second`, `majority_tie`, or nothing, several labels sharing the most votes
    (`no_majority`). Of longer rankings: their number `rankings`, the mean `kendall_w` and its mean by chance,
    `kendall_w_by_chance`. Coefficients have `_low` and `_high`: bootstrap over items, of `draws` draws from `seed`.

    `between` has a row for every two labelers with pairs in common, most first: `labelers`, `pairs`, `cohen_kappa`,
    which has an interval from 10 pairs on. `each` has a
    row for every labeler of pairs: `labeler`, `pairs`, and `agrees_with_others`, the share of pairs with a majority of
    the other labelers in which this is also the labeler's own label (Wilson's interval).

    What is not defined is left out: a coefficient where all labels are the same, or all that concerns rankings where
    there are none. `DataError` is raised where nothing was judged by two labelers. Names are as in the file: make them
    safe before showing them.
    """
    items = judged_items(comparisons)
    shared = [item for item in items if len(item.ranks) > 1]
    if not shared:
        raise DataError(
            f"nothing among {len(comparisons)} comparisons was judged by two labelers: agreement needs comparisons of "
            "the same prompt and responses under different names in 'labeler'"
        )
    report: dict[str, Any] = {
        "comparisons": len(comparisons),
        "without_labeler": sum(not c.labeler for c in comparisons),
        "same_text_twice": sum(len(set(c.responses)) < len(c.responses) for c in comparisons if c.labeler),
        "labelers": len({labeler for item in items for labeler in item.ranks}),
    }
    pairs = [item for item in shared if len(item.responses) == 2]
    if pairs:
        report |= _of_pairs(*label_table(pairs), draws, seed)
    rankings = [item for item in shared if len(item.responses) > 2]
    if rankings:
        concordance = np.array([kendall_w(np.array(list(item.ranks.values())).T) for item in rankings])
        defined = concordance[~np.isnan(concordance)]  # somebody told something apart
        report |= {"rankings": len(rankings)}
        report |= bootstrap_interval("kendall_w", np.mean, defined, draws=draws, seed=seed) if len(defined) else {}
        report |= {"kendall_w_by_chance": float(np.mean([1 / len(item.ranks) for item in rankings]))}
    return report


def _kappa(both: Floats, draws: int, seed: int) -> dict[str, float]:
    """Cohen's κ of two labelers [N, 2]; of fewer than 10 pairs an interval would say nothing."""
    if len(both) >= _FEWEST:
        return bootstrap_interval("cohen_kappa", lambda drawn: cohen_kappa(*drawn.T), both, draws=draws, seed=seed)
    kappa = cohen_kappa(*both.T)
    return {} if np.isnan(kappa) else {"cohen_kappa": kappa}


def _of_pairs(labels: Floats, labelers: Sequence[str], draws: int, seed: int) -> dict[str, Any]:
    coefficients = {
        "percent_agreement": percent_agreement,
        "fleiss_kappa": fleiss_kappa,
        "krippendorff_nominal": krippendorff_alpha,
        "krippendorff_ordinal": lambda drawn: krippendorff_alpha(drawn, "ordinal"),
    }
    if len(set((~np.isnan(labels)).sum(1))) > 1:
        del coefficients["fleiss_kappa"]
    report: dict[str, Any] = {"pairs": len(labels)}
    for name, coefficient in coefficients.items():
        report |= bootstrap_interval(name, coefficient, labels, draws=draws, seed=seed)

    winner, tied = majority(labels)
    named = {"majority_first": FIRST, "majority_second": SECOND, "majority_tie": TIE}
    report |= {name: int((winner == label).sum()) for name, label in named.items()} | {"no_majority": int(tied.sum())}

    report["between"] = []
    for a, b in itertools.combinations(range(len(labelers)), 2):
        both = labels[:, [a, b]][~np.isnan(labels[:, [a, b]]).any(1)]
        if len(both):
            report["between"].append(
                {"labelers": [labelers[a], labelers[b]], "pairs": len(both)} | _kappa(both, draws, seed)
            )
    report["between"].sort(key=lambda row: -row["pairs"])
    report["each"] = []
    for k, labeler in enumerate(labelers):
        others, _ = majority(np.delete(labels, k, axis=1))
        judged = ~np.isnan(labels[:, k])
        decided = judged & ~np.isnan(others)
        agrees = float((labels[decided, k] == others[decided]).sum())
        rate = rate_interval("agrees_with_others", agrees, int(decided.sum())) if decided.any() else {}
        report["each"].append({"labeler": labeler, "pairs": int(judged.sum())} | rate)
    return report
