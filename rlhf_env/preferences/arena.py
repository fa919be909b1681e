"""Who is better, from comparisons of two at a time: strengths of policies, with intervals, as on an arena's board."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_env.errors import DataError
from rlhf_env.intervals import student_quantile

Floats = NDArray[np.float64]

ELO = 400 / math.log(10)  # points per unit of log-odds: 400 points are odds of 10 : 1
ELO_MEAN = 1000.0
_MAX_STEPS = 50


@dataclass(frozen=True)
class BradleyTerryRanking:
    """What `bradley_terry` found for P players and F covariates."""

    players: tuple[Any, ...]  #: sorted, [P]
    strength: Floats  #: log-odds, [P]; their mean is 0, since only differences matter
    effects: Floats  #: log-odds per unit of each covariate, [F]
    covariance: Floats  #: robust, of strengths and effects, [P + F, P + F]
    log_likelihood: float  #: in nats
    clusters: int  #: G: comparisons, or groups of them, that are independent of each other

    def interval(self, contrast: ArrayLike) -> tuple[float, float, float]:
        """Σ c θ with its 95 % interval, θ being strengths and effects; c is [P + F].

        Student's t with G − 1 degrees of freedom.
        """
        c = np.asarray(contrast, dtype=np.float64)
        value = float(c @ np.concatenate([self.strength, self.effects]))
        half = student_quantile(self.clusters - 1) * math.sqrt(max(float(c @ self.covariance @ c), 0.0))
        return value, value - half, value + half

    def lead(self, first: Any, second: Any) -> tuple[float, float, float]:
        """How many log-odds `first` is ahead of `second`, with its 95 % interval."""
        c = np.zeros(len(self.covariance))
        c[self.players.index(first)] += 1
        c[self.players.index(second)] -= 1
        return self.interval(c)

    def rows(self) -> list[dict[str, Any]]:
        """`player`, `elo`, `elo_low` and `elo_high` of each, best first: 1000 + 400/ln 10 · strength.

        An interval is that of the distance to the mean of all players; whether one is ahead of another says `lead`.
        """
        board = []
        for k in np.argsort(-self.strength, kind="stable"):
            elo = (ELO_MEAN + ELO * x for x in self.interval(np.eye(len(self.covariance))[k]))
            board.append(dict(zip(("player", "elo", "elo_low", "elo_high"), (self.players[k], *elo), strict=True)))
        return board


def bradley_terry(
    first: Sequence[Any],
    second: Sequence[Any],
    preference: ArrayLike,
    *,
    covariates: ArrayLike | None = None,
    clusters: Sequence[Any] | None = None,
    ridge: float = 0.0,
) -> BradleyTerryRanking:
    """Strengths s of players by maximum likelihood: P(a ≻ b) = σ(s_a − s_b + Σ_f x_f w_f); Bradley & Terry 1952.

    Comparison m is of players `first[m]` and `second[m]`, `preference[m]` in [0, 1] is 1 where the first won, ½ for a
    tie, which so counts half a win for each. `covariates` [M, F] are what else the two differ in, first minus second
    (length, number of headings: *style control*), or 1 for the advantage of being shown first. A player's strength is
    then what is left of its wins once these are accounted for.

    The maximum is found by Newton's method. It exists where everyone is, through others, both beaten by and better
    than everyone (Ford 1957); else `DataError` says who never lost, and to whom. `ridge` λ subtracts
    ½ λ (Σ s² + Σ w²) from the log-likelihood: a Gaussian prior of variance 1/λ, with which there is always a maximum.

    The covariance is the sandwich H⁻¹ (Σ_g u_g u_gᵀ) H⁻¹ · G/(G − 1), u_g the gradient of a cluster's log-likelihood
    (White 1982; Liang & Zeger 1986): it holds also where labels are ties or not Bradley–Terry. `clusters` [M] says
    which comparisons belong together: those of one annotator, or of one prompt; else each stands alone.
    """
    players, a, b, y = _comparisons(first, second, preference)
    if not ridge >= 0:
        raise DataError(f"ridge must be at least 0, it is {ridge}")
    x = np.zeros((len(y), len(players)))
    rows = np.arange(len(y))
    x[rows, a], x[rows, b] = 1.0, -1.0
    x = np.concatenate([x, _covariates(covariates, len(y))], axis=1)  # [M, P + F]
    if ridge == 0:
        _require_connected(players, _points(a, b, y, len(players)))
        _require_rank(x, len(players))

    # The likelihood is the same along s + constant; the gauge term only makes the Hessian invertible there.
    gauge = np.zeros((x.shape[1], x.shape[1]))
    gauge[: len(players), : len(players)] = 1 / len(players)
    penalty = ridge * np.eye(x.shape[1])
    theta = likeliest_effects(x, y, penalty, gauge)

    p = _sigmoid(x @ theta)
    inverse = np.linalg.inv((x.T * (p * (1 - p))) @ x + penalty + gauge)
    group = np.unique(np.asarray(rows if clusters is None else clusters), return_inverse=True)[1].reshape(-1)
    if group.shape != y.shape or group.max() == 0:
        raise DataError(f"clusters must name at least two groups among {len(y)} comparisons, one name for each")
    scores = np.zeros((group.max() + 1, x.shape[1]))
    np.add.at(scores, group, (y - p)[:, None] * x)
    covariance = inverse @ (scores.T @ scores) @ inverse * len(scores) / (len(scores) - 1)
    return BradleyTerryRanking(
        players,
        theta[: len(players)] - theta[: len(players)].mean(),
        theta[len(players) :],
        covariance,
        _log_likelihood(x @ theta, y),
        len(scores),
    )


def win_rates(first: Sequence[Any], second: Sequence[Any], preference: ArrayLike) -> tuple[tuple[Any, ...], Floats]:
    """The players, sorted, and the mean preference for each over each other, [P, P]; NaN where two never met."""
    players, a, b, y = _comparisons(first, second, preference)
    points = _points(a, b, y, len(players))
    met = points + points.T
    return players, np.where(met > 0, points / np.where(met > 0, met, 1.0), np.nan)


def borda(first: Sequence[Any], second: Sequence[Any], preference: ArrayLike) -> dict[Any, float]:
    """Each player's mean win rate against the others, every opponent counting the same: Borda's count, in [0, 1].

    Best first. Where all pairs met equally often, `bradley_terry` ranks in this order, whatever the annotators are: a
    mixture of people with different tastes is ranked by how often one is preferred, not by how much. `DataError` where
    two players never met, since then the counts cannot be compared.
    """
    players, rates = win_rates(first, second, preference)
    never = np.argwhere(np.isnan(rates) & ~np.eye(len(players), dtype=bool))
    if len(never):
        i, j = never[0]
        raise DataError(f"Borda counts need every two players compared, but {players[i]!r} never met {players[j]!r}")
    np.fill_diagonal(rates, 0.0)
    mean = rates.sum(1) / (len(players) - 1)
    return {players[k]: float(mean[k]) for k in np.argsort(-mean, kind="stable")}


def _comparisons(
    first: Sequence[Any], second: Sequence[Any], preference: ArrayLike
) -> tuple[tuple[Any, ...], NDArray[np.intp], NDArray[np.intp], Floats]:
    """The players, sorted, and for each comparison the indices of the two and the preference for the first."""
    y = np.asarray(preference, dtype=np.float64)
    if y.ndim != 1 or not len(first) == len(second) == len(y) > 0:
        raise DataError(
            f"first, second and preference must be as long as each other, and not empty; they are {len(first)}, "
            f"{len(second)} and {list(y.shape)}"
        )
    if not ((y >= 0) & (y <= 1)).all():
        m = int(np.argmin((y >= 0) & (y <= 1)))
        raise DataError(f"comparison {m}: a preference is a number from 0 to 1, it is {y[m]}")
    players = tuple(sorted({*first, *second}))
    index = {player: k for k, player in enumerate(players)}
    a, b = (np.array([index[player] for player in side], dtype=np.intp) for side in (first, second))
    if (a == b).any():
        m = int(np.argmax(a == b))
        raise DataError(f"comparison {m} is of {first[m]!r} with itself, which says nothing of its strength")
    return players, a, b, y


def _covariates(covariates: ArrayLike | None, count: int) -> Floats:
    if covariates is None:
        return np.zeros((count, 0))
    x = np.asarray(covariates, dtype=np.float64)
    if x.ndim != 2 or len(x) != count or not np.isfinite(x).all():
        raise DataError(
            f"covariates must be finite numbers [{count}, F], a row per comparison; they are {list(x.shape)}"
        )
    return x


def _points(a: NDArray[np.intp], b: NDArray[np.intp], y: Floats, count: int) -> Floats:
    """How many points each player won from each other, a tie being half of one: [P, P]."""
    points = np.zeros((count, count))
    np.add.at(points, (a, b), y)
    np.add.at(points, (b, a), 1 - y)
    return points


def _require_connected(players: tuple[Any, ...], points: Floats) -> None:
    """Refuse points for which no finite strengths are the most likely ones."""
    met = _reachable(points + points.T)
    if not met.all():
        apart = [player for k, player in enumerate(players) if not met[0, k]]
        raise DataError(
            f"{_names(apart)} and the others were never compared, not through others either, so their strengths have "
            "no common scale; rank them separately, or set a ridge"
        )
    beats = _reachable(points)
    if not beats.all():
        # Everyone reaches somebody of the best group, or is in it: whom fewest reach is there.
        best = beats[:, np.argmin(beats.sum(0))]
        unbeaten, rest = ([p for k, p in enumerate(players) if best[k] == side] for side in (True, False))
        raise DataError(
            f"no strengths are the most likely: {_names(unbeaten)} never lost a point to {_names(rest)}, so the more "
            "distant the better; compare more, leave players out, or set a ridge (a prior)"
        )


def _reachable(points: Floats) -> NDArray[np.bool_]:
    """Who has points from whom, directly or through others; everyone from itself: [P, P]."""
    reach = (points > 0) | np.eye(len(points), dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(len(points))))):
        reach = (reach.astype(np.float64) @ reach) > 0
    return reach


def _require_rank(x: Floats, players: int) -> None:
    """Refuse covariates that are combinations of the players and each other: their effects cannot be told apart."""
    for k in range(players, x.shape[1]):
        before, column = x[:, :k], x[:, k]
        left = column - before @ np.linalg.lstsq(before, column, rcond=None)[0]
        if np.linalg.norm(left) <= 1e-9 * np.linalg.norm(column):
            raise DataError(
                f"covariate {k - players} is a combination of the players and the covariates before it, so its effect "
                "cannot be told from theirs; leave it out, or set a ridge"
            )


def likeliest_effects(x: Floats, y: Floats, penalty: Floats, gauge: Floats) -> Floats:
    """The θ [F] that maximises Σ [y log σ(xθ) + (1 − y) log σ(−xθ)] − ½ θᵀ penalty θ, for x [M, F] and y [M] in [0, 1].

    Newton steps, halved where it falls. `gauge` [F, F] makes the Hessian invertible along directions that change
    nothing. `DataError` where no finite θ is the likeliest.
    """
    theta = np.zeros(x.shape[1])

    def objective(theta: Floats) -> float:
        return _log_likelihood(x @ theta, y) - 0.5 * float(theta @ penalty @ theta)

    for _ in range(_MAX_STEPS):
        p = _sigmoid(x @ theta)
        hessian = (x.T * (p * (1 - p))) @ x + penalty + gauge
        try:
            step = np.linalg.solve(hessian, x.T @ (y - p) - penalty @ theta)
        except np.linalg.LinAlgError:
            break  # so far out that nothing is uncertain
        before = objective(theta)
        while objective(theta + step) < before - 1e-12 * (1 + abs(before)):
            step = step / 2
        theta = theta + step
        if np.abs(x @ step).max() < 1e-9:
            return theta
    raise DataError(
        "no effects are the most likely: a covariate, with the players, tells all outcomes that there are, so the "
        "larger the better; leave it out, or set a ridge (a prior)"
    )


def _log_likelihood(logits: Floats, y: Floats) -> float:
    return -float((y * np.logaddexp(0.0, -logits) + (1 - y) * np.logaddexp(0.0, logits)).sum())


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -logits))


def _names(players: Sequence[Any]) -> str:
    shown = ", ".join(repr(player) for player in players[:5])
    return shown if len(players) <= 5 else f"{shown} and {len(players) - 5} more"
