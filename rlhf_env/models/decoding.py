"""Next-token distributions in rows that grow, finish and restart on their own: block by block, by the model's own
forward with its key-value cache, or without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_env.models.blocks import Body
from rlhf_env.models.replay import Replay
from rlhf_env.types import SamplingLaw

_HALF = (torch.bfloat16, torch.float16)
_ROOM = 64  # columns for a response, to begin with
_WIDTH = 64  # a GPU's steps are recorded for multiples of so many columns


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


class _BlockModel(Protocol):
    """A causal model in blocks, with raw logits [n, V] and values [n] of last hidden states [n, D]."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def body(self) -> Body | None: ...
    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor]: ...


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


class BlockDecoder:
    """Cached decoding of N rows through a model's `Body`, each of its own length and restartable while others go on.

    Row i keeps the keys and values of its tokens in columns 0, 1, … of storage that is made in advance and doubled when
    it is full, so nothing is moved when a row grows or restarts. Equal prompts that start together are read once. On a
    GPU a step is recorded when it is first taken and then replayed.
    """

    def __init__(self, model: _BlockModel, num_rows: int, law: SamplingLaw) -> None:
        self.model, self.law = model, law
        self.storage: list[tuple[Tensor, Tensor]] = []  # keys and values of each block, [N · kv heads, columns, size]
        self.length = torch.zeros(num_rows, dtype=torch.int64, device=model.device)  # [N] tokens so far
        self.written = torch.zeros_like(self.length)  # [N] of them in the response
        self.log_probs = torch.full((num_rows, law.vocab_size), torch.nan, dtype=model.dtype, device=model.device)
        self.values = torch.zeros(num_rows, dtype=model.dtype, device=model.device)
        self.replays: dict[int, Replay] = {}  # by how many columns a step looks at

    @torch.no_grad()
    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin new sequences in `rows`; their next-token distributions are there at once."""
        body, index = self._body, torch.as_tensor(rows, device=self.length.device)
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        which = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=index.device)
        width = max(map(len, number))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in number], device=index.device)
        lengths = torch.tensor([len(prompt) for prompt in number], device=index.device)
        self._reserve(width)
        x = body.embed(ids)
        for layer, (keys, values, made) in enumerate(body.run(x, body.family.blocks)):
            x = made
            if layer == len(self.storage):  # the first prompts this decoder sees
                shape = (len(self.length) * keys.shape[1], width + _ROOM, keys.shape[3])
                self.storage.append((keys.new_zeros(shape), values.new_zeros(shape)))
            for kept, new in zip(self.storage[layer], (keys, values), strict=True):
                self._by_row(kept)[index, :, :width] = new[which]
        last = body.family.norm(x[torch.arange(len(number)), lengths - 1])
        self.length[index], self.written[index] = lengths[which], 0
        logits, values = self.model.heads(last)
        self._read(index, logits[which], values[which])

    @torch.no_grad()
    def append(self, tokens: NDArray[np.int64], rows: Sequence[int]) -> None:
        """Append `tokens[i]` to row `rows[i]`. Rows not named hold nothing until they are started again."""
        index = torch.as_tensor(rows, device=self.length.device)
        ids = torch.zeros_like(self.length)
        ids[index] = torch.as_tensor(tokens, device=index.device)
        if len(index) < len(self.length):
            idle = torch.ones_like(self.length, dtype=torch.bool)
            idle[index] = False
            self.length[idle] = 0  # an idle row sees one token only, and never needs more room
        position = self.length.clone()
        hidden = self._step(ids, position, int(position.max()) + 1)
        self.length[index] += 1
        self.written[index] += 1
        logits, values = self.model.heads(hidden)
        self._read(index, logits[index], values[index])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows, renumbered 0, 1, …; the others are forgotten."""
        index = torch.as_tensor(rows, device=self.length.device)
        self.storage = [
            (self._by_row(keys)[index].flatten(0, 1), self._by_row(values)[index].flatten(0, 1))
            for keys, values in self.storage
        ]
        self.replays.clear()
        for name in ("length", "written", "log_probs", "values"):
            setattr(self, name, getattr(self, name)[index])

    def _step(self, ids: Tensor, position: Tensor, longest: int) -> Tensor:
        """Last hidden states [N, D] of one token in every row, at `position` [N] < `longest`."""
        if not ids.is_cuda:
            self._reserve(longest)
            ragged = bool((position < longest - 1).any())
            return self._run(ids, position, longest, ragged)
        assert self._body  # which a replay would not ask for
        columns = -(-longest // _WIDTH) * _WIDTH
        self._reserve(columns)
        if columns not in self.replays:

            def run(ids: Tensor, position: Tensor) -> Tensor:
                return self._run(ids, position, columns, ragged=True)

            self.replays[columns] = Replay(run, ids, position)
        return self.replays[columns](ids, position)

    def _run(self, ids: Tensor, position: Tensor, columns: int, ragged: bool) -> Tensor:
        """The same looking at so many `columns`, of which some rows use fewer where they are `ragged`."""
        body = self._body
        family, n, heads = body.family, len(ids), body.family.kv_heads
        x = family.embed(ids, position)  # [N, D]
        rotation = family.rotation(x, position)
        row, column = torch.arange(n, device=ids.device), torch.arange(columns, device=ids.device)
        nothing = x.new_empty(1, 1, 1)
        unseen = column > position.unsqueeze(1)  # [N, columns]
        hidden_from = unseen.repeat_interleave(heads, 0).unsqueeze(1) if ragged else None  # [N · kv heads, 1, columns]
        for block, stored in zip(family.blocks, self.storage, strict=True):
            q, *new = body.qkv(block, x, rotation)  # [N, heads, size]
            for kept, token in zip(stored, new, strict=True):
                if ragged:
                    self._by_row(kept)[row, :, position] = token
                else:
                    kept[:, columns - 1] = token.flatten(0, 1)
            keys, values = (kept[:, :columns] for kept in stored)
            q = q.reshape(n * heads, -1, q.shape[-1])  # queries that share keys are side by side
            weight = torch.baddbmm(nothing, q, keys.transpose(1, 2), beta=0, alpha=family.scale(block))
            if hidden_from is not None:
                weight.masked_fill_(hidden_from, -torch.inf)
            if (window := family.window(block)) is not None and window < columns:
                past = column <= position.unsqueeze(1) - window
                weight.masked_fill_(past.repeat_interleave(heads, 0).unsqueeze(1), -torch.inf)
            weight = weight.float() if weight.dtype in _HALF else weight
            attended = weight.softmax(-1).to(values.dtype) @ values
            x = family.finish(block, x, attended.reshape(n, -1))
        return family.norm(x)

    def _read(self, index: Tensor, logits: Tensor, values: Tensor) -> None:
        self.log_probs[index] = self.law.log_probs(logits, self.written[index])
        self.values[index] = values

    def _reserve(self, columns: int) -> None:
        if self.storage and (have := self.storage[0][0].shape[1]) < columns:
            grow = (0, 0, 0, max(columns, 2 * have) - have)
            self.storage = [(pad(keys, grow), pad(values, grow)) for keys, values in self.storage]
            self.replays.clear()  # they would read and write the storage that was

    def _by_row(self, kept: Tensor) -> Tensor:
        """Keys or values as [N, kv heads, columns, size], in the same storage."""
        return kept.unflatten(0, (len(self.length), -1))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"replays": {}}  # a copy has storage of its own

    @property
    def _body(self) -> Body:
        # Not kept: a copy of this decoder is to find the blocks of the model's copy.
        body = self.model.body
        assert body is not None, "the model got hooks, or another attention, while it was being decoded"
        return body


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
