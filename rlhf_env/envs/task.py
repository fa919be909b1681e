"""What is to be written, when it ends, and what it is worth: the law of the token MDP, apart from any state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.beta import AdaptiveBeta, BetaController
from rlhf_env.envs.rewards import ScoreFn as ScoreFn
from rlhf_env.envs.rewards import judge, scores_tokens, token_scores_of
from rlhf_env.errors import ConfigError, EmptyPromptError, PromptTooLongError, TokenizerError
from rlhf_env.text.codec import Codec
from rlhf_env.text.corpus import BUILT_IN_REVIEWS
from rlhf_env.text.prompts import load_prompts, prompt_indices, split_by_hash
from rlhf_env.types import Policy, ProcessRewardModel, RewardModel, SamplingLaw

KLMode = Literal["reward", "reference", "observe", "off"]
KLPlacement = Literal["token", "terminal"]
LengthLimit = Literal["terminate", "truncate"]
ReferenceBackend = Literal["auto", "cached", "full", "deferred"]
ActionKind = Literal["token", "candidate"]
Split = Literal["all", "train", "eval"]
StopReason = Literal["eos", "stop_string", "length", "context"]
PromptFn = Callable[[np.random.Generator], str]

_PROMPT_STREAM = 3  # keeps the random numbers of a prompt function apart from the others of the same seed


@dataclass(frozen=True)
class TextTask:
    """The token MDP's law. `make_task` builds one from the keywords that the environments take."""

    prompts: tuple[str, ...]  # empty where a function makes them
    prompt_ids: tuple[tuple[int, ...], ...]
    prompt_function: PromptFn | None
    group_size: int
    codec: Codec
    reward_model: RewardModel | ProcessRewardModel | ScoreFn
    reference: Policy | None
    reference_backend: ReferenceBackend
    law: SamplingLaw
    action: ActionKind
    max_prompt_tokens: int
    max_new_tokens: int
    context_length: int | None
    stop_strings: tuple[str, ...]
    missing_eos_penalty: float
    length_penalty: float
    length_limit: LengthLimit
    kl_mode: KLMode
    kl_placement: KLPlacement

    @property
    def observation_length(self) -> int:
        """L, the fixed length of the observation's arrays."""
        both = self.max_prompt_tokens + self.max_new_tokens
        return both if self.context_length is None else min(both, self.context_length)

    @property
    def uses_reference(self) -> bool:
        """Whether anything asks for log ref."""
        return self.reference is not None and (self.kl_mode != "off" or self.law.truncates)

    @property
    def defers(self) -> bool:
        """Whether log ref of a response is computed in one pass once it is finished."""
        return self.uses_reference and self.reference_backend == "deferred"

    # --- prompts ----------------------------------------------------------------------------------

    def encode_prompt(self, prompt: str, *, where: str = "prompt") -> tuple[int, ...]:
        """Token ids of one prompt; raises where it is empty or longer than the observation has room for."""
        ids = _encode(self.codec, prompt, where)
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"{where} has {len(ids)} tokens, but max_prompt_tokens is {self.max_prompt_tokens}: shorten it, or "
                f"raise max_prompt_tokens"
            )
        _require_room(where, len(ids), self.context_length)
        return ids

    def draw_prompt(self, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
        """A prompt drawn with `rng`, and its token ids."""
        if self.prompt_function is None:
            row = int(rng.integers(len(self.prompts)))
            return self.prompts[row], self.prompt_ids[row]
        prompt = self.prompt_function(rng)
        return prompt, self.encode_prompt(prompt, where="the prompt that the prompts function returned")

    def prompts_at(
        self, seed: int, start: int, count: int, group_size: int = 1
    ) -> tuple[list[str], list[tuple[int, ...]]]:
        """The prompts at positions start … start + count − 1 of an endless sequence, and their token ids.

        A list is shuffled anew in each epoch; a function gets a generator made of (seed, position). Each prompt
        stands `group_size` times in a row. Position is all that a resumed run needs.
        """
        first, last = start // group_size, -(-(start + count) // group_size)
        if self.prompt_function is None:
            rows = prompt_indices(seed, first, last - first, len(self.prompts)).tolist()
            drawn = [(self.prompts[row], self.prompt_ids[row]) for row in rows]
        else:
            generators = (np.random.default_rng([seed, at, _PROMPT_STREAM]) for at in range(first, last))
            drawn = [self.draw_prompt(rng) for rng in generators]
        repeated = [drawn[(start + i) // group_size - first] for i in range(count)]
        return [prompt for prompt, _ in repeated], [ids for _, ids in repeated]

    # --- the end ----------------------------------------------------------------------------------

    def longest(self, prompt_length: int) -> int:
        """The most tokens that a response to a prompt of this many may have."""
        if self.context_length is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self.context_length - prompt_length)

    def stop_reason(self, prompt: Sequence[int], response: Sequence[int]) -> StopReason | None:
        """Why a response of these token ids to this prompt is over, or None while it is not."""
        if response[-1] == self.law.eos_token_id:
            return "eos"
        if self.stop_strings and self.says_stop(prompt, response):
            return "stop_string"
        if len(response) < self.longest(len(prompt)):
            return None
        return "length" if len(response) >= self.max_new_tokens else "context"

    def says_stop(self, prompt: Sequence[int], response: Sequence[int]) -> bool:
        """Whether the response's text so far holds a stop string, wherever its token borders fall."""
        text = self.codec.decode_response(prompt, response)
        return any(stop in text for stop in self.stop_strings)

    # --- what it is worth ---------------------------------------------------------------------------

    @property
    def scores_tokens(self) -> bool:
        """Whether the reward model says something of every token (a process reward)."""
        return scores_tokens(self.reward_model)

    def score(
        self, prompts: Sequence[str], prompt_ids: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """The reward model's scores [B] of whole responses, given as token ids, and the named parts of them, [B] each.

        Checked and finite; 0 of a model that scores nothing but tokens.
        """
        return judge(self.reward_model, prompts, prompt_ids, responses, self.codec)

    def token_scores(
        self, prompts: Sequence[str], prompt_ids: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float64]]:
        """What a process reward model says of each token of each finished response, [T_i] each."""
        pieces = [
            self.codec.pieces([*prompt, *response])[len(prompt) :]
            for prompt, response in zip(prompt_ids, responses, strict=True)
        ]
        return token_scores_of(self.reward_model, prompts, pieces)

    def penalties(self, ended: NDArray[np.bool_], lengths: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """What is subtracted from each score, by name, [B] each.

        `missing_eos_penalty` where a limit ended the response, and `length_penalty` for each of its tokens.
        """
        parts = {
            "missing_eos_penalty": np.where(ended, 0.0, self.missing_eos_penalty),
            "length_penalty": self.length_penalty * lengths.astype(np.float64),
        }
        return {name: values for name, values in parts.items() if getattr(self, name)}


def make_task(
    *,
    prompts: Sequence[str] | str | Path | PromptFn,
    tokenizer: Any,
    reward_model: RewardModel | ProcessRewardModel | ScoreFn,
    reference: Policy | None = None,
    beta: float | BetaController = 0.05,
    max_new_tokens: int = 48,
    max_prompt_tokens: int | None = None,
    context_length: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    banned_tokens: Sequence[int] = (),
    stop_at_eos: bool = True,
    stop_strings: Sequence[str] = (),
    missing_eos_penalty: float = 0.0,
    length_penalty: float = 0.0,
    length_limit: LengthLimit = "terminate",
    kl_mode: KLMode = "reward",
    kl_placement: KLPlacement = "token",
    reference_backend: ReferenceBackend = "auto",
    action: ActionKind = "token",
    group_size: int = 1,
    split: Split = "all",
    eval_share: float = 0.1,
    chat_template: str | None = "auto",
) -> tuple[TextTask, float | BetaController]:
    """Check the environment's keywords and turn them into a law and a β.

    - `prompts`: texts, a file of them (.txt, .jsonl), "hf:NAME", or a function of a `np.random.Generator` (which needs
      `max_prompt_tokens`). `split` keeps the "train" or the "eval" side of texts, `eval_share` of all, by their hash.
      Each prompt drawn serves `group_size` episodes in a row.
    - `tokenizer` is any Hugging Face tokenizer, `reward_model` any callable of (prompts, responses), `reference` any
      policy (`policy.frozen_copy()`).
    - `temperature`, `min_new_tokens` and `banned_tokens` shape the policy's and the reference's distributions alike.
      `top_k` and `top_p` leave of both what is likeliest under the reference. With `action="candidate"` an action is a
      rank among these `top_k` tokens, `Discrete(top_k)`, instead of a token id.
    - A response ends at EOS (unless `stop_at_eos=False`), once its text holds one of `stop_strings`, after
      `max_new_tokens`, or where prompt and response fill `context_length`. The last two cost `missing_eos_penalty`;
      every token costs `length_penalty`.
    - Prompts go through the tokenizer's chat template where it has one (`chat_template`: "auto", "none" or Jinja).
    - What `kl_mode`, `kl_placement`, `length_limit` and `reference_backend` mean is in the documentation's page on
      the MDP.
    """
    for name, value, choices in (
        ("kl_mode", kl_mode, KLMode),
        ("kl_placement", kl_placement, KLPlacement),
        ("length_limit", length_limit, LengthLimit),
        ("reference_backend", reference_backend, ReferenceBackend),
        ("action", action, ActionKind),
        ("split", split, Split),
    ):
        if value not in get_args(choices):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
    if max_new_tokens < (2 if length_limit == "truncate" else 1):
        raise ConfigError(f"max_new_tokens={max_new_tokens} is too small for length_limit={length_limit!r}")
    if min_new_tokens > max_new_tokens:
        raise ConfigError(f"min_new_tokens={min_new_tokens} is more than max_new_tokens={max_new_tokens} allows")
    if group_size < 1:
        raise ConfigError(f"group_size must be at least 1, got {group_size}")
    if isinstance(stop_strings, str) or "" in stop_strings:
        raise ConfigError(f"stop_strings must be a sequence of texts that are not empty, got {stop_strings!r}")
    for name, number in (
        ("beta", beta),
        ("missing_eos_penalty", missing_eos_penalty),
        ("length_penalty", length_penalty),
    ):
        if not hasattr(number, "observe") and not 0 <= number < np.inf:  # type: ignore[operator]
            raise ConfigError(f"{name} must be a finite number of at least 0, got {number}")
    _check_reference(reference, reference_backend, beta, kl_mode, kl_placement, top_k > 0 or top_p < 1)
    if action == "candidate" and (top_k < 1 or top_p < 1):
        raise ConfigError("action='candidate' needs top_k, the number of candidates, and no top_p")

    codec = tokenizer if isinstance(tokenizer, Codec) else Codec(tokenizer, chat_template=chat_template)
    eos = codec.require_eos() if stop_at_eos else None
    theirs = getattr(reference, "tokenizer", codec.tokenizer)
    if theirs is not codec.tokenizer and Codec.of(theirs).fingerprint != codec.fingerprint:
        raise TokenizerError(
            "the reference has another vocabulary than the environment's tokenizer: KL between them means nothing"
        )
    law = SamplingLaw(codec.vocab_size, eos, temperature, min_new_tokens, tuple(banned_tokens), top_k, top_p)
    if action == "candidate" and (most := int(law.allowed(np.zeros(1, np.int64)).sum())) < top_k:
        raise ConfigError(f"top_k={top_k} candidates, but the law allows only {most} tokens")

    texts, function, name = _read_prompts(prompts, split, eval_share)
    ids = tuple(_encode(codec, prompt, f"{name} {row}") for row, prompt in enumerate(texts))
    longest = max(range(len(ids)), key=lambda row: len(ids[row]), default=None)
    if longest is None:
        if max_prompt_tokens is None:
            raise ConfigError("prompts that a function makes need max_prompt_tokens, the room for the longest")
    elif max_prompt_tokens is None:
        max_prompt_tokens = len(ids[longest])
    elif len(ids[longest]) > max_prompt_tokens:
        raise PromptTooLongError(
            f"{name} {longest} has {len(ids[longest])} tokens, but max_prompt_tokens is {max_prompt_tokens}"
        )
    who = "" if longest is None else f"{name} {longest} has {len(ids[longest])} tokens; "
    _check_context(reference, context_length, max_prompt_tokens, max_new_tokens, who)
    if longest is not None:
        _require_room(f"{name} {longest}", len(ids[longest]), context_length)
    task = TextTask(
        prompts=texts,
        prompt_ids=ids,
        prompt_function=function,
        group_size=group_size,
        codec=codec,
        reward_model=reward_model,
        reference=reference,
        reference_backend=reference_backend,
        law=law,
        action=action,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        context_length=context_length,
        stop_strings=tuple(stop_strings),
        missing_eos_penalty=missing_eos_penalty,
        length_penalty=length_penalty,
        length_limit=length_limit,
        kl_mode=kl_mode,
        kl_placement=kl_placement,
    )
    return task, beta


def _check_reference(
    reference: Policy | None,
    backend: str,
    beta: float | BetaController,
    kl_mode: str,
    kl_placement: str,
    truncates: bool,
) -> None:
    charged = hasattr(beta, "observe") or beta != 0
    if charged and kl_mode in ("reward", "reference") and reference is None:
        raise ConfigError(
            "beta is not 0 but there is no reference to measure KL to: pass reference=policy.frozen_copy(), or beta=0"
        )
    if isinstance(beta, AdaptiveBeta) and kl_mode in ("reference", "off"):
        raise ConfigError(f"AdaptiveBeta follows the KL, which kl_mode={kl_mode!r} does not know: give a number")
    if kl_mode == "reference" and (kl_placement == "terminal" or backend == "deferred"):
        raise ConfigError(
            "kl_mode='reference' pays β·ref_logp at each token: kl_placement must be 'token', and reference_backend "
            "another than 'deferred'"
        )
    if truncates and reference is None:
        raise ConfigError("top_k and top_p leave what is likeliest under the reference: pass one")
    if truncates and backend == "deferred":
        raise ConfigError("top_k and top_p need the reference at every token: reference_backend cannot be 'deferred'")
    if reference is not None and backend in ("cached", "full"):
        if "backend" not in inspect.signature(reference.decoder).parameters:
            raise ConfigError(
                f"{type(reference).__name__} has one decoder of its own: leave reference_backend at 'auto'"
            )


def _check_context(
    reference: Policy | None, context_length: int | None, max_prompt_tokens: int, max_new_tokens: int, who: str
) -> None:
    """Raise where prompt and response may outgrow the reference; `who` says which prompt is longest."""
    limit = getattr(reference, "context_length", None)
    if context_length is not None:
        if limit is not None and context_length > limit:
            raise ConfigError(f"context_length={context_length} is more than the model's context of {limit}")
    elif limit is not None and max_prompt_tokens + max_new_tokens > limit:
        raise PromptTooLongError(
            f"{who}max_prompt_tokens={max_prompt_tokens} and max_new_tokens={max_new_tokens} together exceed the "
            f"model's context of {limit}: shorten the prompts, lower max_new_tokens, or let responses end where the "
            f"context does, with context_length={limit}"
        )


def _require_room(where: str, prompt_length: int, context_length: int | None) -> None:
    if context_length is not None and prompt_length >= context_length:
        raise PromptTooLongError(
            f"{where} has {prompt_length} tokens, which leaves a response no room in context_length={context_length}"
        )


def _read_prompts(
    prompts: Sequence[str] | str | Path | PromptFn, split: str, eval_share: float
) -> tuple[tuple[str, ...], PromptFn | None, str]:
    """The texts, or the function that makes them; and what to call one in messages."""
    if callable(prompts):
        if split != "all":
            raise ConfigError("split divides a list of prompts; what a function makes has no sides")
        return (), prompts, "prompt"
    name = "prompt"
    if isinstance(prompts, (str, Path)):
        source = str(prompts)
        if not (source == BUILT_IN_REVIEWS or source.startswith("hf:") or source.endswith((".txt", ".jsonl"))):
            raise ConfigError(
                "prompts must be a sequence of texts, a function, or one of 'FILE.txt', 'FILE.jsonl', 'hf:NAME'; not "
                f"one string: {source[:60]!r}"
            )
        prompts, name = load_prompts(source), f"{source}: prompt"
    if len(prompts) == 0:
        raise ConfigError("there are no prompts")
    if split != "all":
        for row, prompt in enumerate(prompts):
            _require_text(prompt, f"{name} {row}")
        total = len(prompts)
        prompts = split_by_hash(prompts, eval_share)[split == "eval"]
        if not prompts:
            raise ConfigError(f"none of the {total} prompts falls on the {split} side: change eval_share={eval_share}")
        name = f"{split} {name}"
    return tuple(prompts), None, name


def _require_text(prompt: Any, where: str) -> None:
    if not isinstance(prompt, str):
        raise ConfigError(f"{where} must be a text, got {type(prompt).__name__}")


def _encode(codec: Codec, prompt: str, where: str) -> tuple[int, ...]:
    _require_text(prompt, where)
    try:
        return tuple(codec.encode_prompt(prompt))
    except EmptyPromptError as error:
        raise EmptyPromptError(f"{where}: {error}") from None
