"""The nouns: what flows through the package (`Rollout`, `Comparison`) and what can be plugged in (the Protocols)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_env.errors import ConfigError, DataError, NonFiniteError


@dataclass(frozen=True)
class SamplingLaw:
    """How next tokens are drawn: part of the environment, applied alike to the policy and to the reference.

    A mask or temperature on one side only would show up as KL that neither model has.
    """

    vocab_size: int  #: actions are 0 … vocab_size − 1; rows of a larger embedding are never sampled
    eos_token_id: int | None  #: the token that ends a response; None: only the length limit does
    temperature: float = 1.0  #: logits are divided by it, in sampling and in every log-probability
    min_new_tokens: int = 0  #: EOS is forbidden before this many tokens were written
    banned_tokens: tuple[int, ...] = ()  #: never written

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be positive and finite, got {self.temperature}: greedy decoding has no "
                "log-probabilities to train on; to evaluate greedily, use generate(..., greedy=True)"
            )
        for token in self.banned_tokens:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"banned token {token} is outside the vocabulary of {self.vocab_size}")
        if self.eos_token_id is not None and not 0 <= self.eos_token_id < self.vocab_size:
            raise ConfigError(f"EOS token {self.eos_token_id} is outside the vocabulary of {self.vocab_size}")
        early_eos = {self.eos_token_id} - {None} if self.min_new_tokens > 0 else set()
        if len({*self.banned_tokens} | early_eos) >= self.vocab_size:
            raise ConfigError("no token is left to write: every one is banned, or is EOS before min_new_tokens")

    def log_probs(self, logits: Tensor, position: Tensor) -> Tensor:
        """Log-probabilities [..., vocab_size] of the next token from raw `logits` [..., ≥ vocab_size].

        `position` [...] is the index t of the token to be drawn. Computed in float32 whatever the model's dtype
        (float64 stays): bfloat16 log-probabilities are off by 0.03 nats.
        """
        logits = logits[..., : self.vocab_size]
        if logits.dtype != torch.float64:
            logits = logits.float()
        logits = logits / self.temperature
        if self.banned_tokens:
            logits = logits.index_fill(-1, torch.tensor(self.banned_tokens, device=logits.device), -torch.inf)
        if self.min_new_tokens and self.eos_token_id is not None:
            eos = torch.arange(self.vocab_size, device=logits.device) == self.eos_token_id
            logits = logits.masked_fill(eos & (position < self.min_new_tokens).unsqueeze(-1), -torch.inf)
        return logits.log_softmax(-1)

    def allowed(self, position: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which actions the law allows at token index `position` [N]: bool [N, vocab_size]."""
        allowed = np.ones((len(position), self.vocab_size), dtype=np.bool_)
        allowed[:, list(self.banned_tokens)] = False
        if self.eos_token_id is not None:
            allowed[position < self.min_new_tokens, self.eos_token_id] = False
        return allowed


@dataclass(frozen=True)
class Rollout:
    """B finished episodes, as tensors: the one thing that flows from `collect` to an agent.

    Prompts are padded on the left and responses on the right, so that `input_ids` reads without a gap at the border
    and response token t is predicted at column P + t − 1. `rollout[index]` slices every field.
    """

    prompt_ids: Tensor  # int64 [B, P], left-padded
    prompt_mask: Tensor  # bool  [B, P]
    response_ids: Tensor  # int64 [B, T], right-padded, EOS included
    response_mask: Tensor  # bool  [B, T], True = a token that was sampled
    logp: Tensor  # float [B, T], of the sampled token under the behaviour policy
    ref_logp: Tensor  # float [B, T], of the same token under the reference
    values: Tensor  # float [B, T], the behaviour policy's value of the state before token t (0 without a value head)
    reward: Tensor  # float [B, T], what the agent receives: KL term, score and penalties
    score: Tensor  # float [B], the reward model's word on the whole response
    penalty: Tensor  # float [B], subtracted from the score, e.g. for a missing EOS
    beta: Tensor  # float [B], the KL coefficient each episode was charged with
    ended: Tensor  # bool  [B], True = stopped by EOS or a stop string, False = by the length limit
    law: SamplingLaw  # what the log-probabilities above are log-probabilities of

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "response_ids"):
            if getattr(self, name).dim() != 2:
                raise ValueError(f"Rollout.{name} has shape {tuple(getattr(self, name).shape)}, expected [B, tokens]")
        (b, p), t = self.prompt_ids.shape, self.response_ids.shape[1]
        for field in dataclasses.fields(self):
            if field.name == "law":
                continue
            shape = (b, p) if field.name.startswith("prompt_") else (b, t) if field.name in _BY_TOKEN else (b,)
            if (actual := tuple(getattr(self, field.name).shape)) != shape:
                raise ValueError(f"Rollout.{field.name} has shape {actual}, expected {shape}")
        for name in ("prompt_mask", "response_mask", "ended"):
            if getattr(self, name).dtype != torch.bool:
                raise ValueError(f"Rollout.{name} must be bool (True = counts), got {getattr(self, name).dtype}")

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    def __getitem__(self, index: Any) -> Rollout:
        """The episodes at `index` (a number, slice, list, or tensor of row numbers or bools)."""
        if isinstance(index, (int, np.integer)):
            index = [index]
        sliced: dict[str, Any] = {name: v[index] for name, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **sliced)

    def require_finite(self) -> Rollout:
        """This rollout, or `NonFiniteError` naming the first field and episode that hold NaN or infinity."""
        for name in ("logp", "ref_logp", "values", "reward", "score"):
            value: Tensor = getattr(self, name)
            broken = ~torch.isfinite(value)
            if value.dim() == 2:
                broken = (broken & self.response_mask).any(1)
            if broken.any():
                row = int(broken.nonzero()[0])
                raise NonFiniteError(f"{name} of episode {row} of the batch is not finite; nothing was learned from it")
        return self

    @property
    def input_ids(self) -> Tensor:
        """Prompt and response, int64 [B, P + T]."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """True at the tokens of `input_ids` that exist, bool [B, P + T]."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def kl(self) -> Tensor:
        """Σ_t (logp_t − ref_logp_t) of each response, in nats, [B]."""
        return torch.where(self.response_mask, self.logp - self.ref_logp, 0.0).sum(1)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, EOS included, int64 [B]."""
        return self.response_mask.sum(1)

    def to(self, device: torch.device | str) -> Rollout:
        """The same episodes on another device."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)


