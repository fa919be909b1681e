"""People who want different things: a score for each of them, or for groups of them that are found on the way.

One score for all answers to mixed judgements with a compromise that may be nobody's (by Borda count, where everything
is compared equally often; Siththaranjan et al. 2024, arXiv 2312.08358, theorem 3.1). With the head `Groups` a model has
a logit for each group, on one body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.reward_metrics import accuracy, accuracy_by
from rlhf_env.reward_models.bradley_terry import comparison_costs, require_learnable, rows_of
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.heads import Groups
from rlhf_env.reward_models.learning import learn, require_taken
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.types import Comparison

_STREAM = 11
_TAKES = ("loss", "margin", "label_smoothing", "flip_rate", "center", "l2")
_LEAST = 0.5  # of a labeler in a group that is not empty


@dataclass(frozen=True)
class Membership:
    """Which group each labeler belongs to, in probability."""

    labelers: tuple[str, ...]  #: [A]
    posterior: NDArray[np.float64]  #: of each group given all that a labeler said, [A, G]
    weights: NDArray[np.float64]  #: share of each group among the labelers, [G]
    log_likelihood: float  #: of the judgements asked, which were not learned from, in nats


def responsibilities(log_likelihood: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """P(group | what a labeler said), [A, G], and log P of what each said, [A]: the E-step of a mixture.

    From the log-likelihood [A, G] of a labeler's judgements under each group, and the groups' `weights` [G]. Dempster,
    Laird & Rubin 1977; for reward models Chakraborty et al. 2024 (MaxMin-RLHF), arXiv 2402.08925, algorithm 2.
    """
    joint = log_likelihood + weights.log()
    return joint.softmax(-1), joint.logsumexp(-1)


def annotators(comparisons: Sequence[Comparison], aggregate: Literal["min", "mean"] = "min") -> Groups:
    """The head with a logit for each labeler, who weighs as much as the judgements that are theirs."""
    names, of = _who(comparisons)
    shares = np.bincount(of) / len(of)
    return Groups(tuple(names.tolist()), tuple(shares.tolist()), aggregate)


def fit_annotators(
    reward: ClassifierReward,
    comparisons: Sequence[Comparison],
    config: BradleyTerryConfig = BradleyTerryConfig(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Each labeler's logit learns from their own judgements, the body from all; yields metrics per step.

    `reward` has the head that `annotators` makes. Raises `DataError` for a labeler whom it does not know, and for one
    of whom there is nothing to learn: the least of all scores would be noise.
    """
    names = _groups(reward).names
    if unknown := sorted({c.labeler for c in comparisons} - set(names)):
        raise DataError(f"the model has no logit for {', '.join(map(repr, unknown[:5]))}")
    if silent := sorted(set(names) - {c.labeler for c in comparisons}):
        raise DataError(f"nothing is learned from {', '.join(map(repr, silent[:5]))}: leave out who judged too little")
    belongs = np.array([[name == c.labeler for name in names] for c in comparisons])
    yield from _fit_weighted(reward, comparisons, belongs, config, seed)


