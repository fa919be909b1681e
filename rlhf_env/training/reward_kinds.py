"""The kinds of reward model that `run_reward` can learn: from which data, with which head, how, and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_env.preferences.comparisons import distinct, read_comparisons
from rlhf_env.reward_models.bradley_terry import fit_comparisons, measure_comparisons, usable
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.disentangled import fit_disentangled
from rlhf_env.reward_models.groups import annotators, fit_annotators, fit_mixture, own_accuracy
from rlhf_env.reward_models.heads import Disentangled, Groups, Head, MeanVariance, Rated, Steps
from rlhf_env.reward_models.mean_variance import fit_mean_variance
from rlhf_env.reward_models.process import fit_steps, measure_steps
from rlhf_env.reward_models.regression import fit_ratings, measure_ratings, read_ratings
from rlhf_env.reward_models.steps import read_solutions
from rlhf_env.settings import BradleyTerryConfig, MixtureKind
from rlhf_env.types import Comparison

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """A form of what people said; each example has a `prompt`. `own` are the settings of the kind."""

    noun: str  #: what examples are called
    loss: str  #: what the loss is called among the measures
    read: Callable[[str, Any], tuple[list[Any], int]]  #: (source, own) → examples, and how many teach nothing
    responses: Callable[[Any, Any], Sequence[str]]  #: (example, own) → its responses
    usable: Callable[[ClassifierReward, Sequence[Any]], tuple[list[Any], int]]  #: … and how many the model cannot read
    measure: Callable[[ClassifierReward, Sequence[Any]], dict[str, Any]]  #: of what was not learned from


@dataclass(frozen=True)
class Kind:
    """What is learned, from which data, how."""

    data: Data
    head: Callable[[Any, Sequence[Any]], Head | None]  #: (own, examples) → the head
    fit: Callable[[ClassifierReward, Sequence[Any], BradleyTerryConfig, Any, int], Rows]  #: …, fit, own, seed → rows
    more: Callable[[ClassifierReward, Sequence[Any], Mapping[str, Any]], dict[str, Any]] = lambda *_: {}
    #: (model, examples, the last row of learning) → measures of this kind alone


def _all(model: ClassifierReward, examples: Sequence[Any]) -> tuple[list[Any], int]:
    return list(examples), 0


COMPARISONS = Data(
    "comparisons",
    "log_loss",
    lambda source, own: distinct(read_comparisons(source)),
    lambda c, own: c.responses,
    usable,
    measure_comparisons,
)
RATINGS = Data(
    "ratings", "rmse", lambda source, own: (read_ratings(source), 0), lambda r, own: [r.response], _all, measure_ratings
)
SOLUTIONS = Data(
    "solutions",
    "log_loss",
    lambda source, own: (read_solutions(source, own.separator), 0),
    lambda s, own: [own.separator.join(s.steps)],
    _all,
    measure_steps,
)


def _groups(own: MixtureKind, examples: Sequence[Any]) -> Groups:
    names = tuple(f"group{i + 1}" for i in range(own.groups))
    return Groups(names, (1 / own.groups,) * own.groups, own.aggregate)


def _mixture_rows(
    model: ClassifierReward, comparisons: Sequence[Comparison], fit: BradleyTerryConfig, own: MixtureKind, seed: int
) -> Rows:
    """A row per round: `loss` in nats per judgement asked, `weights` of the groups, `members`: who is in which."""
    for number, found in enumerate(fit_mixture(model, comparisons, fit, rounds=own.rounds, seed=seed), start=1):
        most = found.posterior.argmax(1).tolist()
        yield {
            "step": number,
            "steps": own.rounds,
            "loss": -found.log_likelihood / (len(comparisons) // 2),
            "weights": found.weights.tolist(),
            "members": {name: f"group{group + 1}" for name, group in zip(found.labelers, most, strict=True)},
        }


def _own_of_groups(
    model: ClassifierReward, comparisons: Sequence[Comparison], last: Mapping[str, Any]
) -> dict[str, Any]:
    """By the logit of each labeler, or of the group that learning found them in."""
    assert isinstance(model.head, Groups)
    number = {name: i for i, name in enumerate(model.head.names)}
    members = last.get("members")
    group = number if members is None else {labeler: number[name] for labeler, name in members.items()}
    return own_accuracy(model, comparisons, group)


#: By the names that `RewardConfig.kind` may have. The settings of each are in `rlhf_env.settings.REWARD_KINDS`.
KINDS: dict[str, Kind] = {
    "bradley_terry": Kind(
        COMPARISONS,
        lambda own, examples: None,
        lambda model, examples, fit, own, seed: fit_comparisons(model, examples, fit, seed=seed),
    ),
    "annotators": Kind(
        COMPARISONS,
        lambda own, examples: annotators(examples, own.aggregate),
        lambda model, examples, fit, own, seed: fit_annotators(model, examples, fit, seed=seed),
        _own_of_groups,
    ),
    "mixture": Kind(COMPARISONS, _groups, _mixture_rows, _own_of_groups),
    "mean_variance": Kind(
        COMPARISONS,
        lambda own, examples: MeanVariance(own.risk),
        lambda model, examples, fit, own, seed: fit_mean_variance(model, examples, fit, seed=seed),
    ),
    "disentangled": Kind(
        COMPARISONS,
        lambda own, examples: Disentangled(),
        lambda model, examples, fit, own, seed: fit_disentangled(
            model, examples, fit, of_length=own.of_length, orthogonal=own.orthogonal, seed=seed
        ),
    ),
    "ratings": Kind(
        RATINGS,
        lambda own, examples: Rated(),
        lambda model, examples, fit, own, seed: fit_ratings(model, examples, fit, seed=seed),
    ),
    "steps": Kind(
        SOLUTIONS,
        lambda own, examples: Steps(own.aggregate, own.separator),
        lambda model, examples, fit, own, seed: fit_steps(model, examples, fit, seed=seed),
    ),
}
