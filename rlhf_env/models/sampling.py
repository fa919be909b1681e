"""Sampling responses to a list of prompts: finished rows make room for the next prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rlhf_env.errors import NonFiniteError
from rlhf_env.functional import gather_logp, inverse_cdf_sample
from rlhf_env.models.truncation import TruncatedDecoder
from rlhf_env.types import Decoder, Policy, SamplingLaw

# An eighth of the rows must be idle before they are refilled or dropped: that costs nearly as much for one as for four.
_PART = 8


@dataclass(frozen=True)
class Samples:
    """Sampled responses to a list of prompts, in the order of the prompts."""

    response_ids: Tensor  # int64 [B, T], right-padded with 0
    response_mask: Tensor  # bool [B, T]
    logp: Tensor  # float [B, T] of each sampled token under the policy and the law
    values: Tensor  # float [B, T] of the state before each token
    ended: Tensor  # bool [B], True = by EOS or a stop string, False = by a limit
    candidates: Tensor | None  # int64 [B, T, K], −1 = none: what could be written, where the law truncates


@runtime_checkable
class Responder(Protocol):
    """A policy of which only whole responses can be had: no weights, and no distribution of the next token."""

    @property
    def tokenizer(self) -> Any:
        """What its token ids mean."""
        ...

    @property
    def context_length(self) -> int | None:
        """The most tokens that prompt and response may have together, where that is known."""
        ...

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
        """One response to each prompt, as the function `sample_responses` gives them.

        Where there is a `reference`, the log-probabilities will be compared with its own: they must be the law's.
        """
        ...


@torch.no_grad()
def sample_responses(
    policy: Policy,
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
    """One response to each prompt, decoded `num_rows` at a time; a finished row is refilled with the next prompt.

    All prompts are answered, so no response is favoured for being short. Response i depends only on its prompt and on
    `seeds[i]` (any sequence of integers), not on `num_rows` or its neighbours. `max_new_tokens` is one number, or one
    for each prompt. Where the law truncates, `reference` says what may be written. `stop(prompt, response)` may end a
    response on the token ids so far, EOS and length aside; `progress` is told how many more are finished. Raises
    `NonFiniteError` naming the prompt whose distribution broke, where `first` is the number of the first.
    """
    total, limit = len(prompts), np.broadcast_to(np.asarray(max_new_tokens), len(prompts))
    most = int(limit.max())
    uniform = np.stack([np.random.default_rng(list(s)).random(most, dtype=np.float32) for s in seeds])  # [B, T]
    ids = np.zeros((total, most), dtype=np.int64)
    logp, values = (np.zeros((total, most)) for _ in range(2))
    length, ended = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.bool_)

    owner = np.arange(min(num_rows, total))  # [rows] the prompt that each row is answering, or has answered
    going = owner.copy()  # the rows whose response is unfinished
    waiting = len(owner)
    decoder: Decoder = policy.decoder(len(owner), law)
    truncated: TruncatedDecoder | None = None
    if law.truncates:
        assert reference is not None, "top-k and top-p are judged by the reference"
        decoder = truncated = TruncatedDecoder(decoder, reference.decoder(len(owner), law), law)
        candidates = np.full(
            (total, most, 1), -1
        )  # as wide as the widest set so far: top-p alone rarely needs all of V
    decoder.start(range(len(owner)), [prompts[i] for i in owner.tolist()])
    while len(going):
        now = owner[going]
        rows, t = slice(None), length[now]  # without a copy where no row is idle
        if len(going) < len(owner):
            rows = torch.as_tensor(going, device=decoder.log_probs.device)
        log_probs = decoder.log_probs[rows]
        if truncated is not None:
            left = truncated.candidates[rows]
            left = left[:, : int((left >= 0).sum(-1).max())].cpu().numpy()
            if (more := left.shape[1] - candidates.shape[2]) > 0:
                candidates = np.pad(candidates, ((0, 0), (0, 0), (0, more)), constant_values=-1)
            candidates[now, t, : left.shape[1]] = left
        if greedy:
            tokens = log_probs.argmax(-1)
        else:
            tokens = inverse_cdf_sample(log_probs, torch.as_tensor(uniform[now, t], device=log_probs.device))
        chosen = gather_logp(log_probs, tokens).cpu().numpy()
        if not np.isfinite(chosen).all():
            row = int(np.flatnonzero(~np.isfinite(chosen))[0])
            raise NonFiniteError(
                f"the {'policy or reference' if law.truncates else 'policy'}'s log-probabilities are not finite for "
                f"prompt {first + now[row]} at response token {t[row]}: its weights hold NaN or infinity, or its "
                "logits overflow"
            )
        drawn = tokens.cpu().numpy()
        ids[now, t], logp[now, t], values[now, t] = drawn, chosen, decoder.values[rows].cpu().numpy()
        length[now] += 1
        ended[now] = drawn == law.eos_token_id if law.eos_token_id is not None else False
        if stop is not None:
            for i in now[~ended[now]].tolist():
                ended[i] = stop(prompts[i], ids[i, : length[i]].tolist())
        done = ended[now] | (length[now] == limit[now])
        if progress is not None and done.any():
            progress(int(done.sum()))

        going = going[~done]
        if len(going):
            decoder.append(drawn[~done], going.tolist())
        idle = np.setdiff1d(np.arange(len(owner)), going)
        few = len(idle) < len(owner) / _PART and len(going) > 0
        if waiting < total and not few:
            refill = idle[: total - waiting]
            owner[refill] = np.arange(waiting, waiting + len(refill))
            waiting += len(refill)
            decoder.start(refill.tolist(), [prompts[i] for i in owner[refill].tolist()])
            going = np.sort(np.concatenate([going, refill]))
        elif waiting == total and len(going) and not few:
            decoder.keep(going.tolist())
            owner, going = owner[going], np.arange(len(going))

    width = int(length.max())
    dtype = decoder.log_probs.dtype
    return Samples(
        response_ids=torch.from_numpy(ids[:, :width]),
        response_mask=torch.from_numpy(np.arange(width) < length[:, None]),
        logp=torch.from_numpy(logp[:, :width]).to(dtype),
        values=torch.from_numpy(values[:, :width]).to(dtype),
        ended=torch.from_numpy(ended),
        candidates=torch.from_numpy(candidates[:, :width]) if law.truncates else None,
    )
