"""Baselines that read no meaning: a linear model of the words of a response, and its length.

Whoever trains a transformer on comparisons should be better than these; on real comparisons many are, by a few percent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn.functional import embedding_bag

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.functional import bradley_terry_loss
from rlhf_env.preference_losses import less_margin
from rlhf_env.records.config import Layer, build
from rlhf_env.records.jsonl import read_json, write_json
from rlhf_env.reward_models.bradley_terry import flat_pairs
from rlhf_env.reward_models.normalise import moments
from rlhf_env.types import Comparison

_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class LinearReward:
    """Σ_g w_g log(1 + count of g) over the n-grams g of a response, as a score of mean 0 and variance 1."""

    vocabulary: tuple[str, ...]  #: the n-grams, words with a space between, in the order of the weights
    weights: NDArray[np.float64]  #: of each n-gram, [V]
    longest: int = 2  #: words of the longest n-gram
    mean: float = 0.0  #: the logit that scores 0
    std: float = 1.0  #: how many units of the logit are one unit of the score

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """(logit − mean) / std of each response, [B]."""
        return (self.logits(prompts, responses) - self.mean) / self.std

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The weighted sum for each response, [B]; the prompts count for nothing."""
        table = _Counts.of(responses, self.vocabulary, self.longest)
        return table.times(torch.from_numpy(self.weights)).numpy()

    def normalized_on(self, prompts: Sequence[str], responses: Sequence[str]) -> LinearReward:
        """The same model, of which these responses have mean 0 and variance 1."""
        mean, std = moments(self.logits(prompts, responses), "logit")
        return replace(self, mean=mean, std=std)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, vocabulary.json and model.safetensors; `load_reward` finds it by its folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weights": self.weights}, folder / "model.safetensors")
        write_json(folder / "vocabulary.json", {"ngrams": list(self.vocabulary)})
        told = {"longest": self.longest, "mean": self.mean, "std": self.std}
        write_json(folder / "config.json", {"reward_kind": "linear", "reward_linear": told})

    @classmethod
    def load(cls, folder: str | Path) -> LinearReward:
        """What `save_pretrained` wrote. `ConfigError` where a part is missing or does not fit the others."""
        folder = Path(folder)
        config = folder / "config.json"
        told = build(
            _Stored, Layer(str(config), {"reward_linear": read_json(config).get("reward_linear", {})})
        ).reward_linear
        names = read_json(folder / "vocabulary.json").get("ngrams")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{folder / 'vocabulary.json'} must have a list of words as 'ngrams'")
        try:
            tensors = load_file(folder / "model.safetensors")
        except Exception as error:  # safetensors has an exception of its own, which is no OSError
            raise ConfigError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
        weights = tensors.get("weights")
        if set(tensors) != {"weights"} or weights is None or weights.shape != (len(names),):
            found = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise ConfigError(f"{folder} should hold the weights of {len(names)} n-grams and nothing else; got {found}")
        if not (weights.dtype == np.float64 and np.isfinite(weights).all() and 0 < told.std < float("inf")):
            raise ConfigError(f"{folder}: weights must be finite numbers in float64, and std positive")
        return cls(tuple(names), weights, told.longest, told.mean, told.std)


def fit_linear(
    comparisons: Sequence[Comparison],
    *,
    longest: int = 2,
    l2: float = 1.0,
    least_count: int = 2,
    margin: float = 0.0,
    steps: int = 200,
) -> LinearReward:
    """The logistic regression of preferences on differences of n-gram counts: convex, so it has one optimum.

    Σ over comparisons of the mean `bradley_terry_loss` of their pairs + l2/2 · Σ w², minimised by L-BFGS until nothing
    changes or for `steps`. N-grams of up to `longest` words that occur in at least `least_count` responses count. The
    preferred response is to lead by `margin` logits per unit of a comparison's strength, 0 where it has none.
    """
    if not comparisons:
        raise DataError("there are no comparisons to learn from")
    if longest < 1 or l2 <= 0 or least_count < 1:
        raise ConfigError("longest and least_count must be at least 1, and l2 positive: words outnumber comparisons")
    if margin < 0:
        raise ConfigError(f"the margin must be at least 0, it is {margin}")
    if margin and all(c.strength is None for c in comparisons):
        raise DataError("margin is in units of a comparison's strength, and of these comparisons none has one")
    responses = [response for c in comparisons for response in c.responses]
    seen = Counter(g for response in responses for g in set(_ngrams(response, longest)))
    vocabulary = tuple(sorted(g for g, count in seen.items() if count >= least_count))
    if not vocabulary:
        raise DataError(f"no word occurs in {least_count} responses: there is nothing to learn from")
    table, pairs = _Counts.of(responses, vocabulary, longest), flat_pairs(comparisons)
    preference = torch.tensor(pairs.preference, dtype=torch.float64)
    share = torch.tensor(pairs.share, dtype=torch.float64)
    strength = torch.tensor(pairs.strength, dtype=torch.float64)
    w = torch.zeros(len(vocabulary), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = table.times(w)
        lead = less_margin(logits[pairs.first] - logits[pairs.second], preference, margin * strength)
        value = share @ bradley_terry_loss(lead, preference)
        value = value + l2 / 2 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return LinearReward(vocabulary, w.detach().numpy(), longest)


@dataclass(frozen=True)
class LengthReward:
    """The number of characters of a response, times `sign`: 1 prefers the longer one, −1 the shorter one."""

    sign: float = 1.0  #: what one character is worth

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """sign · characters of each response, [B]."""
        return self.sign * np.array([len(response) for response in responses], dtype=np.float64)

    logits = score


@dataclass(frozen=True)
class _Numbers:
    longest: int
    mean: float
    std: float


@dataclass(frozen=True)
class _Stored:
    reward_linear: _Numbers


@dataclass(frozen=True)
class _Counts:
    """log(1 + count) of the n-grams of texts, as the bags of `embedding_bag`."""

    numbers: Tensor  # int64, the n-grams of all texts in a row
    starts: Tensor  # int64 [B], where each text's begin
    values: Tensor  # float64, log(1 + count)

    @classmethod
    def of(cls, texts: Sequence[str], vocabulary: Sequence[str], longest: int) -> _Counts:
        number = {g: i for i, g in enumerate(vocabulary)}
        bags = [Counter(number[g] for g in _ngrams(text, longest) if g in number) for text in texts]
        starts = np.cumsum([0, *map(len, bags)])[:-1]
        numbers = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64)
        counts = torch.tensor([count for bag in bags for count in bag.values()], dtype=torch.float64)
        return cls(numbers, torch.from_numpy(starts), counts.log1p())

    def times(self, weights: Tensor) -> Tensor:
        """The weighted sum for each text, [V] → [B]."""
        table = weights.unsqueeze(1)
        bags = embedding_bag(self.numbers, table, self.starts, mode="sum", per_sample_weights=self.values)
        return bags.squeeze(1)


def _ngrams(text: str, longest: int) -> Iterator[str]:
    """All n-grams of a text's words and marks in lower case, of 1 to `longest` of them."""
    words = _WORDS.findall(text.casefold())
    lengths = range(1, min(longest, len(words)) + 1)
    return (" ".join(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1))
