"""Sentiment by rule: the gold reward of the Reviews world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_env.errors import ConfigError


class VaderReward:
    """VADER's compound sentiment, in [−1, 1] (Hutto & Gilbert 2014); 0 for text without a word it knows.

    `of="response"` scores what the policy wrote; `of="text"` scores prompt and response as one text, in which a
    negation or a feeling of the prompt counts too (common in published sentiment experiments).
    """

    def __init__(self, *, of: Literal["response", "text"] = "response") -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        if of not in ("response", "text"):
            raise ConfigError(f"of must be 'response' or 'text', got {of!r}")
        self.of = of
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """Compound sentiment of each response, [B]."""
        texts = responses if self.of == "response" else map("".join, zip(prompts, responses, strict=True))
        return np.array([self._analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float64)
