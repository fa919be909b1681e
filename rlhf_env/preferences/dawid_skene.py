"""True classes of items, and how each annotator errs, from labels alone: Dawid & Skene 1979, by EM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_env.errors import DataError
from rlhf_env.preferences.agreement import label_counts

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DawidSkene:
    """What `dawid_skene` found. Classes are the C different labels, ascending."""

    classes: Floats  #: the label of each class, [C]
    posterior: Floats  #: probability of each class, given all labels of an item, [N, C]
    confusion: Floats  #: probability of each label, given the class, of each annotator, [A, C (class), C (label)]
    prevalence: Floats  #: probability of each class, [C]
    log_likelihood: Floats  #: of the labels, in nats, after each step, [steps]; with smoothing, plus the log prior
    converged: bool  #: whether the last step raised it by less than the tolerance

    @property
    def accuracy(self) -> Floats:
        """Probability that an annotator's label is the class, over items as they come, [A]: Σ_j p_j π_jj."""
        return np.einsum("j,ajj->a", self.prevalence, self.confusion)


def dawid_skene(
    labels: ArrayLike,
    annotators: Sequence[int] | None = None,
    *,
    smoothing: float = 0.0,
    max_steps: int = 10_000,
    tolerance: float = 1e-10,
) -> DawidSkene:
    """Maximum likelihood of the model in which annotators err independently, given an item's class.

    `labels` [N, J] are numbers, NaN where there is none. `annotators` [J] says whose each column is, counted from 0,
    where somebody labelled more than once; else every column is an annotator's of its own. Annotator a gives label l to
    an item of class j with probability π_ajl, a class has probability p_j, and with n_ial labels l by a of item i

    - T_ij ∝ p_j Π_a Π_l π_ajl^n_ial, the posterior (eq. 2.5),
    - π_ajl ∝ s + Σ_i T_ij n_ial (eq. 2.3) and p_j = Σ_i T_ij / N (eq. 2.4),

    beginning with the shares of votes T_ij = Σ_a n_iaj / Σ_al n_ial. Nothing is random. `smoothing` s is 0 in the
    paper; s > 0 counts s labels of each kind in addition, for each annotator and class, which keeps an annotator of
    few labels from becoming infallible (a Dirichlet prior on each row; the log-likelihood then includes its log
    density but for a constant). Where an annotator labelled nothing of a class, all labels are equally probable.

    The likelihood has several maxima, and the one near the vote is found; with fewer than three annotators it does not
    determine the truth. Where most annotators err more often than not, they are believed. An item without any label
    raises `DataError`.
    """
    classes, votes = label_counts(labels)
    if (votes.sum(1) == 0).any():
        raise DataError(f"item {int(np.argmin(votes.sum(1)))} has no label; leave it out")
    if not smoothing >= 0:
        raise DataError(f"smoothing counts labels, so it is at least 0, not {smoothing}")
    n = _counts(np.asarray(labels, dtype=np.float64), classes, annotators)
    posterior = votes / votes.sum(1, keepdims=True)
    reached: list[float] = []
    while True:
        confusion, prevalence = _maximise(n, posterior, smoothing)
        posterior, log_likelihood = _expect(n, confusion, prevalence)
        reached.append(log_likelihood + (smoothing * float(np.log(confusion).sum()) if smoothing else 0.0))
        converged = len(reached) > 1 and reached[-1] - reached[-2] < tolerance * (1 + abs(reached[-1]))
        if converged or len(reached) == max_steps:
            return DawidSkene(classes, posterior, confusion, prevalence, np.array(reached), converged)


def _counts(labels: Floats, classes: Floats, annotators: Sequence[int] | None) -> Floats:
    """How often each annotator gave each label to each item, n_ial: [N, A, C]."""
    columns = labels.shape[1]
    whose = np.arange(columns) if annotators is None else np.asarray(annotators)
    if whose.shape != (columns,) or set(whose.tolist()) != set(range(whose.max() + 1)):
        raise DataError(
            f"annotators must say whose each of the {columns} columns is, counted from 0 without a gap; it is "
            f"{whose.tolist()}"
        )
    owns = whose[:, None] == np.arange(whose.max() + 1)  # [J, A]
    return np.einsum("ijl,ja->ial", (labels[:, :, None] == classes).astype(np.float64), owns.astype(np.float64))


def _maximise(n: Floats, posterior: Floats, smoothing: float) -> tuple[Floats, Floats]:
    """Eq. 2.3 and 2.4: confusion [A, C, C] and prevalence [C]."""
    given = np.einsum("ij,ial->ajl", posterior, n) + smoothing
    total = given.sum(-1, keepdims=True)
    confusion = np.where(total > 0, given / np.where(total > 0, total, 1.0), 1 / n.shape[-1])
    return confusion, posterior.mean(0)


def _expect(n: Floats, confusion: Floats, prevalence: Floats) -> tuple[Floats, float]:
    """Eq. 2.5: the posterior [N, C]; and eq. 2.7, the log-likelihood that it is normalised by."""
    tiny = np.finfo(np.float64).tiny  # of what never happens: its count is 0 or its class impossible
    joint = np.log(np.maximum(prevalence, tiny)) + np.einsum("ial,ajl->ij", n, np.log(np.maximum(confusion, tiny)))
    most = joint.max(1, keepdims=True)
    weight = np.exp(joint - most)
    total = weight.sum(1, keepdims=True)
    return weight / total, float((most + np.log(total)).sum())
