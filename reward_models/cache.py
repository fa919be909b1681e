"""A reward that remembers, so that no text is judged twice: for models that are slow or cost money."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.rewards import ScoreFn, require_whole, scores_of
from rlhf_env.errors import ConfigError
from rlhf_env.types import RewardModel


class Cached:
    """`reward`, asked once per prompt and response of the last `size` different ones; made by `cached`.

    Each has a memory of its own, so no two models mix. It holds whole scores: parts that the reward names are added up.
    A resumed run starts with an empty memory. It is the same run bit for bit where the reward's scores are the same in
    every batch, and up to rounding where they are so only up to rounding, as a classifier's.
    """

    def __init__(self, reward: RewardModel | ScoreFn, size: int = 2**16) -> None:
        require_whole("a cached reward", reward)
        if size < 1:
            raise ConfigError(f"a memory holds at least 1 score, not {size}")
        self.reward, self.size = reward, size
        self._known: OrderedDict[bytes, float] = OrderedDict()  # the least recently wanted first

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The reward's score of each response, [B]; those unknown are asked for in one call."""
        pairs = list(zip(prompts, responses, strict=True))
        keys = [_key(*pair) for pair in pairs]
        known = {key: self._known[key] for key in keys if key in self._known}
        unknown = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        if unknown:
            asked = zip(*unknown.values(), strict=True)
            known |= zip(unknown, scores_of(self.reward, *map(list, asked)).tolist(), strict=True)
        for key in keys:
            self._known[key] = known[key]
            self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return np.array([known[key] for key in keys], dtype=np.float64)


def cached(reward: RewardModel | ScoreFn, size: int = 2**16) -> Cached:
    """`reward` with a memory of its last `size` scores, by the SHA-256 of prompt and response."""
    return Cached(reward, size)


def _key(prompt: str, response: str) -> bytes:
    first, second = (text.encode("utf-8", "surrogatepass") for text in (prompt, response))
    return hashlib.sha256(len(first).to_bytes(8) + first + second).digest()  # the length: "a" + "bc" is not "ab" + "c"
