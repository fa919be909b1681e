"""What rewards learn from judgements, as pure functions: losses in nats, elementwise unless they say otherwise.

d is the score of the first response less that of the second, and y in [0, 1] the preference for the first: 1, 0, ½ for
a tie, or a probability. Only differences of scores count (a constant added to all changes no loss), but for the two
penalties, which say where that constant lies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_env.errors import DataError

MOST_TIED = 10  # responses of one rank, whose 2^10 subsets are all looked at

# --- ties as a third outcome -----------------------------------------------------------------------


def davidson(difference: Tensor, nu: Tensor | float) -> Tensor:
    """log P of (first preferred, tie, second preferred), [...] → [..., 3], for ν ≥ 0.

    They are to each other as √(π_i/π_j) : ν : √(π_j/π_i) with π = exp(score): ν = 0 is Bradley–Terry, and equals tie
    with probability ν/(2 + ν). Davidson 1970, "On extending the Bradley–Terry model to accommodate ties
    in paired comparison experiments".
    """
    half = difference / 2
    tie = torch.as_tensor(nu, dtype=half.dtype, device=half.device).log().expand_as(half)
    return torch.stack([half, tie, -half], dim=-1).log_softmax(-1)


def rao_kupper(difference: Tensor, theta: Tensor | float) -> Tensor:
    """log P of (first preferred, tie, second preferred), [...] → [..., 3], for θ ≥ 1.

    P(first) = σ(d − log θ): who leads by less than log θ is often taken for an equal. θ = 1 is Bradley–Terry, and
    equals tie with probability (θ − 1)/(θ + 1). Rao & Kupper 1967, "Ties in paired-comparison
    experiments: a generalization of the Bradley–Terry model".
    """
    ratio = torch.as_tensor(theta, dtype=torch.float64)  # in float32, θ = 1 + 1e-8 would be 1 and its gradient NaN
    least, excess = (x.to(difference) for x in (ratio.log(), (ratio - 1).log() + (ratio + 1).log()))
    first, second = logsigmoid(difference - least), logsigmoid(-difference - least)
    return torch.stack([first, excess + first + second, second], dim=-1)


def outcome_loss(log_probs: Tensor, preference: Tensor, target: Tensor | None = None) -> Tensor:
    """−log P of what was said, from log P of (first, tie, second) [..., 3]: a tie where `preference` is ½.

    Elsewhere −[y log P(first) + (1 − y) log P(second)], where y is `target`, or else the preference itself.
    """
    first, tie, second = log_probs.unbind(-1)
    y = preference if target is None else target
    return -torch.where(preference == 0.5, tie, y * first + (1 - y) * second)


# --- labels that err -------------------------------------------------------------------------------


def smoothed(preference: Tensor, rate: float) -> Tensor:
    """y (1 − 2ε) + ε: a label is believed with 1 − ε only, which is conservative.

    The best d stays finite, at log((1 − ε)/ε) for a sure label, whether or not labels err: scores are pulled together.
    Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", eq. 3 (conservative DPO).
    """
    return preference * (1 - 2 * rate) + rate


def unflipped(preference: Tensor, rate: float) -> Tensor:
    """(y − ε)/(1 − 2ε): labels of which a known share ε < ½ were turned over, such that the mean loss is the true one.

    With it `bradley_terry_loss` is [(1 − ε) L(y) − ε L(1 − y)]/(1 − 2ε), whose expectation over the flips is the loss
    of the label before them (Natarajan et al. 2013, lemma 1; Chowdhury et al. 2024, arXiv 2403.00409): unbiased
    where `smoothed` is conservative, and its inverse. The price: the values leave [0, 1], so that the loss of a single
    pair has no lower bound, and few pairs read often are learned by heart with ever larger scores.
    """
    return (preference - rate) / (1 - 2 * rate)


# --- margins and penalties -------------------------------------------------------------------------


def less_margin(difference: Tensor, preference: Tensor, margin: Tensor | float) -> Tensor:
    """d less the margin m ≥ 0 by which the preferred one is to lead, d − m or d + m; a tie has none.

    So that −log σ(d) becomes −log σ(d − m) where the first is preferred. Touvron et al. 2023 (Llama 2), arXiv
    2307.09288, eq. 2.
    """
    return difference - margin * (2 * preference - 1).sign()


def centering_penalty(first: Tensor, second: Tensor) -> Tensor:
    """(r_i + r_j)²: least where the scores of a pair lie around 0. Eisenstein et al. 2023, arXiv 2312.09244, eq. 2."""
    return (first + second).square()


# --- rankings of K ---------------------------------------------------------------------------------


def plackett_luce_loss(scores: Tensor, ranks: Sequence[int]) -> Tensor:
    """−log P of a ranking of scores [K] with ranks [K], 0 = best: the best is a softmax choice of all, and so on.

    −Σ_k log [exp(s_k) / Σ_(j not better than k) exp(s_j)]; Plackett 1975, Luce 1959; Zhu et al. 2023, arXiv 2301.11270.
    Equal ranks: the mean over all orders that they leave open, so that two tied responses cost what
    `bradley_terry_loss` says for y = ½. A number. Raises `DataError` where more than `MOST_TIED` are tied.
    """
    loss, below = scores.new_zeros(()), scores.new_tensor(-torch.inf)  # log Σ exp(s) of those of a lower rank
    for rank in sorted(set(ranks), reverse=True):
        tied = scores[[i for i, other in enumerate(ranks) if other == rank]]
        subsets, share = _left(len(tied))
        among = torch.where(subsets.to(tied.device), tied, -torch.inf).logsumexp(-1)
        loss = loss + share.to(tied) @ torch.logaddexp(among, below) - tied.sum()
        below = torch.logaddexp(tied.logsumexp(0), below)
    return loss


@cache
def _left(size: int) -> tuple[Tensor, Tensor]:
    """The subsets of the tied that may be left to choose from, bool [S, size], with their shares of the orders, [S]."""
    if size > MOST_TIED:
        raise DataError(f"{size} responses of a ranking are tied; its likelihood is computed for at most {MOST_TIED}")
    subsets = torch.tensor(list(itertools.product([False, True], repeat=size))[1:])
    return subsets, torch.tensor([1 / math.comb(size, int(left)) for left in subsets.sum(-1)], dtype=torch.float64)


def best_loss(scores: Tensor, ranks: Sequence[int]) -> Tensor:
    """−log of the softmax probability of the best of scores [K] with ranks [K], 0 = best; what lies below has no order.

    Ziegler et al. 2019, arXiv 1909.08593, eq. 1. Several best: their mean. A number.
    """
    return -scores.log_softmax(0)[[i for i, rank in enumerate(ranks) if rank == 0]].mean()


# --- scores with an uncertainty --------------------------------------------------------------------


def probit_loss(difference: Tensor, variance: Tensor, preference: Tensor) -> Tensor:
    """−[y log Φ(z) + (1 − y) log Φ(−z)], z = (μ_1 − μ_2)/√(σ_1² + σ_2²), from that difference and that `variance` > 0.

    The first is preferred where one draw of its score is above one of the other's (Thurstone 1927). Siththaranjan et
    al. 2024 (distributional preference learning), arXiv 2312.08358.
    """
    z = difference / variance.sqrt()
    log_cdf = torch.special.log_ndtr
    return -(preference * log_cdf(z) + (1 - preference) * log_cdf(-z))
