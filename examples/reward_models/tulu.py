"""What graded judgements by many people hold: do grades help as margins, and knowing who judges? Who is biased?

    python examples/reward_models/tulu.py tulu_human_eval.jsonl      # two minutes

FILE holds pairs with grades, policies and labelers, such as the human evaluation of Tülu (Wang et al. 2023, arXiv
2306.04751). What is learned is measured on prompts held out, in five folds; intervals draw whole prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_env.intervals import bootstrap_interval
from rlhf_env.preferences.comparisons import distinct, read_comparisons
from rlhf_env.preferences.judged import agreement_report
from rlhf_env.preferences.labeler_effects import labeler_effects
from rlhf_env.preferences.splits import folds_by_prompt, normalised
from rlhf_env.preferences.statistics import describe
from rlhf_env.records.safe_text import safe_text
from rlhf_env.reward_models.linear import fit_linear
from rlhf_env.types import Comparison

Array = NDArray[np.float64]


def cell(found: dict[str, float], name: str) -> str:
    if name not in found:
        return f"{'–':>20}"
    return f"{found[name]:6.3f} [{found[f'{name}_low']:.3f}, {found[f'{name}_high']:.3f}]"


def by_prompt(name: str, values: Array, comparisons: Sequence[Comparison]) -> str:
    """The mean of a value of each comparison, and its interval over draws of whole prompts."""
    number = {prompt: k for k, prompt in enumerate(dict.fromkeys(normalised(c.prompt) for c in comparisons))}
    sums = np.zeros((len(number), 2))
    np.add.at(sums, [number[normalised(c.prompt)] for c in comparisons], np.stack([values, np.ones_like(values)], 1))
    return cell(bootstrap_interval(name, lambda drawn: float(np.divide(*drawn.sum(0))), sums), name)


def margins(comparisons: Sequence[Comparison], count: int) -> None:
    folds = [
        (learned, [c for c in out if c.ranks[0] != c.ranks[1]]) for learned, out in folds_by_prompt(comparisons, count)
    ]
    measured, right = [c for _, out in folds for c in out], {}
    for margin in (0.0, 0.25, 0.5, 1.0):
        leads = []
        for learned, out in folds:
            model = fit_linear(learned, margin=margin)
            first, second = (model.logits([], [c.responses[i] for c in out]) for i in (0, 1))
            leads.append((first - second) * [c.ranks[1] - c.ranks[0] for c in out])
        right[margin] = 0.5 + 0.5 * np.sign(np.concatenate(leads))
    print(f"\nwords, grades as margins: {len(measured)} pairs that are no tie")
    print("logits a grade  accuracy                 more than without")
    for margin, each in right.items():
        print(f"{margin:14}  {by_prompt('x', each, measured)}   {by_prompt('x', each - right[0.0], measured)}")


def who_judges(comparisons: Sequence[Comparison], count: int) -> None:
    policies = sorted({policy for c in comparisons for policy in c.writers})

    def leads(those: Sequence[Comparison]) -> Array:
        """First minus second: log length, 1 for being stored first, and a column for each policy."""
        return np.array(
            [
                [np.log1p(len(c.responses[0])) - np.log1p(len(c.responses[1])), 1.0]
                + [(c.writers[0] == p) - (c.writers[1] == p) for p in policies]
                for c in those
            ],
            dtype=np.float64,
        )

    def judged(those: Sequence[Comparison]) -> tuple[Array, list[str]]:
        return np.array([preference for c in those for _, _, preference in c.pairs]), [c.labeler for c in those]

    folds, losses = list(folds_by_prompt(comparisons, count)), {}
    measured = [c for _, out in folds for c in out]
    for spread in (0.0, 0.25, 0.5, 1.0, 4.0):
        p = [
            labeler_effects(leads(learned), *judged(learned), spread=spread).probabilities(leads(out), judged(out)[1])
            for learned, out in folds
        ]
        p, y = np.concatenate(p), judged(measured)[0]
        losses[spread] = -y * np.log(p) - (1 - y) * np.log1p(-p)
    print("\nlength, place and policies, weights of each labeler")
    print("spread  log loss                 less than where all are alike")
    for spread, loss in losses.items():
        print(f"{spread:6}  {by_prompt('x', loss, measured)}   {by_prompt('x', losses[0.0] - loss, measured)}")

    spread = min(losses, key=lambda s: losses[s].mean())
    model = labeler_effects(leads(comparisons), *judged(comparisons), spread=spread)
    others = {row["labeler"]: row for row in agreement_report(comparisons).get("each", [])}
    print(
        f"\n{'labeler':8} {'n':>4}   ties  longer preferred       first stored preferred  agrees with others      "
        f"log-odds of e times the length, spread {spread}"
    )
    for row in describe(comparisons)["by_labeler"]:
        name, cells = row["labeler"], [cell(row, x) for x in ("longer_preferred", "first_stored_preferred")]
        cells += [cell(others.get(name, {}), "agrees_with_others"), cell(model.interval("x", name, 0), "x")]
        print(f"{safe_text(name):8} {row['comparisons']:4} {row.get('ties', 0):6.1%} {'  '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="graded pairs with policies and labelers")
    parser.add_argument("--folds", type=int, default=5, help="how often to learn")
    args = parser.parse_args()
    comparisons, identical = distinct(read_comparisons(args.file))
    print(f"{len(comparisons)} comparisons; {identical} of identical responses are left out")
    margins(comparisons, args.folds)
    who_judges(comparisons, args.folds)


if __name__ == "__main__":
    main()
