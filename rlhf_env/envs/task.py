"""What is to be written, when it ends, and what it is worth: the law of the token MDP, apart from any state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.beta import AdaptiveBeta
from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import ConfigError, EmptyPromptError, PromptTooLongError, TokenizerError
from rlhf_env.text.codec import Codec
from rlhf_env.types import Policy, RewardModel, SamplingLaw

KLMode = Literal["reward", "reference", "observe", "off"]
StopReason = Literal["eos", "stop_string", "length"]
ScoreFn = Callable[[list[str], list[str]], Any]


@dataclass(frozen=True)
class TextTask:
    """The token MDP's law. `make_task` builds one from the keywords that the environments take."""

    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    codec: Codec
    reward_model: RewardModel | ScoreFn
    reference: Policy | None
    law: SamplingLaw
    max_prompt_tokens: int
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    missing_eos_penalty: float
    length_limit: Literal["terminate", "truncate"]
    kl_mode: KLMode
    kl_placement: Literal["token", "terminal"]

    @property
    def observation_length(self) -> int:
        """L, the fixed length of the observation's arrays."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def uses_reference(self) -> bool:
        """Whether anything asks for log ref."""
        return self.kl_mode != "off" and self.reference is not None

    def encode_prompt(self, prompt: str, *, where: str = "prompt") -> tuple[int, ...]:
        """Token ids of one prompt; raises where it is empty or longer than the observation has room for."""
        ids = _encode(self.codec, prompt, where)
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"{where} has {len(ids)} tokens, but max_prompt_tokens is {self.max_prompt_tokens}: shorten it, or "
                f"raise max_prompt_tokens"
            )
        return ids

    def stop_reason(self, prompt: Sequence[int], response: Sequence[int]) -> StopReason | None:
        """Why a response of these token ids to this prompt is over, or None while it is not."""
        if response[-1] == self.law.eos_token_id:
            return "eos"
        if self.stop_strings and self.says_stop(prompt, response):
            return "stop_string"
        return "length" if len(response) >= self.max_new_tokens else None

    def says_stop(self, prompt: Sequence[int], response: Sequence[int]) -> bool:
        """Whether the response's text so far holds a stop string, wherever its token borders fall."""
        text = self.codec.decode_response(prompt, response)
        return any(stop in text for stop in self.stop_strings)

    def score(
        self, prompts: Sequence[str], prompt_ids: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> NDArray[np.float64]:
        """The reward model's scores [B] of whole responses, given as token ids; checked and finite."""
        texts = self.codec.decode_responses(prompt_ids, responses)
        return scores_of(self.reward_model, list(prompts), texts)

    def penalties(self, ended: NDArray[np.bool_]) -> NDArray[np.float64]:
        """What is subtracted from each score [B]: the missing-EOS penalty where the length limit ended the response."""
        return np.where(ended, 0.0, self.missing_eos_penalty)


def make_task(
    *,
    prompts: Sequence[str],
    tokenizer: Any,
    reward_model: RewardModel | ScoreFn,
    reference: Policy | None = None,
    beta: float | AdaptiveBeta = 0.05,
    max_new_tokens: int = 48,
    max_prompt_tokens: int | None = None,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
    banned_tokens: Sequence[int] = (),
    stop_at_eos: bool = True,
    stop_strings: Sequence[str] = (),
    missing_eos_penalty: float = 0.0,
    length_limit: Literal["terminate", "truncate"] = "terminate",
    kl_mode: KLMode = "reward",
    kl_placement: Literal["token", "terminal"] = "token",
    chat_template: str | None = "auto",
) -> tuple[TextTask, float | AdaptiveBeta]:
    """Check the environment's keywords and turn them into a law and a β.

    `prompts` are texts, `tokenizer` any Hugging Face tokenizer, `reward_model` any callable of (prompts, responses),
    `reference` any policy (`policy.frozen_copy()`). `temperature`, `min_new_tokens` and `banned_tokens` shape the
    policy's and the reference's distributions alike. A response ends at EOS (unless `stop_at_eos=False`), once its
    text holds one of `stop_strings`, or after `max_new_tokens`, which costs `missing_eos_penalty`. Prompts go through
    the tokenizer's chat template where it has one (`chat_template`: "auto", "none" or a Jinja template). What
    `kl_mode`, `kl_placement` and `length_limit` mean is in the documentation's page on the MDP.
    """
    for name, value, choices in (
        ("kl_mode", kl_mode, ("reward", "reference", "observe", "off")),
        ("kl_placement", kl_placement, ("token", "terminal")),
        ("length_limit", length_limit, ("terminate", "truncate")),
    ):
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if max_new_tokens < (2 if length_limit == "truncate" else 1):
        raise ConfigError(f"max_new_tokens={max_new_tokens} is too small for length_limit={length_limit!r}")
    if isinstance(prompts, str):
        raise ConfigError("prompts must be a sequence of texts, not one string")
    if len(prompts) == 0:
        raise ConfigError("there are no prompts")
    if min_new_tokens > max_new_tokens:
        raise ConfigError(f"min_new_tokens={min_new_tokens} is more than max_new_tokens={max_new_tokens} allows")
    if isinstance(stop_strings, str) or "" in stop_strings:
        raise ConfigError(f"stop_strings must be a sequence of texts that are not empty, got {stop_strings!r}")
    for name, value in (("beta", beta), ("missing_eos_penalty", missing_eos_penalty)):
        if not isinstance(value, AdaptiveBeta) and not 0 <= value < np.inf:
            raise ConfigError(f"{name} must be a finite number of at least 0, got {value}")
    charged = isinstance(beta, AdaptiveBeta) or beta != 0
    if charged and kl_mode in ("reward", "reference") and reference is None:
        raise ConfigError(
            "beta is not 0 but there is no reference to measure KL to: pass reference=policy.frozen_copy(), or beta=0"
        )
    if kl_mode == "reference" and kl_placement == "terminal":
        raise ConfigError("kl_mode='reference' pays β·ref_logp at each token: kl_placement must be 'token'")

    codec = tokenizer if isinstance(tokenizer, Codec) else Codec(tokenizer, chat_template=chat_template)
    eos = codec.require_eos() if stop_at_eos else None
    theirs = getattr(reference, "tokenizer", codec.tokenizer)
    if theirs is not codec.tokenizer and Codec.of(theirs).fingerprint != codec.fingerprint:
        raise TokenizerError(
            "the reference has another vocabulary than the environment's tokenizer: KL between them means nothing"
        )
    law = SamplingLaw(codec.vocab_size, eos, temperature, min_new_tokens, tuple(banned_tokens))
    ids = tuple(_encode(codec, prompt, f"prompt {row}") for row, prompt in enumerate(prompts))
    longest = max(range(len(ids)), key=lambda row: len(ids[row]))
    if max_prompt_tokens is None:
        max_prompt_tokens = len(ids[longest])
    elif len(ids[longest]) > max_prompt_tokens:
        raise PromptTooLongError(
            f"prompt {longest} has {len(ids[longest])} tokens, but max_prompt_tokens is {max_prompt_tokens}"
        )
    context = getattr(reference, "context_length", None)
    if context is not None and max_prompt_tokens + max_new_tokens > context:
        raise PromptTooLongError(
            f"prompt {longest} has {len(ids[longest])} tokens; max_prompt_tokens={max_prompt_tokens} and "
            f"max_new_tokens={max_new_tokens} together exceed the model's context of {context}: shorten the prompts or "
            "lower max_new_tokens"
        )
    task = TextTask(
        prompts=tuple(prompts),
        prompt_ids=ids,
        codec=codec,
        reward_model=reward_model,
        reference=reference,
        law=law,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        stop_strings=tuple(stop_strings),
        missing_eos_penalty=missing_eos_penalty,
        length_limit=length_limit,
        kl_mode=kl_mode,
        kl_placement=kl_placement,
    )
    return task, beta


def _encode(codec: Codec, prompt: str, where: str) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        raise ConfigError(f"{where} must be a text, got {type(prompt).__name__}")
    try:
        return tuple(codec.encode_prompt(prompt))
    except EmptyPromptError as error:
        raise EmptyPromptError(f"{where}: {error}") from None
