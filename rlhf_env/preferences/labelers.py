"""Simulated people who rank responses by a gold reward, with errors of known probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import DataError
from rlhf_env.intervals import rate_interval
from rlhf_env.settings import LabelerConfig
from rlhf_env.types import Comparison, RewardModel

_ANSWER_STREAM, _ORDER_STREAM = 4, 5  # what a labeler answers is independent of the order in which it is shown


class SimulatedLabeler:
    """A `Labeler` who knows the gold reward, and ranks by it with noise.

    A ranking of K responses with gold rewards u is a Plackett–Luce sample: best to worst, each is chosen among those
    left with probability ∝ exp(u / temperature) (Luce 1959; Plackett 1975). So every pair follows Bradley–Terry,
    P(i ≻ j) = σ((u_i − u_j) / temperature). It is drawn by ranking u + temperature · Gumbel noise (Yellott 1977). At
    temperature 0 there is no noise, and equal u are a tie. Then, with probability `flip_rate`, the ranking is turned
    upside down: each pair with just that probability. A rate of ½ leaves no information, one above ½ is an adversary.
    """

    def __init__(
        self,
        gold: RewardModel | Callable[..., Any],
        config: LabelerConfig = LabelerConfig(),  # noqa: B008 (frozen)
        *,
        seed: int = 0,
        name: str = "simulated",
    ) -> None:
        self.gold, self.config, self.seed, self.name = gold, config, seed, name

    def rank(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], queries: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """The ranks of each query's responses, 0 = best; gold is asked once, for all responses together.

        The random numbers of a query depend on the seed and its number alone.
        """
        if len(prompts) != len(queries):
            raise DataError(f"{len(prompts)} prompts cannot be ranked as {len(queries)} queries")
        return [
            self._rank(u, query) for u, query in zip(utilities_of(self.gold, prompts, responses), queries, strict=True)
        ]

    def _rank(self, u: NDArray[np.float64], query: int) -> tuple[int, ...]:
        rng = np.random.default_rng([self.seed, query, _ANSWER_STREAM])
        flipped = rng.random() < self.config.flip_rate  # drawn first, so that it does not depend on K
        noisy = u + self.config.temperature * rng.gumbel(size=len(u))
        ranks = np.unique(noisy if flipped else -noisy, return_inverse=True)[1]
        return tuple(ranks.tolist())


def utilities_of(
    gold: RewardModel | Callable[..., Any], prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]]:
    """The gold reward of every response to every prompt, [K] for each prompt, asked in one call."""
    if len(prompts) != len(responses):
        raise DataError(f"{len(prompts)} prompts were given with the responses to {len(responses)}")
    if not prompts:
        return []
    repeated = [prompt for prompt, those in zip(prompts, responses, strict=True) for _ in those]
    scores = scores_of(gold, repeated, [response for those in responses for response in those])
    return np.split(scores, np.cumsum([len(those) for those in responses])[:-1])


def preference_probability(difference: ArrayLike, config: LabelerConfig) -> NDArray[np.float64]:
    """P(i ≻ j) = (1 − ε) p + ε (1 − p), p = σ((u_i − u_j) / temperature), ε = `flip_rate`, of u_i − u_j, any shape.

    At temperature 0, p is 1, 0, or ½ for a tie. Its mean over |u_i − u_j| is the label agreement to expect, and so the
    accuracy on labels that no reward model can be expected to exceed (ε ≤ ½).
    """
    difference = np.asarray(difference, dtype=np.float64)
    if config.temperature == 0:
        p = np.heaviside(difference, 0.5)
    else:
        p = np.exp(-np.logaddexp(0.0, -difference / config.temperature))
    return (1 - config.flip_rate) * p + config.flip_rate * (1 - p)


def present(k: int, seed: int, query: int) -> tuple[int, ...]:
    """A random order in which to show the K responses of a query (`Comparison.order`), from (seed, query) alone."""
    return tuple(np.random.default_rng([seed, query, _ORDER_STREAM]).permutation(k).tolist())


def label_agreement(comparisons: Sequence[Comparison], utilities: Sequence[ArrayLike]) -> dict[str, float]:
    """How often labels prefer what gold prefers: `label_agreement`, the share of all pairs that neither calls a tie.

    `utilities` are the gold rewards [K] of each comparison's responses, as `utilities_of` gives them. The 95 % interval
    counts a comparison once, since the pairs of one ranking err together. Empty where no pair counts.
    """
    if len(comparisons) != len(utilities):
        raise DataError(f"{len(comparisons)} comparisons were given with the utilities of {len(utilities)}")
    agreeing = pairs = counted = 0
    for number, (comparison, given) in enumerate(zip(comparisons, utilities, strict=True)):
        u = np.asarray(given, dtype=np.float64)
        if u.shape != (len(comparison.responses),):
            raise DataError(
                f"comparison {number} has {len(comparison.responses)} responses, but utilities of shape {list(u.shape)}"
            )
        agree = [(u[i] > u[j]) == (p > 0.5) for i, j, p in comparison.pairs if p != 0.5 and u[i] != u[j]]
        agreeing, pairs, counted = agreeing + sum(agree), pairs + len(agree), counted + bool(agree)
    return rate_interval("label_agreement", agreeing / pairs * counted, counted) if pairs else {}
