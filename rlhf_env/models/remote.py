"""A language model behind an OpenAI-compatible server, for what needs its responses and nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from transformers import AutoTokenizer

from rlhf_env.errors import ConfigError, RemoteError
from rlhf_env.http import post_all
from rlhf_env.models.sampling import Samples
from rlhf_env.records.safe_text import safe_text
from rlhf_env.settings import ServerConfig
from rlhf_env.text.codec import Codec
from rlhf_env.types import Policy, SamplingLaw

_ZERO = -9999.0  # what vLLM says for the logarithm of 0; llama.cpp says less
_ROUNDING = 1e-3  # a probability of 1 may be said as a little more
_TOKEN_ID = "token_id:"


@dataclass(frozen=True)
class _Completion:
    """What a server wrote after one prompt."""

    ids: list[int]  # EOS included
    logp: list[float]  # of each, but for an EOS that the server left out
    text: str  # as the server reads the ids; "" where it says none


class RemoteLM:
    """The model `config.model` of the server at `url`, whose tokenizer is `tokenizer`: a `Responder`.

    Asked is `POST url/completions` alone, one prompt to a request, as token ids. The answer must hold token ids, since
    text can be tokenised in other ways than it was written: `token_ids` (vLLM, SGLang: "return_token_ids"), tokens
    such as "token_id:17" (vLLM: "return_tokens_as_token_ids") or `logprobs.content` with an `id` (llama.cpp).
    """

    context_length = None  # the server refuses what is too long for its model, and a response cut short is an error

    def __init__(self, url: str, tokenizer: Any, config: ServerConfig) -> None:
        if config.model is None:
            raise ConfigError(f"{url} needs server.model, the name under which the server knows the model")
        self.url, self.tokenizer, self.config = url.rstrip("/"), tokenizer, config

    @classmethod
    def connect(cls, url: str, config: ServerConfig) -> Self:
        """The model with the tokenizer that the settings name. Nothing is asked of the server yet."""
        if config.tokenizer is None:
            raise ConfigError(f"{url} needs server.tokenizer, the folder or hub name of the model's tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"cannot load a tokenizer from {config.tokenizer}: {reason}") from error
        return cls(url, tokenizer, config)

    def sample_responses(
        self,
        prompts: Sequence[Sequence[int]],
        law: SamplingLaw,
        *,
        max_new_tokens: int | Sequence[int],
        seeds: Sequence[Sequence[int]],
        num_rows: int = 32,
        greedy: bool = False,
        reference: Policy | None = None,
        stop: Callable[[Sequence[int], list[int]], bool] | None = None,
        progress: Callable[[int], None] | None = None,
        first: int = 0,
    ) -> Samples:
        """One response to each prompt, `num_rows` requests at a time; every `values` is 0.

        Response i is asked for with a seed made of `seeds[i]`; whether the server then repeats itself is its affair.
        What it writes after EOS, or after `stop` would have ended the response, is dropped: the tokens before are
        drawn by the same law. `logp` is what the server says, and 0 for an EOS that it leaves out; with a `reference`,
        to which it would be compared, such an EOS is an error, and so is a law that the server's log-probabilities are
        not of. Raises `ConfigError` for what a server cannot be asked for, `RemoteError` for an answer that is not one.
        """
        self._require_possible(law, exact=reference is not None, greedy=greedy)
        limits = np.broadcast_to(np.asarray(max_new_tokens), len(prompts)).tolist()
        bodies = [
            self._request(prompt, law, limit, seed, greedy)
            for prompt, limit, seed in zip(prompts, limits, seeds, strict=True)
        ]
        url = f"{self.url}/completions"

        def where(i: int) -> str:
            return f"{url}: the response to prompt {first + i}"

        written = post_all(
            url,
            bodies,
            self.config.http,
            at_once=num_rows,
            read=lambda i, answer: _read(
                answer, f"{url}: the response to prompt {first + i}", prompts[i], limits[i], law
            ),
            progress=progress,
        )
        self._require_own_text(prompts, written)

        total, most = len(prompts), max(limits)
        ids, logp = np.zeros((total, most), dtype=np.int64), np.zeros((total, most), dtype=np.float32)
        length, ended = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.bool_)
        for i, one in enumerate(written):
            kept, ended[i] = _until_end(one.ids, prompts[i], law, stop)
            known = min(kept, len(one.logp))
            if reference is not None and known < kept:
                raise RemoteError(
                    f"{where(i)} ended, but the server does not say the log-probability of EOS, without which there is "
                    "no KL to the reference"
                )
            ids[i, :kept], logp[i, :known], length[i] = one.ids[:kept], one.logp[:known], kept
        width = int(length.max())
        return Samples(
            response_ids=torch.from_numpy(ids[:, :width]),
            response_mask=torch.from_numpy(np.arange(width) < length[:, None]),
            logp=torch.from_numpy(logp[:, :width]),
            values=torch.zeros(total, width),
            ended=torch.from_numpy(ended),
            candidates=None,
        )

    def _require_possible(self, law: SamplingLaw, *, exact: bool, greedy: bool) -> None:
        """Refuse a law that no server follows, and where numbers must be `exact`, one that theirs are not of."""
        if law.truncates:
            raise ConfigError(
                "top_k and top_p are judged by the reference at each token, which a server cannot ask: leave them out"
            )
        if law.min_new_tokens or law.banned_tokens:
            raise ConfigError("min_new_tokens and banned_tokens are beyond what servers agree on: leave them out")
        if law.eos_token_id is None:
            raise ConfigError("a server ends at EOS, so stop_at_eos=False cannot be had of it")
        raw = self.config.logprobs == "raw"
        if exact and raw and law.temperature != 1:
            raise ConfigError(
                f"the server's log-probabilities are before the temperature (server.logprobs=raw), so at temperature "
                f"{law.temperature:g} there is no KL: use temperature 1, or serve those after it (vLLM: "
                "--logprobs-mode processed_logprobs) and say server.logprobs=processed"
            )
        if exact and greedy and not raw:
            raise ConfigError(
                "greedy, a server has no log-probabilities after the temperature: use server.logprobs=raw"
            )

    def _request(
        self, prompt: Sequence[int], law: SamplingLaw, limit: int, seed: Sequence[int], greedy: bool
    ) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "prompt": [int(token) for token in prompt],
            "max_tokens": limit,
            "temperature": 0.0 if greedy else law.temperature,
            "seed": int(np.random.default_rng(list(seed)).integers(2**31)),
            "n": 1,
            "logprobs": 1,  # llama.cpp takes 0 for none
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            # What is left out, a server takes from the model's generation_config, or from defaults of its own.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def _require_own_text(self, prompts: Sequence[Sequence[int]], written: Sequence[_Completion]) -> None:
        """Refuse token ids that mean other text to the server than to the tokenizer.

        Half a character, spaces and special tokens are shown differently here and there, so single texts may differ;
        where not one is the same, the vocabulary is another.
        """
        codec = Codec.of(self.tokenizer)
        pairs = [
            (one.text, codec.decode_response(prompt, one.ids))
            for prompt, one in zip(prompts, written, strict=True)
            if _letters(one.text)
        ]
        if pairs and not any(_letters(theirs) == _letters(ours) for theirs, ours in pairs):
            theirs, ours = (safe_text(text[:60]) for text in pairs[0])
            raise RemoteError(
                f'{self.url} has another vocabulary than {self.config.tokenizer or "the tokenizer"}: its "{theirs}" '
                f'reads "{ours}" here; server.tokenizer must be the one of {self.config.model}'
            )


def _until_end(
    tokens: Sequence[int],
    prompt: Sequence[int],
    law: SamplingLaw,
    stop: Callable[[Sequence[int], list[int]], bool] | None,
) -> tuple[int, bool]:
    """How many of the tokens are the response, and whether it ended other than by its limit."""
    for n, token in enumerate(tokens, start=1):
        if token == law.eos_token_id or (stop is not None and stop(prompt, list(tokens[:n]))):
            return n, True
    return len(tokens), False


def _letters(text: str) -> str:
    return "".join(c for c in text if not c.isspace() and c != "\ufffd")


def _read(answer: Any, where: str, prompt: Sequence[int], limit: int, law: SamplingLaw) -> _Completion:
    """What a server answered, checked; of an EOS that is added here there is no log-probability."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise RemoteError(f"{where} is no completion with one choice")
    choice = choices[0]
    ids, logp = _numbers(choice, where)
    if (theirs := choice.get("prompt_token_ids")) is not None and theirs != list(prompt):
        raise RemoteError(f"{where} is one to another prompt: the server read other token ids than it was sent")
    if outside := [token for token in ids if not 0 <= token < law.vocab_size]:
        raise RemoteError(
            f"{where} holds the token {str(outside[0])[:40]}, but the tokenizer has {law.vocab_size}: server.tokenizer "
            "must be that of the served model"
        )
    if len(logp) != len(ids):
        raise RemoteError(f"{where} has {len(ids)} tokens, but {len(logp)} log-probabilities")
    for number in logp:
        if isinstance(number, bool) or not isinstance(number, int | float) or not _ZERO < number < _ROUNDING:
            raise RemoteError(f"{where} has {safe_text(repr(number)[:40])} for the log-probability of a token it wrote")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise RemoteError(f"{where} was not finished: finish_reason is {safe_text(repr(reason)[:40])}")
    if reason == "stop" and law.eos_token_id not in ids:
        by = next((choice[key] for key in ("stop_reason", "matched_stop") if choice.get(key) is not None), None)
        if by not in (None, law.eos_token_id):
            raise RemoteError(
                f"{where} was ended by {safe_text(repr(by)[:40])}, not by the tokenizer's EOS, {law.eos_token_id}: let "
                "that be the only eos_token_id in the generation_config.json of the served model"
            )
        ids = [*ids, law.eos_token_id]  # some servers end without it
    if len(ids) > limit or (reason == "length" and len(ids) < limit):
        raise RemoteError(
            f"{where} has {len(ids)} tokens where {limit} were to be the most and finish_reason is {reason}: is the "
            "server's context too short?"
        )
    text = choice.get("text")
    return _Completion(ids, [float(number) for number in logp], text if isinstance(text, str) else "")


