"""The contexts that a policy has read lately, so that one more token costs one column and not the whole context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.types import Decoder, SamplingLaw


@dataclass
class _Rows:
    """What is known of N rows that are read side by side."""

    decoder: Decoder
    ids: NDArray[np.int64]  # [N, L], right-padded
    length: NDArray[np.int64]  # [N], −1 = nothing was read yet
    goes_on: NDArray[np.bool_]  # [N], whether the decoder can append to this row
    log_probs: Tensor  # [N, V], of the next token; a logit for whoever applies a sampling law
    values: Tensor  # [N]


class SeenContexts:
    """Next-token log-probabilities and values by context: remembered, continued by one token, or read anew.

    A row whose context is the one it had gets the same numbers, bit for bit; one that grew by a token has it appended
    to a key-value cache; any other is read from its beginning. All is forgotten once a weight's version counter
    (moved by `add_`, an optimizer, `load_state_dict`) or its address (`p.data = …`) is new. `p.data.mul_(2)` changes
    neither: call `forget` after it. Copies and pickles remember nothing.
    """

    def __init__(self, vocab_size: int) -> None:
        # No sampling law: its minimum length counts response tokens, and a context read anew may end in some already.
        self._law = SamplingLaw(vocab_size, None)
        self._by_size: dict[int, _Rows] = {}  # an evaluation beside the training has another number of rows
        self._parameters: list[Tensor] = []  # of the model, looked up anew after `forget`
        self._weights: Any = None

    def __reduce__(self) -> Any:
        return SeenContexts, (self._law.vocab_size,)

    def forget(self) -> None:
        """Free the caches; the next contexts are read from their beginning."""
        self._by_size.clear()
        self._parameters = []

    @torch.no_grad()
    def read(self, lm: CausalLM, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, V] under no sampling law, and values [N], after right-padded contexts [N, L]."""
        self._parameters = self._parameters or list(lm.parameters())
        weights = [(p.data_ptr(), p._version) for p in self._parameters]
        if weights != self._weights:  # TRPO replaces the tensors, all others write into them
            self.forget()
            self._weights = weights
        tokens, length = ids.cpu().numpy(), mask.sum(1).cpu().numpy()
        n, width = tokens.shape
        rows = self._by_size.pop(n, None)  # put back once it is whole: what an exception leaves is never read again
        if rows is None or rows.ids.shape[1] != width:
            decoder = lm.decoder(n, self._law)
            rows = _Rows(
                decoder,
                np.zeros_like(tokens),
                np.full(n, -1),
                np.zeros(n, dtype=np.bool_),
                decoder.log_probs,
                decoder.values,
            )
        begins_alike = ((tokens == rows.ids) | (np.arange(width) >= rows.length[:, None])).all(1)
        same = begins_alike & (length == rows.length)
        grown = begins_alike & (length == rows.length + 1) & rows.goes_on & (rows.length > 0)
        anew = ~same & ~grown
        if grown.any():
            index = np.flatnonzero(grown)
            rows.decoder.append(tokens[index, length[index] - 1], index.tolist())
            rows.goes_on = grown.copy()  # the decoder let go of the others
        if anew.any():
            index = np.flatnonzero(anew)
            rows.decoder.start(index.tolist(), [tokens[i, : length[i]].tolist() for i in index])
            rows.goes_on |= anew
        if not same.all():
            kept, decoder = torch.from_numpy(same).to(rows.values.device), rows.decoder
            rows.log_probs = torch.where(kept[:, None], rows.log_probs, decoder.log_probs)
            rows.values = torch.where(kept, rows.values, decoder.values)
            rows.ids, rows.length = tokens, length
        self._by_size[n] = rows
        return rows.log_probs, rows.values
