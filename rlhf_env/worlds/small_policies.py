"""Two policies that are small enough for a world of letters: a table of bigrams, and a GRU on top of one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf_env.errors import ConfigError
from rlhf_env.functional import entropy, gather_logp
from rlhf_env.models.reading import action_log_probs, response_log_probs
from rlhf_env.text.codec import Codec
from rlhf_env.types import Rollout, SamplingLaw

_RANDOM_SCALE = 1.3  # of the logits; the entropy is measured in the tests


class _StatePolicy(nn.Module):
    """What the two share: reading tokens one after the other, with a state [n, H] that each of them changes."""

    logits: Tensor  # [V, V], of the token after each token
    state_size: int  # H
    context_length = None  #: there is no limit to prompt and response

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def advance(self, tokens: Tensor, state: Tensor) -> Tensor:
        """The state [n, H] after reading `tokens` [n] in `state` [n, H]."""
        raise NotImplementedError

    def read(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits [..., V] and values [...] where `tokens` [...] were read last and led to `state` [..., H]."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights and of log-probabilities."""
        return self.logits.dtype

    def frozen_copy(self) -> Self:
        """The same policy as a reference: its own weights, which no optimizer can change."""
        return copy.deepcopy(self).requires_grad_(False)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The state after each column of `input_ids` [B, L], [B, L, H]; padding, on either side, changes nothing."""
        state = torch.zeros(len(input_ids), self.state_size, device=self.device, dtype=self.dtype)
        states = []
        for tokens, there in zip(input_ids.T, attention_mask.bool().T, strict=True):
            state = torch.where(there.unsqueeze(1), self.advance(tokens, state), state)
            states.append(state)
        return torch.stack(states, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, keep: int = 0) -> tuple[Tensor, Tensor]:
        """Raw logits [B, K, V] and values [B, K] of the last K = `keep` columns (0: all); as `CausalLM`."""
        input_ids = torch.where(attention_mask.bool(), input_ids, 0)  # padding may be any number
        return self.read(input_ids[:, -keep:], self.states(input_ids, attention_mask)[:, -keep:])

    def response_log_probs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probabilities [B, T, V] under `rollout.law`, and values [B, T], before each token."""
        return response_log_probs(self, rollout)

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, value and entropy at every response token, each [B, T], with gradient."""
        log_probs, values = self.response_log_probs(rollout)
        return gather_logp(log_probs, rollout.response_ids), values, entropy(log_probs)

    def decoder(self, num_rows: int, law: SamplingLaw) -> StateDecoder:
        """A decoder of `num_rows` rows that grow and restart independently."""
        return StateDecoder(self, num_rows, law)

    @torch.no_grad()
    def action_log_probs(
        self, observation: Mapping[str, NDArray[Any]], actions: NDArray[np.int64], law: SamplingLaw
    ) -> NDArray[np.floating]:
        """log π of `actions` [N] in the environment's observations (arrays [N, L]), as `bind_policy` wants them."""
        return action_log_probs(self, observation, actions, law, len(self.logits))


class BigramPolicy(_StatePolicy):
    """The next token depends on the last one only, by a table of logits [V, V]; all values are 0."""

    state_size = 0

    def __init__(self, logits: Tensor, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        size = Codec.of(tokenizer).vocab_size
        if logits.shape != (size, size):
            raise ConfigError(
                f"a table of bigrams over the tokenizer's {size} tokens has shape [{size}, {size}], "
                f"got {list(logits.shape)}"
            )
        self.logits = nn.Parameter(logits.detach().clone())

    @classmethod
    def random(cls, tokenizer: Any, *, seed: int = 0) -> Self:
        """Normal logits whose entropy is about 3/4 of a uniform distribution's; they depend on `seed` only."""
        size = Codec.of(tokenizer).vocab_size
        logits = _RANDOM_SCALE * np.random.default_rng([seed, 0]).standard_normal((size, size))
        return cls(torch.from_numpy(logits).float(), tokenizer)

    def advance(self, tokens: Tensor, state: Tensor) -> Tensor:
        """The same state, which holds nothing."""
        return state

    def read(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' rows of the table [..., V], and values 0 [...]."""
        return self.logits[tokens], torch.zeros(tokens.shape, device=self.device, dtype=self.dtype)


class ResidualGRUPolicy(_StatePolicy):
    """A frozen table of bigrams plus what a GRU over all tokens so far adds to its logits.

    The GRU's two heads, on logits and value, start at zero: the policy starts as the bigrams exactly, so that its KL
    to them is 0. `seed` decides the GRU's own weights.
    """

    def __init__(self, bigrams: BigramPolicy, *, hidden: int = 48, seed: int = 0) -> None:
        super().__init__(bigrams.tokenizer)
        size, self.state_size = len(bigrams.logits), hidden
        self.register_buffer("logits", bigrams.logits.detach().clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(size, hidden)
            self.cell = nn.GRUCell(hidden, hidden)
            self.head, self.value_head = nn.Linear(hidden, size), nn.Linear(hidden, 1)
        for head in (self.head, self.value_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.to(device=bigrams.device, dtype=bigrams.dtype)

    def advance(self, tokens: Tensor, state: Tensor) -> Tensor:
        """One step of the GRU: [n], [n, H] → [n, H]."""
        return self.cell(self.embedding(tokens), state)

    def read(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The bigrams' logits plus the GRU's [..., V], and the value head's values [...]."""
        return self.logits[tokens] + self.head(state), self.value_head(state).squeeze(-1)


class StateDecoder:
    """Next-token distributions of N rows, each with a state of its own; what there is to know is in `Decoder`."""

    def __init__(self, policy: _StatePolicy, num_rows: int, law: SamplingLaw) -> None:
        self.policy, self.law = policy, law
        number = {"device": policy.device, "dtype": policy.dtype}
        self.state = torch.zeros(num_rows, policy.state_size, **number)
        self.written = torch.zeros(num_rows, dtype=torch.int64, device=policy.device)  # [N] response tokens so far
        self.log_probs = torch.full((num_rows, law.vocab_size), torch.nan, **number)
        self.values = torch.zeros(num_rows, **number)

    @torch.no_grad()
    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin new sequences in `rows`; their next-token distributions are there at once."""
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        ids = torch.tensor(padded, dtype=torch.int64, device=self.policy.device)
        begins = torch.tensor([width - len(prompt) for prompt in prompts], device=ids.device)
        states = self.policy.states(ids, torch.arange(width, device=ids.device) >= begins.unsqueeze(1))
        index = torch.as_tensor(rows, device=ids.device)
        self.written[index] = 0
        self._read(index, ids[:, -1], states[:, -1])

    @torch.no_grad()
    def append(self, tokens: NDArray[np.int64], rows: Sequence[int]) -> None:
        """Append `tokens[i]` to row `rows[i]`; rows not named stay as they are."""
        index = torch.as_tensor(rows, device=self.policy.device)
        drawn = torch.as_tensor(tokens, device=self.policy.device)
        self.written[index] += 1
        self._read(index, drawn, self.policy.advance(drawn, self.state[index]))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows, renumbered 0, 1, …; the others are forgotten."""
        index = torch.as_tensor(rows, device=self.policy.device)
        for name in ("state", "written", "log_probs", "values"):
            setattr(self, name, getattr(self, name)[index])

    def _read(self, index: Tensor, tokens: Tensor, state: Tensor) -> None:
        logits, values = self.policy.read(tokens, state)
        self.state[index], self.values[index] = state, values
        self.log_probs[index] = self.law.log_probs(logits, self.written[index])
