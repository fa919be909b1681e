"""Several labelers who share the queries: who is asked what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_env.errors import ConfigError
from rlhf_env.types import Labeler

_MEMBER_STREAM = 6  # who answers is independent of what is answered (4) and of the order shown (5)

Weights = Sequence[float]


@dataclass(frozen=True)
class Population:
    """Labelers who share the queries: each query goes to `overlap` different ones, drawn by their weights.

    Clusters of annotators are labelers with different utilities. Labelers with equal seeds err alike; give each its
    own. Whom query q is put to depends on `seed` and q alone, so `overlap` = 3 also asks those that `overlap` = 1 asks.
    """

    labelers: Sequence[Labeler]
    weights: Weights | Callable[[int], Weights] | None = None  #: one for each, or of query q; none: all alike
    overlap: int = 1  #: labelers who answer each query; more than one, to measure how far they agree
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.overlap <= len(self.labelers):
            raise ConfigError(
                f"each query goes to {self.overlap} of {len(self.labelers)} labelers: overlap must be at least 1, and "
                "no more than there are"
            )
        self.probabilities(0)

    def probabilities(self, query: int) -> list[float]:
        """With which probability each labeler is the first to be drawn for a query, [labelers]."""
        given = self.weights(query) if callable(self.weights) else self.weights
        weights = np.ones(len(self.labelers)) if given is None else np.asarray(given, dtype=np.float64)
        if weights.shape != (len(self.labelers),):
            raise ConfigError(f"{len(self.labelers)} labelers need as many weights, got shape {list(weights.shape)}")
        if not np.isfinite(weights).all() or (weights < 0).any() or (weights > 0).sum() < self.overlap:
            raise ConfigError(
                f"the weights of labelers must be finite and at least 0, and {self.overlap} of them above 0, to answer "
                f"query {query}; they are {weights.tolist()}"
            )
        return (weights / weights.sum()).tolist()

    def members(self, query: int) -> list[int]:
        """The numbers of the `overlap` labelers who are asked a query, in the order in which they were drawn.

        The first is drawn by its weight, the next by theirs among those left, and so on.
        """
        rng = np.random.default_rng([self.seed, query, _MEMBER_STREAM])
        with np.errstate(divide="ignore"):
            keys = np.log(self.probabilities(query)) + rng.gumbel(size=len(self.labelers))
        return np.argsort(-keys)[: self.overlap].tolist()

    def shares(self, queries: Sequence[int]) -> list[tuple[Labeler, list[int]]]:
        """Each labeler who is asked any of the queries, with the places in `queries` of those that it is asked."""
        members = [self.members(query) for query in queries]
        places = [[place for place, those in enumerate(members) if m in those] for m in range(len(self.labelers))]
        return [(labeler, mine) for labeler, mine in zip(self.labelers, places, strict=True) if mine]


def drifting(first: Weights, last: Weights, over: int) -> Callable[[int], Weights]:
    """Weights that go in a straight line from `first`, at query 0, to `last`, at query `over`, and stay there."""
    if over < 1 or len(first) != len(last):
        raise ConfigError(f"weights drift over at least 1 query between equal numbers; got {over}, {first}, {last}")

    def weights(query: int) -> Weights:
        done = min(query / over, 1.0)
        return [(1 - done) * a + done * b for a, b in zip(first, last, strict=True)]

    return weights
