"""Sampling responses: cached decoding in rows that finish and restart on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.functional import gather_logp, inverse_cdf_sample
from rlhf_env.types import Policy, SamplingLaw


class _Model(Protocol):
    """A causal model: raw logits [B, keep, V] and values [B, keep] of the last `keep` columns."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        keep: int = 0,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class _Layer(Protocol):
    """One layer's part of a cache: keys and values [N, heads, columns, size]."""

    keys: Tensor
    values: Tensor


def _layers(cache: Cache) -> list[_Layer]:
    if not cache.layers or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ConfigError(
            "this model keeps something else than keys and values between tokens, so its rows cannot restart on their "
            "own: only attention models can be decoded"
        )
    return cast("list[_Layer]", cache.layers)


class CachedDecoder:
    """Key-value cached decoding of N rows, each of its own length and restartable while the others go on.

    All rows end at the same cache column; what differs is where each begins. A restarted row's prompt is prefilled
    apart and written to end at the present column, and columns that no row needs any more are dropped on the left, so
    the cache is never wider than its longest row.
    """

    def __init__(self, model: _Model, num_rows: int, law: SamplingLaw) -> None:
        self.model, self.law = model, law
        self.cache = DynamicCache()
        self.mask = torch.zeros(num_rows, 0, dtype=torch.bool, device=model.device)  # [N, columns]
        self.written = torch.zeros(num_rows, dtype=torch.int64, device=model.device)  # [N] response tokens so far
        self.log_probs = torch.full((num_rows, law.vocab_size), torch.nan, dtype=model.dtype, device=model.device)
        self.values = torch.zeros(num_rows, dtype=model.dtype, device=model.device)

    @torch.no_grad()
    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin new sequences in `rows`; their next-token distributions are there at once."""
        width = max(map(len, prompts))
        ids, mask = (
            torch.zeros(len(prompts), width, dtype=d, device=self.model.device) for d in (torch.int64, torch.bool)
        )
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[i, width - len(prompt) :] = True
        prefilled = DynamicCache()
        logits, values = self.model(ids, mask, keep=1, cache=prefilled)
        self._write(rows, prefilled, mask)
        index = torch.as_tensor(rows, device=self.model.device)
        self.written[index] = 0
        self._read(index, logits, values)

    @torch.no_grad()
    def append(self, tokens: NDArray[np.int64], rows: Sequence[int]) -> None:
        """Append `tokens[i]` to row `rows[i]`. Rows not named hold nothing until they are started again."""
        index = torch.as_tensor(rows, device=self.model.device)
        n = self.mask.shape[0]
        ids = torch.zeros(n, 1, dtype=torch.int64, device=self.model.device)
        ids[index, 0] = torch.as_tensor(tokens, device=self.model.device)
        idle = torch.ones(n, dtype=torch.bool, device=self.model.device)
        idle[index] = False
        self.mask[idle] = False  # an idle row sees only its own new column: finite, and never longer than one token
        self.mask = pad(self.mask, (0, 1), value=True)
        positions = self.mask.sum(1, keepdim=True) - 1
        logits, values = self.model(ids, self.mask, keep=1, cache=self.cache, position_ids=positions)
        self.written[index] += 1
        self._read(index, logits[index], values[index])
        self._trim()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows, renumbered 0, 1, …; the others are forgotten."""
        index = torch.as_tensor(rows, device=self.model.device)
        for layer in _layers(self.cache):
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        for name in ("mask", "written", "log_probs", "values"):
            setattr(self, name, getattr(self, name)[index])
        self._trim()

    def _read(self, index: Tensor, logits: Tensor, values: Tensor) -> None:
        self.log_probs[index] = self.law.log_probs(logits[:, -1], self.written[index])
        self.values[index] = values[:, -1]

    def _write(self, rows: Sequence[int], prefilled: DynamicCache, mask: Tensor) -> None:
        """Put freshly prefilled rows into the cache so that they end at its last column."""
        width = max(self.mask.shape[1], mask.shape[1])
        index = torch.as_tensor(rows, device=mask.device)
        for number, new in enumerate(_layers(prefilled)):
            keys, values = (pad(x, (0, 0, width - x.shape[2], 0)) for x in (new.keys, new.values))  # [n, H, width, D]
            if number == len(self.cache.layers):  # the first prompts this decoder sees
                n = self.mask.shape[0]
                self.cache.update(keys.new_zeros(n, *keys.shape[1:]), values.new_zeros(n, *values.shape[1:]), number)
            layer = _layers(self.cache)[number]
            grow = (0, 0, width - layer.keys.shape[2], 0)
            layer.keys, layer.values = pad(layer.keys, grow), pad(layer.values, grow)
            layer.keys[index], layer.values[index] = keys, values
        self.mask = pad(self.mask, (width - self.mask.shape[1], 0))
        self.mask[index] = pad(mask, (width - mask.shape[1], 0))
        self._trim()

    def _trim(self) -> None:
        """Drop the leading columns that no row uses."""
        first = int(self.mask.any(0).to(torch.uint8).argmax())
        if first:
            self.mask = self.mask[:, first:]
            for layer in _layers(self.cache):
                layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]


