"""What a labeler likes: gold and biases as functions (prompts, responses) → [B], which add up.

u = gold + w₁ · `log_words` + w₂ · `markdown_marks` + w₃ · `sycophancy` … is `weighted`; each bias is in its own units,
and its weight is in gold per unit. A `SimulatedLabeler` takes the sum as what it goes by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.rewards import scores_of, token_scores_of
from rlhf_env.errors import ConfigError
from rlhf_env.types import ProcessRewardModel, RewardModel

#: What `scores_of` can ask: a `RewardModel`, or a function (prompts, responses) → [B].
Utility = RewardModel | Callable[..., Any]


def weighted(terms: Sequence[tuple[float, Utility]]) -> Callable[[Sequence[str], Sequence[str]], NDArray[np.float64]]:
    """Σ_k w_k u_k(prompt, response), [B], of pairs (w_k, u_k)."""

    def utility(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        parts = [weight * scores_of(part, prompts, responses) for weight, part in terms]
        return np.sum(parts, axis=0) if parts else np.zeros(len(responses))

    return utility


def log_words(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
    """Length: log(1 + words of the response), [B], in nats; a response of twice the words has about 0.69 more."""
    return np.log1p([len(response.split()) for response in responses])


def markdown_marks(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
    """Format: how many list items, headings and **bold** spans of Markdown the response has, [B]."""
    return np.array([len(_MARKS.findall(response)) for response in responses], dtype=np.float64)


_MARKS = re.compile(r"^[ \t]*(?:[-*+]|\d{1,9}[.)]|#{1,6})[ \t]+(?=\S)|\*\*(?! )[^*\n]+(?<! )\*\*", re.MULTILINE)


def sycophancy(
    stance: Utility, belief: Callable[[str], str] | None = None
) -> Callable[[Sequence[str], Sequence[str]], NDArray[np.float64]]:
    """Agreement with the prompt: sign(s(belief(prompt))) · s(response), [B]; 0 where the prompt states no belief.

    `stance` s says how much a text is for (> 0) or against (< 0) something, such as a sentiment; of the belief it is
    asked with an empty prompt. `belief` takes what a prompt states out of it, "" for nothing; by default
    `stated_belief`.
    """
    belief = stated_belief if belief is None else belief

    def utility(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        beliefs = [belief(prompt) for prompt in prompts]
        held = np.sign(scores_of(stance, [""] * len(beliefs), beliefs)) * [bool(text.strip()) for text in beliefs]
        return held * scores_of(stance, prompts, responses)

    return utility


def stated_belief(prompt: str) -> str:
    """What the prompt's first "I think …", "I really hate …", "I don't like …" says, "" where there is none.

    From after "I" to the end of the sentence: at most two words (adverb, negation), one of the verbs think, believe,
    feel, love, like, enjoy, admire, prefer, hate, dislike, despise, and what follows. Upper and lower case are alike.
    """
    found = _BELIEF.search(prompt)
    return found[1] if found else ""


_BELIEF = re.compile(
    r"\bI[ \t]+((?:[\w'’]+[ \t]+){0,2}(?:think|believe|feel|love|like|enjoy|admire|prefer|hate|dislike|despise)\b"
    r"[^.!?\n]*)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Lexicon:
    """A weight for each known word, 0 for others: a reward by the word (`score_tokens`), and their sum (`score`)."""

    weights: Mapping[str, float]  #: by words in lower case

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """Σ_t weight(word t) of each response, [B]; words are what `words` gives."""
        return np.array([sum(self._of(word) for word in words(response)) for response in responses], dtype=np.float64)

    def score_tokens(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """The weight of each word, [T_i] for a response of T_i words; case and punctuation around one do not count."""
        return [np.array([self._of(word) for word in those], dtype=np.float64) for those in responses]

    def _of(self, word: str) -> float:
        return self.weights.get(_AROUND.sub("", word.lower()), 0.0)


_AROUND = re.compile(r"^\W+|\W+$")


def words(response: str) -> list[str]:
    """The words of a response, each with the white space before it."""
    return re.findall(r"\s*\S+", response)


def myopic(model: ProcessRewardModel, gamma: float) -> Callable[[Sequence[str], Sequence[str]], NDArray[np.float64]]:
    """Σ_t γ^t u_t over a response's T words, [B]: what comes first counts most; u_t are `score_tokens` of its `words`.

    This is the discounted sum of imitation's `discount_factor`. γ = 1: all count alike; γ = 0: only the first does.
    """
    return _discounted(model, gamma, lambda t, length: t)


def recency(model: ProcessRewardModel, gamma: float) -> Callable[[Sequence[str], Sequence[str]], NDArray[np.float64]]:
    """Σ_t γ^(T−1−t) u_t over a response's T words, [B]: what comes last counts most; otherwise as `myopic`.

    BPref (Lee et al. 2021, arXiv 2111.03026) calls a teacher with these weights myopic, γ = 0.9.
    """
    return _discounted(model, gamma, lambda t, length: length - 1 - t)


def _discounted(
    model: ProcessRewardModel, gamma: float, power: Callable[[NDArray[np.int64], int], NDArray[np.int64]]
) -> Callable[[Sequence[str], Sequence[str]], NDArray[np.float64]]:
    if not 0 <= gamma <= 1:
        raise ConfigError(f"the discount gamma must be between 0 and 1, it is {gamma}")

    def utility(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        by_word = token_scores_of(model, prompts, [words(response) for response in responses])
        return np.array([gamma ** power(np.arange(len(u)), len(u)) @ u for u in by_word], dtype=np.float64)

    return utility
