"""A reward model that judges every step of a response, learned from what people said of steps.

Uesato et al. 2022, arXiv 2211.14275; Lightman et al. 2023, arXiv 2305.20050. One forward pass reads all steps, since a
causal model has, at a step's last token, read nothing after it. How the steps make a score says the head `Steps`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.functional import bradley_terry_loss
from rlhf_env.intervals import rate_interval
from rlhf_env.preferences.reward_metrics import calibration
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.heads import Steps
from rlhf_env.reward_models.learning import learn, require_taken
from rlhf_env.reward_models.steps import Solution
from rlhf_env.settings import BradleyTerryConfig


def fit_steps(
    reward: ClassifierReward,
    solutions: Sequence[Solution],
    config: BradleyTerryConfig = BradleyTerryConfig(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Minimise the mean over judged steps of −[y log σ(r) + (1 − y) log σ(−r)]; yields metrics per step.

    `reward` has the head `Steps`, `batch_size` is in solutions. Raises `ConfigError` for a body that reads what comes
    after a step, and `DataError` where no judged step is left of what the model reads.
    """
    if not isinstance(reward.head, Steps):
        raise ConfigError("a model of steps has the head Steps: new_reward_model(body, head=Steps())")
    require_taken(config, "a model of steps", ())
    _require_causal(reward)
    known = [(row, tokens, labels) for row, tokens, labels in _judged(reward, solutions) if tokens]
    if not known:
        raise DataError(f"no judged step of {len(solutions)} solutions is left in the tokens which the model reads")

    def loss_of(batch: list[int]) -> tuple[Tensor, dict[str, float]]:
        rows, tokens, labels = zip(*(known[i] for i in batch), strict=True)
        logits = reward.read_tokens(rows)[..., 0]
        told = torch.cat([each[those] for each, those in zip(logits, tokens, strict=True)])
        y = told.new_tensor([label for those in labels for label in those])
        sure = y != 0.5
        right = ((told.detach() > 0) == (y > 0.5))[sure].double()
        return bradley_terry_loss(told, y).mean(), {"accuracy": float(right.mean())} if len(right) else {}

    yield from learn(reward, len(known), loss_of, config, seed)


def measure_steps(reward: ClassifierReward, solutions: Sequence[Solution]) -> dict[str, Any]:
    """How well the steps' logits predict labels that were not learned from, as JSON would hold it.

    `accuracy`, the share of judged steps on the right side of ½, labels of ½ left out, with an interval that counts
    solutions, since steps of one err together; `calibration` of σ(logit); `steps`, how many were judged and read.
    """
    told = [(row, tokens, labels) for row, tokens, labels in _judged(reward, solutions) if tokens]
    if not told:
        raise DataError("there are no judged steps to measure on")
    logits, y, sides = [], [], []
    with torch.inference_mode():
        for row, tokens, labels in told:
            r = reward.read_tokens([row])[0, tokens, 0].double().cpu().numpy()
            logits.append(r)
            y.append(np.array(labels))
            sides.append(0.5 + 0.5 * np.sign(r * (y[-1] - 0.5))[y[-1] != 0.5])
    right = np.concatenate(sides)
    count = sum(len(side) > 0 for side in sides)
    found = rate_interval("accuracy", float(right.mean()) * count, count) if count else {}
    return {**found, **calibration(np.concatenate(logits), np.concatenate(y)), "steps": sum(map(len, y))}


@dataclass(frozen=True)
class ByStep:
    """A model of steps that pays where each step ends: a `ProcessRewardModel` whose episode has the model's own score.

    The token that completes a separator is paid by how much the score of the text before it changed since the last one
    (since 0 at first), and the response as a whole by what is left. What a step is paid knows nothing of later ones.
    Special tokens inside a response, which are shown by name and not scored with the whole, make the two differ.
    """

    reward: ClassifierReward  #: with the head `Steps`

    def __post_init__(self) -> None:
        if not isinstance(self.reward.head, Steps):
            raise ConfigError("only a model with the head Steps pays by step")

    def score_tokens(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """What each token is paid, [T] for each response; 0 where no step ends."""
        texts = [list(itertools.accumulate(pieces)) for pieces in responses]
        finished = [[self._finished(text) for text in those] for those in texts]
        ends = [[t for t, text in enumerate(those) if text != ([""] + those)[t]] for those in finished]
        asked = [(prompt, those[t]) for prompt, those, at in zip(prompts, finished, ends, strict=True) for t in at]
        scores = iter(self.reward.score([p for p, _ in asked], [text for _, text in asked]).tolist() if asked else [])
        paid = [np.zeros(len(pieces)) for pieces in responses]
        for row, at in zip(paid, ends, strict=True):
            row[at] = np.diff([next(scores) for _ in at], prepend=0.0)
        return paid

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The model's score of each response less what its tokens were paid, [B]."""
        whole, finished = self.reward.score(prompts, responses), [self._finished(text) for text in responses]
        paid = self.reward.score(prompts, finished)
        return whole - np.where([bool(text) for text in finished], paid, 0.0)

    def _finished(self, text: str) -> str:
        """The steps that a separator has ended, without it; "" where there is none."""
        assert isinstance(self.reward.head, Steps)
        before, separator, _ = text.rpartition(self.reward.head.separator)
        return before.rstrip() if separator else ""


def text_of(reward: ClassifierReward, solution: Solution) -> str:
    """The response that the steps of a solution make."""
    assert isinstance(reward.head, Steps)
    return reward.head.separator.join(solution.steps)


def _judged(reward: ClassifierReward, solutions: Sequence[Solution]) -> list[tuple[list[int], list[int], list[float]]]:
    """What is read of each solution, the last tokens of its judged steps, and their labels; not of those cut off."""
    places = reward.places([s.prompt for s in solutions], [text_of(reward, s) for s in solutions])
    found = []
    for (row, tokens), solution in zip(places, solutions, strict=True):
        told = zip(tokens, solution.labels, strict=True)
        kept = [(token, label) for token, label in told if token is not None and label is not None]
        found.append((row, [token for token, _ in kept], [label for _, label in kept]))
    return found


def _require_causal(reward: ClassifierReward) -> None:
    """Refuse a body whose first token knows the second."""
    with torch.inference_mode():
        first = reward.read_tokens([[0, 1], [0, 2]])[:, 0]
    if not torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-5):
        raise ConfigError(f"{type(reward.model).__name__} reads what comes after a step: take a causal body")
