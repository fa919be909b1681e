"""A reward model behind a server: POST {"id", "prompts", "responses"}, answered by {"id", "scores"}.

`rlhf-env serve-reward` is such a server, and the contract is small enough for one's own. What is no proper answer is a
`RemoteError`, never a reward: a run that meets one keeps what it has learned and ends, and goes on with --resume.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_env.errors import RemoteError
from rlhf_env.http import post_all, require_url, shown
from rlhf_env.settings import HTTPConfig, require

REWARD_KEY = "RLHF_ENV_REWARD_KEY"  # the environment variable that may hold a bearer token


@dataclass(frozen=True)
class RemoteConfig:
    """How a reward server is asked."""

    batch_size: int = 64  #: responses in one request
    at_once: int = 4  #: requests under way at the same time
    http: HTTPConfig = field(default_factory=HTTPConfig)  #: how patiently it is asked

    def __post_init__(self) -> None:
        require(self, batch_size=(1, None), at_once=(1, None))


@dataclass(frozen=True)
class RemoteReward:
    """The scores that the server at `url` gives.

    The environment variable RLHF_ENV_REWARD_KEY, where it is set, is sent as a bearer token. Scoring changes nothing at
    the server, so a request may be sent again: where there is no connection, and after the statuses 429 and 5xx, with
    growing waits (`HTTPConfig`). Everything else ends it at once, and so does the first request that stays without an
    answer: no other is sent after it.
    """

    url: str
    config: RemoteConfig = RemoteConfig()

    def __post_init__(self) -> None:
        require_url(self.url, key=REWARD_KEY)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The server's score of each response, [B]; equal texts are sent once. Raises `RemoteError`."""
        pairs = list(zip(prompts, responses, strict=True))
        distinct, size = list(dict.fromkeys(pairs)), self.config.batch_size
        batches = [distinct[i : i + size] for i in range(0, len(distinct), size)]
        bodies = [
            {"id": secrets.token_hex(16), "prompts": [p for p, _ in batch], "responses": [r for _, r in batch]}
            for batch in batches
        ]
        answers = post_all(
            self.url,
            bodies,
            self.config.http,
            at_once=self.config.at_once,
            read=lambda i, answer: _scores(answer, self.url, bodies[i]["id"], len(batches[i])),
            key=REWARD_KEY,
        )
        known = dict(zip(distinct, (score for scores in answers for score in scores), strict=True))
        return np.array([known[pair] for pair in pairs], dtype=np.float64)


def _scores(answer: Any, url: str, name: str, count: int) -> list[float]:
    """The scores in an answer to the request called `name`, of `count` responses."""
    if not isinstance(answer, dict) or not {"id", "scores"} <= answer.keys():
        raise RemoteError(f'{url}: {{"id": …, "scores": […]}} was expected, not {_shown(answer)}')
    if answer["id"] != name:
        raise RemoteError(f"{url} answers another request: the id sent was {name}, this is {_shown(answer['id'])}")
    scores = answer["scores"]
    if not isinstance(scores, list) or len(scores) != count:
        found = f"{len(scores)} scores" if isinstance(scores, list) else _shown(scores)
        raise RemoteError(f"{url}: a list of {count} scores was expected, one for each response, not {found}")
    return [_number(score, f"{url}: score {i}") for i, score in enumerate(scores)]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RemoteError(f"{where} must be a number, it is {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RemoteError(f"{where} is beyond what a float holds")
    return number


def _shown(value: Any) -> str:
    return shown(json.dumps(value, ensure_ascii=False), REWARD_KEY)