def _numbers(choice: dict[str, Any], where: str) -> tuple[list[int], list[Any]]:
    """Token ids, in whichever way the server says them, and what stands for their log-probabilities."""
    said = choice.get("logprobs")
    said = said if isinstance(said, dict) else {}
    content, tokens = said.get("content"), said.get("tokens")
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        ids: Any = [entry.get("id") for entry in content]
        logp: Any = [entry.get("logprob") for entry in content]
    else:
        ids, logp = choice.get("token_ids"), said.get("token_logprobs")
        if ids is None and isinstance(tokens, list):
            ids = [_token_id(token) for token in tokens]
    if not isinstance(ids, list) or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise RemoteError(
            f"{where} has no token ids, and its text may be tokenised in other ways than it was written: the server "
            'must know "return_token_ids" (vLLM from 0.10.2, SGLang) or "return_tokens_as_token_ids" (vLLM)'
        )
    if not isinstance(logp, list):
        raise RemoteError(f'{where} has no log-probabilities: the server must know "logprobs"')
    return ids, logp


def _token_id(token: Any) -> int | None:
    number = token.removeprefix(_TOKEN_ID) if isinstance(token, str) and token.startswith(_TOKEN_ID) else ""
    return int(number) if number.isascii() and number.isdigit() else None