class FullContextDecoder:
    """The same without a cache: every step runs the whole context. Slower; the oracle for the cached one."""

    def __init__(self, model: _Model, num_rows: int, law: SamplingLaw) -> None:
        self.model, self.law = model, law
        self.contexts: list[list[int]] = [[] for _ in range(num_rows)]
        self.written = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
        self.log_probs = torch.full((num_rows, law.vocab_size), torch.nan, dtype=model.dtype, device=model.device)
        self.values = torch.zeros(num_rows, dtype=model.dtype, device=model.device)

    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin new sequences in `rows`."""
        for row, prompt in zip(rows, prompts, strict=True):
            self.contexts[row] = list(prompt)
            self.written[row] = 0
        self._read(rows)

    def append(self, tokens: NDArray[np.int64], rows: Sequence[int]) -> None:
        """Append `tokens[i]` to row `rows[i]`."""
        for row, token in zip(rows, tokens, strict=True):
            self.contexts[row].append(int(token))
            self.written[row] += 1
        self._read(rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows."""
        self.contexts = [self.contexts[row] for row in rows]
        self.written, self.log_probs, self.values = (x[list(rows)] for x in (self.written, self.log_probs, self.values))

    @torch.no_grad()
    def _read(self, rows: Sequence[int]) -> None:
        for row in rows:
            ids = torch.tensor([self.contexts[row]], device=self.model.device)
            logits, values = self.model(ids, torch.ones_like(ids, dtype=torch.bool), keep=1)
            self.log_probs[row] = self.law.log_probs(logits[0, -1], self.written[row])
            self.values[row] = values[0, -1]


@dataclass(frozen=True)
class Samples:
    """Sampled responses to a list of prompts, in the order of the prompts."""

    response_ids: Tensor  # int64 [B, T], right-padded with 0
    response_mask: Tensor  # bool [B, T]
    logp: Tensor  # float [B, T] of each sampled token under the policy and the law
    values: Tensor  # float [B, T] of the state before each token
    ended: Tensor  # bool [B], True = by EOS or a stop string, False = by the length limit


@torch.no_grad()
def sample_responses(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    law: SamplingLaw,
    *,
    max_new_tokens: int,
    seeds: Sequence[Sequence[int]],
    num_rows: int = 32,
    greedy: bool = False,
    stop: Callable[[Sequence[int], list[int]], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """One response to each prompt, decoded `num_rows` at a time; a finished row is refilled with the next prompt.

    All prompts are answered, so no response is favoured for being short. Response i depends only on its prompt and on
    `seeds[i]` (any sequence of integers), not on `num_rows` or its neighbours. `stop(prompt, response)` may end a
    response on the token ids so far, EOS and length aside; `progress` is told how many more are finished. Raises
    `NonFiniteError` naming the prompt whose distribution broke.
    """
    total = len(prompts)
    uniform = np.stack(
        [np.random.default_rng(list(s)).random(max_new_tokens, dtype=np.float32) for s in seeds]
    )  # [B, T]
    ids = np.zeros((total, max_new_tokens), dtype=np.int64)
    logp, values = (np.zeros((total, max_new_tokens)) for _ in range(2))
    length, ended = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.bool_)

    owner = np.arange(min(num_rows, total))  # [rows] the prompt that each row is answering
    waiting = len(owner)
    decoder = policy.decoder(len(owner), law)
    decoder.start(range(len(owner)), [prompts[i] for i in owner.tolist()])
    while True:
        log_probs, t = decoder.log_probs, length[owner]
        if greedy:
            tokens = log_probs.argmax(-1)
        else:
            tokens = inverse_cdf_sample(log_probs, torch.as_tensor(uniform[owner, t], device=log_probs.device))
        chosen = gather_logp(log_probs, tokens).cpu().numpy()
        if not np.isfinite(chosen).all():
            row = int(np.flatnonzero(~np.isfinite(chosen))[0])
            raise NonFiniteError(
                f"the policy's log-probabilities are not finite for prompt {owner[row]} at response token {t[row]}: "
                "its weights hold NaN or infinity, or its logits overflow"
            )
        drawn = tokens.cpu().numpy()
        ids[owner, t], logp[owner, t], values[owner, t] = drawn, chosen, decoder.values.cpu().numpy()
        length[owner] += 1
        ended[owner] = drawn == law.eos_token_id if law.eos_token_id is not None else False
        if stop is not None:
            for i in owner[~ended[owner]].tolist():
                ended[i] = stop(prompts[i], ids[i, : length[i]].tolist())
        done = ended[owner] | (length[owner] == max_new_tokens)

        if progress is not None and done.any():
            progress(int(done.sum()))
        refill = np.flatnonzero(done)[: total - waiting]
        going = np.flatnonzero(~done)
        if len(going) + len(refill) == 0:
            break
        if len(going):
            decoder.append(drawn[going], going.tolist())
        if len(refill):
            owner[refill] = np.arange(waiting, waiting + len(refill))
            waiting += len(refill)
            decoder.start(refill.tolist(), [prompts[i] for i in owner[refill].tolist()])
        alive = np.sort(np.concatenate([going, refill]))
        if len(alive) < len(owner):
            decoder.keep(alive.tolist())
            owner = owner[alive]

    width = int(length.max())
    dtype = decoder.log_probs.dtype
    return Samples(
        response_ids=torch.from_numpy(ids[:, :width]),
        response_mask=torch.from_numpy(np.arange(width) < length[:, None]),
        logp=torch.from_numpy(logp[:, :width]).to(dtype),
        values=torch.from_numpy(values[:, :width]).to(dtype),
        ended=torch.from_numpy(ended),
    )
