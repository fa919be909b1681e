"""Which pairs of responses to ask about, and how many in each round: what an ensemble of reward models disagrees on.

The scores [M, N, K] are the logits of M members for K responses to each of N prompts. A member says that i is preferred
to j with probability p = σ(s_i − s_j) (Bradley–Terry), so what is computed here depends on differences within a prompt
alone: adding a number to all scores of one member and prompt changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_env.errors import ConfigError, DataError

Rule = Literal["uniform", "disagreement", "entropy", "bald", "double_thompson"]
Schedule = Literal["constant", "hyperbolic", "inverse_quadratic"]

DRAWS = 30  # of members by double Thompson sampling, in search of another best response


def pair_leads(scores: ArrayLike) -> NDArray[np.float64]:
    """s_i − s_j of every member and pair: [M, N, K] → [M, N, K, K]."""
    scores = np.asarray(scores, dtype=np.float64)
    return scores[..., :, None] - scores[..., None, :]


def disagreement(leads: ArrayLike) -> NDArray[np.float64]:
    """The standard deviation over members of P(i ≻ j) = σ(lead): [M, …] → […], between 0 and ½.

    Christiano et al. 2017, arXiv 1706.03741, §2.2.4; of a population, as all members are there.
    """
    return _sigmoid(np.asarray(leads, dtype=np.float64)).std(0)


def predictive_entropy(leads: ArrayLike) -> NDArray[np.float64]:
    """H(mean over members of P(i ≻ j)), in nats: [M, …] → […], log 2 where the ensemble knows nothing.

    It is large, too, where all members agree that the labeler will toss a coin; `bald` is not.
    """
    leads = np.asarray(leads, dtype=np.float64)
    return _entropy(_sigmoid(leads).mean(0), _sigmoid(-leads).mean(0))


def bald(leads: ArrayLike) -> NDArray[np.float64]:
    """H(mean p) − mean H(p), in nats: what an answer tells of which member is right, [M, …] → […].

    The mutual information between the answer and the member (Houlsby et al. 2011, arXiv 1112.5745, eq. 2).
    """
    leads = np.asarray(leads, dtype=np.float64)
    expected = _entropy(_sigmoid(leads), _sigmoid(-leads)).mean(0)
    return np.maximum(predictive_entropy(leads) - expected, 0.0)  # 0 but for rounding where members agree


def uniform(leads: ArrayLike) -> NDArray[np.float64]:
    """The same for every pair: [M, …] → […], so that chance alone decides."""
    return np.zeros(np.shape(leads)[1:])


#: How much an answer is worth, of leads [M, …] → […]; double Thompson sampling draws its pairs instead.
ACQUISITIONS: dict[str, Callable[[ArrayLike], NDArray[np.float64]]] = {
    "uniform": uniform,
    "disagreement": disagreement,
    "entropy": predictive_entropy,
    "bald": bald,
}


def select(
    rule: Rule, scores: ArrayLike, count: int, rng: np.random.Generator, allowed: ArrayLike | None = None
) -> NDArray[np.int64]:
    """The `count` queries to ask, as rows (prompt, i, j) in the order of the prompts, at most one for each prompt.

    By an acquisition: the pair that is worth most of each prompt, i < j, and of these the ones that are worth most;
    chance decides between equals. By double Thompson sampling: a pair of as many prompts drawn at random. Pairs that
    are not `allowed` [N, K, K], as those of identical texts, are never chosen; fewer rows come out where fewer prompts
    have a pair. Scores are [M, N, K], finite, M ≥ 1; `DataError` where they are not, or shapes do not fit.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 3 or len(scores) < 1 or scores.shape[2] < 2:
        raise DataError(f"scores must be [members, prompts, responses ≥ 2], they are {list(scores.shape)}")
    if len(broken := np.argwhere(~np.isfinite(scores))):
        raise DataError(f"member {broken[0][0]} has a score of prompt {broken[0][1]} that is not finite")
    prompts, k = scores.shape[1:]
    may = np.ones((prompts, k, k), dtype=bool) if allowed is None else np.array(allowed, dtype=bool)
    if may.shape != (prompts, k, k):
        raise DataError(f"allowed must be {[prompts, k, k]} for these scores, it is {list(may.shape)}")
    may &= may.swapaxes(1, 2) & ~np.eye(k, dtype=bool)
    if rule == "double_thompson":
        asked = rng.permutation(np.flatnonzero(may.any((1, 2))))[:count]
        chosen = [(n, *double_thompson(scores[:, n], rng, allowed=may[n])) for n in asked.tolist()]
    elif rule in ACQUISITIONS:
        i, j = np.triu_indices(k, 1)
        worth = ACQUISITIONS[rule](pair_leads(scores)[..., i, j])  # [N, pairs]
        worth = np.where(may[:, i, j], worth, -np.inf)
        best = _argmax(worth, rng)  # [N]
        most = worth[np.arange(prompts), best]
        order = np.lexsort((rng.random(prompts), -most))
        chosen = [(n, i[best[n]], j[best[n]]) for n in order[np.isfinite(most[order])][:count]]
    else:
        raise ConfigError(f"there is no rule {rule!r} to select queries by: choose one of {', '.join(get_args(Rule))}")
    return np.array(sorted(chosen), dtype=np.int64).reshape(-1, 3)


