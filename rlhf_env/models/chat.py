"""A chat model behind an OpenAI-compatible server, as a function of texts: prompts → replies."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_env.errors import RemoteError
from rlhf_env.http import post_all, require_url
from rlhf_env.records.safe_text import safe_text
from rlhf_env.settings import HTTPConfig
from rlhf_env.text.prompts import hash_fraction

API_KEY = "RLHF_ENV_JUDGE_API_KEY"  # apart from the policy's, since another host may answer


_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold half a surrogate pair, which no file can


def chat_generator(
    url: str,
    model: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    at_once: int = 32,
    http: HTTPConfig | None = None,
) -> Callable[[Sequence[str]], list[str]]:
    """A function from prompts to the replies of the `model` of the server at `url`, `at_once` requests at a time.

    Asked is `POST url/chat/completions` with the prompt as the user's one message: the server applies the model's chat
    template. The environment variable `RLHF_ENV_JUDGE_API_KEY` may hold a bearer token. A request's seed is made of
    `seed` and its prompt alone; whether the server then repeats itself is its affair. A reply that was cut short is
    taken as it is. `RemoteError` for a server that is lost or answers with something else: no reply is made up.
    """
    require_url(url, key=API_KEY)
    endpoint = f"{url.rstrip('/')}/chat/completions"

    def generate(prompts: Sequence[str]) -> list[str]:
        bodies = [
            {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": 1.0,  # what is left out, a server may take from the model's generation_config
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": int(np.random.default_rng([seed, int(hash_fraction(prompt) * 2**53)]).integers(2**31)),
                "n": 1,
            }
            for prompt in prompts
        ]
        return post_all(
            endpoint, bodies, http, at_once=at_once, read=lambda i, answer: _reply(answer, endpoint), key=API_KEY
        )

    return generate


def _reply(answer: Any, where: str) -> str:
    """The text of an answer's one choice; "" where the server says that it has none, as for a refusal."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content", 0) if isinstance(message, dict) else 0
    if content is None:
        return ""
    if not isinstance(content, str):
        raise RemoteError(f"{where} answered with no chat completion of one choice: {safe_text(repr(answer)[:120])}")
    return _HALF_PAIR.sub("\ufffd", content)
