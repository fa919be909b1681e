"""Five annotators of very different care, and what can be learned of them without knowing the truth.

    python examples/agreement.py                  # simulated: two careful, two hasty, one contrary; seconds
    python examples/agreement.py labels.jsonl     # a row per item: {"anna": 1, "ben": 2, "carl": 1}

In a file the keys are annotators, the values their labels (numbers); what somebody did not label is left out or null.
Simulated annotators compare film reviews, and here the truth is known: which of the two VADER finds more positive.
"""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from rlhf_env.intervals import bootstrap_interval
from rlhf_env.preferences.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha, majority, percent_agreement
from rlhf_env.preferences.dawid_skene import dawid_skene
from rlhf_env.preferences.labelers import SimulatedLabeler, utilities_of
from rlhf_env.records.jsonl import read_jsonl
from rlhf_env.records.safe_text import safe_text
from rlhf_env.reward_models import VaderReward
from rlhf_env.settings import LabelerConfig
from rlhf_env.text.corpus import film_reviews

CAREFUL, HASTY = LabelerConfig(temperature=0.1), LabelerConfig(temperature=1.0)
CONTRARY = LabelerConfig(temperature=0.1, flip_rate=0.9)
PEOPLE = {"careful 1": CAREFUL, "careful 2": CAREFUL, "hasty 1": HASTY, "hasty 2": HASTY, "contrary": CONTRARY}


def simulated(count: int) -> tuple[NDArray[np.float64], list[str], NDArray[np.float64]]:
    """Labels [count, 5] of pairs of film reviews, 1 or 2 for the better one; the annotators; and the truth [count]."""
    reviews, gold = film_reviews(), VaderReward()
    pairs = [reviews[2 * i : 2 * i + 2] for i in range(count)]
    ranks = [
        SimulatedLabeler(gold, config, seed=seed).rank([""] * count, pairs, range(count))
        for seed, config in enumerate(PEOPLE.values())
    ]
    labels = np.array([[1.0 if r and r[0] < r[1] else 2.0 for r in column] for column in ranks]).T
    truth = [math.nan if u[0] == u[1] else 1.0 + (u[1] > u[0]) for u in utilities_of(gold, [""] * count, pairs)]
    return labels, list(PEOPLE), np.array(truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="labels; none: simulated")
    args, truth = parser.parse_args(), None
    if args.file:
        rows = read_jsonl(args.file)
        people = sorted({name for row in rows for name in row})
        labels = np.array([[row.get(name) for name in people] for row in rows], dtype=np.float64)
    else:
        labels, people, truth = simulated(1000)
    people, winner, model = [safe_text(name) for name in people], majority(labels)[0], dawid_skene(labels)
    guess = model.classes[model.posterior.argmax(1)]

    overall = {"percent agreement": percent_agreement, "Krippendorff's alpha": krippendorff_alpha}
    if not np.isnan(labels).any():
        overall["Fleiss's kappa"] = fleiss_kappa
    measured = [(name, statistic, labels) for name, statistic in overall.items()]
    for a, b in itertools.combinations(range(len(people)), 2):
        both = labels[:, [a, b]][~np.isnan(labels[:, [a, b]]).any(1)]
        measured.append((f"Cohen's kappa, {people[a]} & {people[b]}", lambda x: cohen_kappa(*x.T), both))
    for name, statistic, table in measured:
        found = bootstrap_interval("x", statistic, table) if len(table) else {}
        print(f"{name:42}", *(f"{x:.3f}" for x in found.values()))
    print("majority:", ", ".join(f"{label:g}: {(winner == label).sum()}" for label in model.classes))
    for name, accuracy in zip(people, model.accuracy, strict=True):
        print(f"{name}: accuracy {accuracy:.3f} by Dawid and Skene")
    if truth is not None:
        right = [np.mean((labelled == truth)[~np.isnan(truth)]) for labelled in (winner, guess)]
        print(f"right: the majority in {right[0]:.1%} of pairs, Dawid and Skene in {right[1]:.1%}")


if __name__ == "__main__":
    main()