def fit_mixture(
    reward: ClassifierReward,
    comparisons: Sequence[Comparison],
    config: BradleyTerryConfig = BradleyTerryConfig(),  # noqa: B008 (frozen)
    *,
    rounds: int = 5,
    seed: int = 0,
) -> Iterator[Membership]:
    """Expectation–maximisation for the groups of the head `Groups`, yielding who belongs where after each round.

    A round lets every group's logit learn, for `config.epochs`, from each judgement as much as its labeler probably
    belongs to the group, and then asks anew where labelers belong. At first all learn alike, and the labelers are split
    by how well that one score predicts them, so that those whom it serves badly begin together. What is learned from
    is half of what each labeler said, and what is asked is the other half: a network learns the judgements of
    whom it is given by heart, and would find every guess confirmed. At last it learns from all. Like every mixture it
    may end in a local optimum: compare the `log_likelihood` of several seeds. The head keeps the groups' weights.

    Raises `DataError` where comparisons do not say who judged, where fewer labelers than there are groups judged twice
    (of whom judged once nothing is left to ask, and their group stays a guess), and where a group comes out empty: its
    logit would have learned nothing, and be the least of all where it is noise.
    """
    require_learnable(comparisons, config)
    require_taken(config, "a model of groups", _TAKES)
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}")
    head = _groups(reward)
    count = len(head.names)
    labelers, of = _who(comparisons)
    if (often := int((np.bincount(of) > 1).sum())) < count:
        raise DataError(f"{count} groups are found among at least {count} labelers who judged twice; these are {often}")
    order = np.random.default_rng([seed, _STREAM]).permutation(len(of))
    order = order[np.argsort(of[order], kind="stable")]
    learned, asked = order[::2], order[1::2]  # about half of what each labeler said
    known = [comparisons[i] for i in learned]

    def said(belongs: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        """Log-likelihood [A, G] of what was not learned from, after learning from the rest."""
        for _ in _fit_weighted(reward, known, belongs[of[learned]], config, seed + number):
            pass
        costs = _costs(reward, [comparisons[i] for i in asked], BradleyTerryConfig(loss=config.loss))
        found = np.zeros((len(labelers), len(head.names)))
        np.add.at(found, of[asked], -costs)
        return found

    posterior = np.full((len(labelers), count), 1 / count)
    answers = np.bincount(of[asked], minlength=len(labelers))
    common = (said(posterior, 0).mean(1) / answers.clip(1))[answers > 0]
    posterior[answers > 0] = np.eye(count)[np.argsort(np.argsort(common)) * count // len(common)]
    for number in range(1, rounds + 1):
        found, likelihood = responsibilities(
            torch.from_numpy(said(posterior, number)), torch.from_numpy(posterior.mean(0))
        )
        posterior = found.numpy()
        if (empty := posterior.sum(0) < _LEAST).any():
            name = head.names[int(empty.argmax())]
            raise DataError(f"after round {number} no labeler is left in the group {name}: take fewer, or another seed")
        weights = posterior.mean(0) / posterior.mean(0).sum()
        reward.head = replace(head, weights=tuple(weights.tolist()))
        if number == rounds:
            for _ in _fit_weighted(reward, comparisons, posterior[of], config, seed + rounds + 1):
                pass
        yield Membership(tuple(labelers.tolist()), posterior, weights, float(likelihood.sum()))


def own_accuracy(
    reward: ClassifierReward, comparisons: Sequence[Comparison], group: Mapping[str, int]
) -> dict[str, Any]:
    """How often each labeler's judgements are predicted by the logit with the number that `group` has for them.

    `own_accuracy` with its interval, and rows of it `by_labeler`; of labelers without a number there is nothing.
    """
    those = [c for c in comparisons if c.labeler in group]
    if not those:
        return {}
    every = reward.all_logits(
        [c.prompt for c in those for _ in c.responses], [response for c in those for response in c.responses]
    )
    each = np.split(every, np.cumsum([len(c.responses) for c in those])[:-1])
    scores = [logits[:, group[c.labeler]] for c, logits in zip(those, each, strict=True)]
    rows = accuracy_by("labeler", lambda c: c.labeler, those, scores)
    return accuracy("own_accuracy", those, scores) | {"by_labeler": rows}


def _who(comparisons: Sequence[Comparison]) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """The names of the labelers, and the number of the one who made each comparison."""
    if not all(c.labeler for c in comparisons):
        raise DataError("scores of labelers or of groups need comparisons that say who judged; some do not")
    return np.unique([c.labeler for c in comparisons], return_inverse=True)


def _groups(reward: ClassifierReward) -> Groups:
    if not isinstance(reward.head, Groups):
        raise ConfigError("a model of groups has the head Groups: new_reward_model(body, head=Groups(...))")
    return reward.head


def _fit_weighted(
    reward: ClassifierReward,
    comparisons: Sequence[Comparison],
    belongs: NDArray[np.generic],
    config: BradleyTerryConfig,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Minimise the mean over comparisons of Σ_g belongs[c, g] · cost under g; `belongs` [N, G]."""
    require_learnable(comparisons, config)
    require_taken(config, "a model of groups", _TAKES)
    rows, table = [rows_of(reward, c) for c in comparisons], torch.from_numpy(belongs.astype(np.float64))

    def loss_of(batch: list[int]) -> tuple[Tensor, dict[str, float]]:
        logits = reward.read([row for i in batch for row in rows[i]])
        those = [comparisons[i] for i in batch]
        costs = torch.stack([comparison_costs(column, those, config) for column in logits.unbind(-1)], -1)
        return (table[batch].to(costs) * costs).sum(-1).mean(), {}

    yield from learn(reward, len(rows), loss_of, config, seed)


def _costs(
    reward: ClassifierReward, comparisons: Sequence[Comparison], config: BradleyTerryConfig
) -> NDArray[np.float64]:
    """What each comparison costs under each group, [N, G] in nats."""
    asked = [c.prompt for c in comparisons for _ in c.responses]
    logits = torch.from_numpy(reward.all_logits(asked, [response for c in comparisons for response in c.responses]))
    return torch.stack([comparison_costs(column, comparisons, config) for column in logits.unbind(-1)], -1).numpy()