def double_thompson(
    scores: ArrayLike, rng: np.random.Generator, *, draws: int = DRAWS, allowed: ArrayLike | None = None
) -> tuple[int, int]:
    """A pair of one prompt's K responses, from the scores [M, K]: two that members, drawn at random, find best.

    The first is the best of a random member. Members are drawn, with replacement, until one has another best, which is
    the second; after `draws` of them in vain it is any other at random (double Thompson sampling: Wu & Liu 2016, arXiv
    1604.07101; for language models Dwaracherla et al. 2024, arXiv 2402.00396). Where a member has several best
    responses, chance decides. What is not `allowed` [K, K] beside the first is not another one.
    """
    scores = np.asarray(scores, dtype=np.float64)
    members, k = scores.shape
    may = ~np.eye(k, dtype=bool) if allowed is None else np.asarray(allowed, dtype=bool)
    among = np.where(may.any(1), scores, -np.inf)  # a response without any other to compare with is no query
    if not may.any():
        raise DataError("there is no pair of responses that may be compared")

    def best() -> int:
        return int(_argmax(among[rng.integers(members)], rng))

    first = best()
    for _ in range(draws):
        if may[first, second := best()]:
            return first, second
    return first, int(rng.choice(np.flatnonzero(may[first])))


def differing(texts: list[tuple[str, ...]]) -> NDArray[np.bool_]:
    """Which pairs of each prompt's K responses are different texts: [N, K, K], for `select`."""
    return np.array([[[a != b for b in those] for a in those] for those in texts], dtype=bool)


_SHAPES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "constant": np.ones_like,
    "hyperbolic": lambda t: 1 / (1 + t),
    "inverse_quadratic": lambda t: 1 / (1 + t**2),
}


def label_schedule(total: int, rounds: int, kind: Schedule = "constant", initial: float = 0.1) -> list[int]:
    """How many of `total` labels each of the rounds gets: whole numbers that add up to it.

    The first gets the share `initial`, rounded down; the others share the rest in proportion to f(t) at their places t,
    evenly from 0 to 1: f = 1 (constant), 1 / (1 + t) (hyperbolic) or 1 / (1 + t²) (inverse quadratic). What rounding
    down leaves over goes to those that lost most by it. These are the schedules of `imitation` (Gleave et al. 2022,
    arXiv 2211.11972). One round gets all. `ConfigError` where a round would get nothing.
    """
    if rounds < 1 or not 0 < initial < 1:
        raise ConfigError(
            f"labels are shared among at least 1 round, the first getting a share between 0 and 1; these are {rounds} "
            f"and {initial}"
        )
    if kind not in _SHAPES:
        raise ConfigError(f"there is no schedule {kind!r}: choose one of {', '.join(_SHAPES)}")
    if rounds == 1:
        return [total]
    first = int(total * Fraction(str(initial)))  # the share as it is written: 0.29 of 100 is 29, not 28.99…
    weight = _SHAPES[kind](np.linspace(0, 1, rounds - 1))
    exact = weight / weight.sum() * (total - first)
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - first - shares.sum()]] += 1
    schedule = [first, *shares.tolist()]
    if min(schedule) < 1:
        raise ConfigError(
            f"{total} labels over {rounds} rounds, {initial:g} of them in the first, leave a round without any: "
            f"{schedule}; give more labels, or fewer rounds"
        )
    return schedule


def _argmax(x: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The place of the largest of the last axis, [..., K] → [...]; chance decides between equals."""
    return np.where(x == x.max(-1, keepdims=True), rng.random(x.shape), -1.0).argmax(-1)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -x))


def _entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """−p log p − q log q of a probability and its complement, with 0 log 0 = 0."""
    both = np.stack([p, q])
    return -(both * np.log(np.where(both > 0, both, 1.0))).sum(0)
