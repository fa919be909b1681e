"""What each labeler goes by: a logistic model of preferences in which everybody has weights of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_env.errors import DataError
from rlhf_env.intervals import Z95
from rlhf_env.preferences.arena import likeliest_effects

Floats = NDArray[np.float64]

_SHARED_SPREAD = 10.0  # standard deviation of the shared weights' prior: next to nothing, but there is always a maximum


@dataclass(frozen=True)
class LabelerEffects:
    """What `labeler_effects` found for A labelers and F leads: weights in log-odds per unit of each lead."""

    labelers: tuple[str, ...]  #: sorted, [A]
    shared: Floats  #: of somebody of whom nothing is known, [F]
    own: Floats  #: of each labeler, [A, F]
    error: Floats  #: their standard errors, [A, F]: the posterior's, by Laplace's approximation

    def interval(self, name: str, labeler: str, lead: int) -> dict[str, float]:
        """A labeler's weight of a lead, with its 95 % interval."""
        k = self.labelers.index(labeler)
        value, half = float(self.own[k, lead]), Z95 * float(self.error[k, lead])
        return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}

    def probabilities(self, leads: ArrayLike, labelers: Sequence[str]) -> Floats:
        """P(first preferred) = σ(leads · weights) for leads [M, F] and whose each is [M]; of strangers by `shared`."""
        known = {labeler: w for labeler, w in zip(self.labelers, self.own, strict=True)}
        weights = np.array([known.get(labeler, self.shared) for labeler in labelers])
        logits = (np.asarray(leads, dtype=np.float64) * weights).sum(1)
        return np.exp(-np.logaddexp(0.0, -logits))


def labeler_effects(
    leads: ArrayLike, preference: ArrayLike, labelers: Sequence[str], *, spread: float
) -> LabelerEffects:
    """The likeliest weights of P(first preferred by a) = σ(x · (w + d_a)), where d_a ~ N(0, spread²) for each lead.

    `leads` x [M, F] are what the first response has more than the second (log length, 1 for being first, a policy's
    1 or −1), `preference` [M] in [0, 1] is ½ for a tie, `labelers` [M] are the names. A labeler of few comparisons is
    so pulled towards all others, and the more the smaller `spread` is; at 0 all are alike, and without a bound each
    would be fitted alone. Maximum a posteriori by Newton's method. (A generalised linear mixed model, Breslow & Clayton
    1993, with the spread given: choose it by the log-loss on prompts held out.)
    """
    x, y = np.asarray(leads, dtype=np.float64), np.asarray(preference, dtype=np.float64)
    if x.ndim != 2 or y.shape != (len(x),) or len(labelers) != len(x) or not len(x):
        raise DataError(f"leads {list(x.shape)}, preferences {list(y.shape)} and {len(labelers)} labelers do not match")
    if not (np.isfinite(x).all() and ((y >= 0) & (y <= 1)).all() and 0 <= spread < np.inf):
        raise DataError("leads must be finite, preferences between 0 and 1, and the spread at least 0 and finite")
    names, whose = np.unique(np.asarray(labelers), return_inverse=True)
    f, everyone = x.shape[1], len(names)
    # θ = [w, d_1 / spread, …, d_A / spread], so that a spread of 0 needs no case of its own.
    own = np.zeros((len(x), everyone, f))
    own[np.arange(len(x)), whose] = spread * x
    design = np.concatenate([x, own.reshape(len(x), -1)], axis=1)  # [M, F + A F]
    penalty = np.diag(np.concatenate([np.full(f, _SHARED_SPREAD**-2), np.ones(everyone * f)]))
    theta = likeliest_effects(design, y, penalty, np.zeros_like(penalty))
    p = np.exp(-np.logaddexp(0.0, -design @ theta))
    covariance = np.linalg.inv((design.T * (p * (1 - p))) @ design + penalty)
    # w + spread · (d_a / spread) = C θ for each labeler and lead.
    combine = np.concatenate([np.tile(np.eye(f), (everyone, 1)), spread * np.eye(everyone * f)], axis=1)
    error = np.sqrt(np.einsum("ij,jk,ik->i", combine, covariance, combine))
    return LabelerEffects(
        tuple(names.tolist()), theta[:f], (combine @ theta).reshape(everyone, f), error.reshape(everyone, f)
    )
