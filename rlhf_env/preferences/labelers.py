"""Simulated people who rank responses by a gold reward, with errors of known probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import DataError
from rlhf_env.intervals import clustered_rate_interval
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

    The other settings are off unless given. `skip_below`: no answer where max u is below it. `first_bonus`: the
    response shown in place p of K is ranked by u + first_bonus · (K − 1 − p) / (K − 1). `fatigue`: the temperature of
    query q is temperature + fatigue · q. `flip_scale`: a ranking is flipped with probability
    flip_rate · exp(−(max u − min u) / flip_scale). `tie_within`: neighbours in the ranking whose u differ by less share
    a rank, whatever the noise; so two responses tie if and only if `|u_i − u_j| < tie_within`, and among more a chain
    of near ones is one tie. Thresholds are of u itself, without noise and bonus.
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
    ) -> list[tuple[int, ...] | None]:
        """The ranks of each query's responses, 0 = best; gold is asked once, for all responses together.

        The random numbers of a query depend on the seed and its number alone.
        """
        if len(prompts) != len(queries):
            raise DataError(f"{len(prompts)} prompts cannot be ranked as {len(queries)} queries")
        return [
            self._rank(u, query) for u, query in zip(utilities_of(self.gold, prompts, responses), queries, strict=True)
        ]

    def _rank(self, u: NDArray[np.float64], query: int) -> tuple[int, ...] | None:
        config, rng = self.config, np.random.default_rng([self.seed, query, _ANSWER_STREAM])
        if config.skip_below is not None and u.max() < config.skip_below:
            return None
        flipped = rng.random() < flip_probability(np.ptp(u), config)  # drawn first, so that it does not depend on K
        seen = u + config.first_bonus * np.linspace(1.0, 0.0, len(u))
        noisy = seen + temperature_at(query, config) * rng.gumbel(size=len(u))
        order = np.argsort(-noisy)
        worse = (np.diff(noisy[order]) < 0) & (np.abs(np.diff(u[order])) >= config.tie_within)  # than the one before it
        ranks = np.empty(len(u), dtype=np.int64)
        ranks[order] = np.cumsum([0, *worse])
        return tuple((ranks.max() - ranks if flipped else ranks).tolist())


def temperature_at(query: ArrayLike, config: LabelerConfig) -> NDArray[np.float64]:
    """The temperature at which query number q, any shape, is answered: temperature + fatigue · q."""
    return config.temperature + config.fatigue * np.asarray(query, dtype=np.float64)


def flip_probability(distance: ArrayLike, config: LabelerConfig) -> NDArray[np.float64]:
    """ε(d) = flip_rate · exp(−d / flip_scale) of d = max u − min u ≥ 0, any shape; without a scale, flip_rate."""
    distance = np.asarray(distance, dtype=np.float64)
    rarer = np.zeros_like(distance) if config.flip_scale is None else distance / config.flip_scale
    return config.flip_rate * np.exp(-rarer)


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


def preference_probability(
    difference: ArrayLike, config: LabelerConfig, *, first: ArrayLike | None = None, query: ArrayLike = 0
) -> NDArray[np.float64]:
    """P(i ≻ j) + ½ P(tie) of a query with two responses that a labeler answers, of d = u_i − u_j, any shape.

    (1 − ε(d)) p + ε(d) (1 − p) with p = σ((d ± first_bonus) / temperature), ε(d) = `flip_probability`; ½ where
    |d| < tie_within. The bonus counts + where i is shown `first`, − where j is; by default either is as likely, and
    this is the mean of both. `query` is the query's number, for `temperature_at`. At temperature 0, p is 1, 0, or ½ for
    a tie.

    Its mean over |u_i − u_j| is the label agreement to expect, and so the accuracy on labels that no reward model can
    be expected to exceed (ε ≤ ½).
    """
    if first is None and config.first_bonus != 0:
        either = [preference_probability(difference, config, first=shown, query=query) for shown in (True, False)]
        return np.mean(either, axis=0)
    d = np.asarray(difference, dtype=np.float64)
    bonus = 0.0 if first is None else config.first_bonus * np.where(first, 1.0, -1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logit = (d + bonus) / temperature_at(query, config)  # ±∞ at temperature 0, NaN for a tie there
    p = np.exp(-np.logaddexp(0.0, -np.where(np.isnan(logit), 0.0, logit)))
    flip = flip_probability(np.abs(d), config)
    return np.where(np.abs(d) < config.tie_within, 0.5, (1 - flip) * p + flip * (1 - p))


def present(k: int, seed: int, query: int) -> tuple[int, ...]:
    """A random order in which to show the K responses of a query (`Comparison.order`), from (seed, query) alone."""
    return tuple(np.random.default_rng([seed, query, _ORDER_STREAM]).permutation(k).tolist())


def label_agreement(comparisons: Sequence[Comparison], utilities: Sequence[ArrayLike]) -> dict[str, float]:
    """How often labels prefer what gold prefers: `label_agreement`, the share of all pairs that neither calls a tie.

    `utilities` are the gold rewards [K] of each comparison's responses, as `utilities_of` gives them. In the 95 %
    interval (`clustered_rate_interval`) the pairs of a prompt are alike. Empty where no pair counts.
    """
    if len(comparisons) != len(utilities):
        raise DataError(f"{len(comparisons)} comparisons were given with the utilities of {len(utilities)}")
    agrees, prompts = list[bool](), list[str]()
    for number, (comparison, given) in enumerate(zip(comparisons, utilities, strict=True)):
        u = np.asarray(given, dtype=np.float64)
        if u.shape != (len(comparison.responses),):
            raise DataError(
                f"comparison {number} has {len(comparison.responses)} responses, but utilities of shape {list(u.shape)}"
            )
        agree = [(u[i] > u[j]) == (p > 0.5) for i, j, p in comparison.pairs if p != 0.5 and u[i] != u[j]]
        agrees += agree
        prompts += [comparison.prompt] * len(agree)
    return clustered_rate_interval("label_agreement", agrees, prompts) if agrees else {}
