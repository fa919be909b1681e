"""Top-k and top-p as the reference sees them, on any decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_env.functional import restrict
from rlhf_env.types import Decoder, SamplingLaw


class TruncatedDecoder:
    """A decoder beside the reference's, restricted to the tokens that the law leaves of the reference."""

    def __init__(self, own: Decoder, reference: Decoder, law: SamplingLaw) -> None:
        self.own, self.reference, self.law = own, reference, law

    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin new sequences in `rows`."""
        for decoder in (self.own, self.reference):
            decoder.start(rows, prompts)
        self._truncate()

    def append(self, tokens: NDArray[np.int64], rows: Sequence[int]) -> None:
        """Append `tokens[i]` to row `rows[i]`."""
        for decoder in (self.own, self.reference):
            decoder.append(tokens, rows)
        self._truncate()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows."""
        for decoder in (self.own, self.reference):
            decoder.keep(rows)
        self._truncate()

    def _truncate(self) -> None:
        self.candidates = self.law.candidates(self.reference.log_probs.to(self.own.log_probs.device))
        broken = self.reference.log_probs.isnan().any(-1, keepdim=True).to(self.candidates.device)
        self._log_probs = restrict(self.own.log_probs, self.candidates).masked_fill(broken, torch.nan)

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of every row's next token, [N, V]."""
        return self._log_probs

    @property
    def values(self) -> Tensor:
        """Value of every row's present state, [N]."""
        return self.own.values
