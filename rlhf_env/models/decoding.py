"""Next-token distributions in rows that grow, finish and restart on their own: with a key-value cache, or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_env.types import SamplingLaw


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


def keeps_only_keys_and_values(model: nn.Module) -> bool:
    """Whether all that a Hugging Face model remembers of earlier tokens is one key and value per token and layer."""
    if getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config).layers  # type: ignore[arg-type]
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _layers(cache: Cache) -> list[_Layer]:
    return cast("list[_Layer]", cache.layers)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids [B, L] that all end in the last column, and which of them are tokens, bool [B, L]."""
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=d) for d in (torch.int64, torch.bool))
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[i, width - len(prompt) :] = True
    return ids.to(device), mask.to(device)


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
        ids, mask = _left_padded(prompts, self.model.device)
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
        log_probs = self.law.log_probs(logits[:, -1], self.written[index])
        self.log_probs[index] = log_probs.to(self.log_probs.dtype)  # some families give float32 whatever their weights
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
    """The same without a cache: every step runs the whole contexts, for models that keep no keys and values."""

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
        ids, mask = _left_padded([self.contexts[row] for row in rows], self.model.device)
        logits, values = self.model(ids, mask, keep=1)
        index = torch.as_tensor(rows, device=self.model.device)
        log_probs = self.law.log_probs(logits[:, -1], self.written[index])
        self.log_probs[index] = log_probs.to(self.log_probs.dtype)  # some families give float32 whatever their weights
        self.values[index] = values[:, -1]