_BY_TOKEN = {"response_ids", "response_mask", "logp", "ref_logp", "values", "reward"}


@dataclass(frozen=True)
class Comparison:
    """One judgement: K responses to a prompt, ranked by a labeler, ties allowed."""

    prompt: str
    responses: tuple[str, ...]  #: K ≥ 2, in the order in which they were sampled
    ranks: tuple[int, ...]  #: of each response: 0 = best; equal ranks are a tie; no rank is left out, so (0, 2) is none
    labeler: str = ""  #: who judged
    policy: str = ""  #: what wrote the responses
    order: tuple[int, ...] | None = None  #: responses[order[0]] was shown first; none: not known
    time: str | None = None  #: when, ISO 8601 in UTC; simulated labelers answer outside of time

    def __post_init__(self) -> None:
        k = len(self.responses)
        if k < 2:
            raise DataError(f"a comparison needs at least 2 responses, it has {k}")
        if len(self.ranks) != k or sorted(set(self.ranks)) != list(range(len(set(self.ranks)))):
            raise DataError(
                f"the ranks of {k} responses are {k} integers from 0 (best) upwards without a gap, equal ones for a "
                f"tie; got {list(self.ranks)}"
            )
        if self.order is not None and sorted(self.order) != list(range(k)):
            raise DataError(f"order must name each of the {k} responses once, got {list(self.order)}")

    @property
    def pairs(self) -> list[tuple[int, int, float]]:
        """Every pair (i, j), i < j, of different responses, with the preference for i: 1, 0, or 0.5 for a tie."""
        both = itertools.combinations(range(len(self.ranks)), 2)
        ranked = [(i, j, self.ranks[j] - self.ranks[i]) for i, j in both if self.responses[i] != self.responses[j]]
        return [(i, j, 0.5 + 0.5 * ((lead > 0) - (lead < 0))) for i, j, lead in ranked]


@runtime_checkable
class RewardModel(Protocol):
    """Says how good whole responses are. Any callable of the same signature does too."""

    def score(self, prompts: list[str], responses: list[str]) -> NDArray[np.floating]:
        """One finite number per response, [B]; it never depends on batch mates."""
        ...


class Labeler(Protocol):
    """Ranks responses: a person, or a simulated one."""

    name: str

    def rank(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], queries: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """The `Comparison.ranks` of each query, which is a prompt with its K responses in the order they are shown.

        The answer to a query depends on the labeler, the texts and the query's number in `queries` alone, never on
        what else is asked in the same call.
        """
        ...


class Decoder(Protocol):
    """Next-token distributions for rows that grow by one token at a time, each restartable on its own."""

    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin new sequences in `rows`."""
        ...

    def append(self, tokens: NDArray[np.int64], rows: Sequence[int]) -> None:
        """Append `tokens[i]` to row `rows[i]`; rows not named must be restarted before they are read again."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows, renumbered 0, 1, …"""
        ...

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of every row's next token under the sampling law, [N, V]."""
        ...

    @property
    def values(self) -> Tensor:
        """Value of every row's present state, [N]."""
        ...


class Policy(Protocol):
    """A distribution over next tokens with a value estimate, trainable by gradient."""

    def decoder(self, num_rows: int, law: SamplingLaw) -> Decoder:
        """A fresh decoder of `num_rows` rows that samples under `law`."""
        ...

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forced pass: logp, values and entropy of every response position, each [B, T], with gradient."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """What an optimizer may change."""
        ...


class Agent(Protocol):
    """Learns from rollouts of its own policy."""

    policy: Policy
    batch_size: int  # episodes it wants per update

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """One step of learning; `progress` in [0, 1) is the part of the budget already used. Returns metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the policy's weights that a resumed run needs (tensors and JSON values)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...
