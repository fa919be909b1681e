"""A reward model from ratings: somebody gave each response a number, and the model predicts it.

Stiennon et al. 2020 asked for Likert scores beside comparisons; lm-human-preferences calls it `ScalarRating`. People
use a scale in different ways, which is why comparisons are more common.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.jsonl import require_keys
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.heads import Rated
from rlhf_env.reward_models.learning import learn, require_taken
from rlhf_env.reward_models.normalise import moments
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.text.sources import read_rows


@dataclass(frozen=True)
class Rating:
    """One response and the number that somebody gave it."""

    prompt: str
    response: str
    rating: float  #: finite, in whatever unit


def read_ratings(source: str | Path) -> list[Rating]:
    """The ratings of a `.jsonl` or `.json` file or of the data set `hf:NAME`: keys "prompt", "response" and "rating".

    Other keys are ignored. `DataError` names file, line and reason.
    """
    ratings = []
    for where, row in read_rows(source):
        require_keys(row, {"prompt": str, "response": str, "rating": float}, where)
        ratings.append(Rating(row["prompt"], row["response"], float(row["rating"])))
        if not math.isfinite(ratings[-1].rating):
            raise DataError(f"{where}: the rating must be finite, it is {ratings[-1].rating}")
    return ratings


def fit_ratings(
    reward: ClassifierReward,
    ratings: Sequence[Rating],
    config: BradleyTerryConfig = BradleyTerryConfig(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Minimise the mean (logit − standardised rating)²; yields metrics per step, `batch_size` being ratings.

    `reward` has the head `Rated`, so that nobody takes its logit for one of preferences.
    Afterwards `logits` is in the unit of the ratings, and so is `score` until it is normalised.
    """
    if not isinstance(reward.head, Rated):
        raise ConfigError("a model of ratings has the head Rated: new_reward_model(body, head=Rated())")
    require_taken(config, "a model of ratings", ("l2",))
    numbers = np.array([r.rating for r in ratings], dtype=np.float64)
    if len(numbers) < 2 or numbers.std() == 0:
        raise DataError(f"{len(numbers)} ratings that do not differ teach nothing: at least two different are needed")
    mean, std = moments(numbers, "rating")
    rows = reward.encode([r.prompt for r in ratings], [r.response for r in ratings])

    def loss_of(batch: list[int]) -> tuple[Tensor, dict[str, float]]:
        logits = reward.read([rows[i] for i in batch])[:, 0]
        error = logits - logits.new_tensor((numbers[batch] - mean) / std)
        return error.square().mean() + config.l2 * logits.square().mean(), {}

    yield from learn(reward, len(rows), loss_of, config, seed)
    reward.head = Rated(mean, std)


def measure_ratings(reward: ClassifierReward, ratings: Sequence[Rating]) -> dict[str, float]:
    """`rmse`, the root of the mean squared error in the unit of the ratings, and their `correlation` with what is said.

    Pearson's; not there where one of them does not vary. Whether the score is normalised changes neither.
    """
    if not ratings:
        raise DataError("there are no ratings to measure on")
    scores = reward.logits([r.prompt for r in ratings], [r.response for r in ratings])
    numbers = np.array([r.rating for r in ratings], dtype=np.float64)
    measured = {"rmse": float(np.sqrt(((scores - numbers) ** 2).mean()))}
    if scores.std() > 0 and numbers.std() > 0:
        measured["correlation"] = float(np.corrcoef(scores, numbers)[0, 1])
    return measured
