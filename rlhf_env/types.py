"""The nouns: what flows through the package (`Rollout`, `Comparison`) and what can be plugged in (the Protocols)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

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
    top_k: int = 0  #: only the reference's this many likeliest tokens may be written; 0: all
    top_p: float = 1.0  #: only the reference's likeliest tokens that together reach this probability may be written

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
        if not 0 <= self.top_k <= self.vocab_size:
            raise ConfigError(f"top_k={self.top_k} must be 0 (all) to {self.vocab_size}, the size of the vocabulary")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (all), got {self.top_p}")
        if len({*self.banned_tokens} | early_eos) >= self.vocab_size:
            raise ConfigError("no token is left to write: every one is banned, or is EOS before min_new_tokens")

    def log_probs(self, logits: Tensor, position: Tensor) -> Tensor:
        """Log-probabilities [..., vocab_size] of the next token from raw `logits` [..., ≥ vocab_size].

        `position` [...] is the index t of the token to be drawn. Computed in float32 whatever the model's dtype
        (float64 stays): bfloat16 log-probabilities are off by 0.03 nats.
        """
        return self.logits(logits, position).log_softmax(-1)

    def logits(self, logits: Tensor, position: Tensor) -> Tensor:
        """The logits that `log_probs` normalises: divided by the temperature, −∞ where a token is forbidden."""
        logits = logits[..., : self.vocab_size]
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.banned_tokens:
            logits = logits.index_fill(-1, torch.tensor(self.banned_tokens, device=logits.device), -torch.inf)
        if self.min_new_tokens and self.eos_token_id is not None:
            ends = logits[..., self.eos_token_id].masked_fill(position < self.min_new_tokens, -torch.inf)
            logits = logits.index_copy(-1, torch.tensor([self.eos_token_id], device=logits.device), ends.unsqueeze(-1))
        return logits

    def allowed(self, position: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which actions the law allows at token index `position` [N]: bool [N, vocab_size]."""
        allowed = np.ones((len(position), self.vocab_size), dtype=np.bool_)
        allowed[:, list(self.banned_tokens)] = False
        if self.eos_token_id is not None:
            allowed[position < self.min_new_tokens, self.eos_token_id] = False
        return allowed

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leave out tokens, so that what may be written depends on the reference."""
        return self.top_k > 0 or self.top_p < 1

    def candidates(self, ref_log_probs: Tensor) -> Tensor:
        """The tokens that top-k and top-p leave, likeliest first: int64 [..., K], −1 where there are fewer than K.

        `ref_log_probs` [..., V] are the reference's under this law (`log_probs`). The reference decides for the policy
        too: were each cut by its own probabilities, a token outside the reference's share would cost infinite KL, and
        a policy could narrow its own share to pay none. Of equally likely tokens the first counts as likelier. Top-p
        is measured within top-k.
        """
        ids = _likeliest(ref_log_probs, self.top_k) if self.top_k else torch.arange(self.vocab_size)
        ids = ids.to(ref_log_probs.device).expand(*ref_log_probs.shape[:-1], -1)  # ascending
        ordered, order = ref_log_probs.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
        kept = ordered > -torch.inf
        if self.top_p < 1:  # not "below 1" otherwise: rounding takes the sum of likelier ones to 1 before the tail ends
            probs = ordered.softmax(-1)
            kept &= probs.cumsum(-1) - probs < self.top_p
        kept[..., 0] = True
        return torch.where(kept, ids.gather(-1, order), -1)


def _likeliest(log_probs: Tensor, k: int) -> Tensor:
    """The ids of the k largest, ascending; of equals the first: [..., V] → [..., k]."""
    log_probs = log_probs.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    threshold = log_probs.topk(k, dim=-1).values[..., -1:]
    above, equal = log_probs > threshold, log_probs == threshold
    missing = k - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1) <= missing))
    return kept.nonzero()[:, -1].reshape(*log_probs.shape[:-1], k)


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
    candidates: Tensor | None = None  # int64 [B, T, K], −1 = none: what could be written, where the law truncates

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "response_ids"):
            if getattr(self, name).dim() != 2:
                raise ValueError(f"Rollout.{name} has shape {tuple(getattr(self, name).shape)}, expected [B, tokens]")
        (b, p), t = self.prompt_ids.shape, self.response_ids.shape[1]
        for field in dataclasses.fields(self):
            if field.name in ("law", "candidates"):
                continue
            shape = (b, p) if field.name.startswith("prompt_") else (b, t) if field.name in _BY_TOKEN else (b,)
            if (actual := tuple(getattr(self, field.name).shape)) != shape:
                raise ValueError(f"Rollout.{field.name} has shape {actual}, expected {shape}")
        if (self.candidates is not None) != self.law.truncates:
            raise ValueError("Rollout.candidates must be there where the law has top-k or top-p, and only there")
        if self.candidates is not None and self.candidates.shape[:-1] != (b, t):
            raise ValueError(f"Rollout.candidates has shape {tuple(self.candidates.shape)}, expected [{b}, {t}, K]")
        for name in ("prompt_mask", "response_mask", "ended"):
            if getattr(self, name).dtype != torch.bool:
                raise ValueError(f"Rollout.{name} must be bool (True = counts), got {getattr(self, name).dtype}")

    @classmethod
    def of_tokens(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        law: SamplingLaw,
    ) -> Rollout:
        """Episodes of which only the token ids mean anything; every number is 0. For teacher-forced passes."""
        b, p, t = len(prompts), max(map(len, prompts)), max(map(len, responses))
        ids, mask = np.zeros((b, p + t), dtype=np.int64), np.zeros((b, p + t), dtype=np.bool_)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            there = slice(p - len(prompt), p + len(response))
            ids[row, there], mask[row, there] = [*prompt, *response], True
        by_token, by_episode = torch.zeros(b, t), torch.zeros(b)
        return cls(
            prompt_ids=torch.from_numpy(ids[:, :p]),
            prompt_mask=torch.from_numpy(mask[:, :p]),
            response_ids=torch.from_numpy(ids[:, p:]),
            response_mask=torch.from_numpy(mask[:, p:]),
            logp=by_token,
            ref_logp=by_token,
            values=by_token,
            reward=by_token,
            score=by_episode,
            penalty=by_episode,
            beta=by_episode,
            ended=torch.zeros(b, dtype=torch.bool),
            law=law,
            candidates=torch.full((b, t, 1), -1) if law.truncates else None,
        )

    @classmethod
    def joined(cls, parts: Sequence[Rollout], pad_token_id: int = 0) -> Rollout:
        """The episodes of all `parts`, which follow one law, one after another and padded alike."""
        if len(parts) == 1:
            return parts[0]
        p, t = (max(getattr(part, name).shape[1] for part in parts) for name in ("prompt_ids", "response_ids"))
        k = max(0 if part.candidates is None else part.candidates.shape[2] for part in parts)

        def widened(part: Rollout, name: str) -> Tensor:
            value, blank = getattr(part, name), pad_token_id if name.endswith("_ids") else 0
            if name.startswith("prompt_"):
                return pad(value, (p - value.shape[1], 0), value=blank)
            if name == "candidates":
                return pad(value, (0, k - value.shape[2], 0, t - value.shape[1]), value=-1)
            return pad(value, (0, t - value.shape[1]), value=blank) if name in _BY_TOKEN else value

        names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        whole: dict[str, Any] = {name: torch.cat([widened(part, name) for part in parts]) for name in names}
        return cls(**whole, law=parts[0].law)

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
    def returns(self) -> Tensor:
        """Σ_t reward_t of each response, [B]: score − β·KL − penalties where the rewards contain the KL."""
        return torch.where(self.response_mask, self.reward, 0.0).sum(1)

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
class Pairs:
    """B pairs of responses to the same prompts, and which of the two was preferred: what preference methods learn from.

    Of both, `ref_logp` [B, T] is the reference's; nothing else but the tokens means anything. `pairs[index]` slices.
    """

    first: Rollout
    second: Rollout
    preference: Tensor  # float [B], for the first: 1, 0, 0.5 for a tie, or a probability

    def __post_init__(self) -> None:
        if not len(self.first) == len(self.second) == len(self.preference):
            raise ValueError(
                f"Pairs need as many first as second responses and preferences, got {len(self.first)}, "
                f"{len(self.second)} and {len(self.preference)}"
            )
        if not ((self.preference >= 0) & (self.preference <= 1)).all():
            raise ValueError("Pairs.preference must lie between 0 and 1")

    def __len__(self) -> int:
        return len(self.preference)

    def __getitem__(self, index: Any) -> Pairs:
        """The pairs at `index` (a slice, list, or tensor of row numbers or bools)."""
        return Pairs(self.first[index], self.second[index], self.preference[index])

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on another device."""
        return Pairs(self.first.to(device), self.second.to(device), self.preference.to(device))


@dataclass(frozen=True)
class Comparison:
    """One judgement: K responses to a prompt, ranked by a labeler, ties allowed.

    Of two responses it may also say how much better the better one is, or with which probability.
    """

    prompt: str
    responses: tuple[str, ...]  #: K ≥ 2, in the order in which they were sampled
    ranks: tuple[int, ...]  #: of each response: 0 = best; equal ranks are a tie; no rank is left out, so (0, 2) is none
    labeler: str = ""  #: who judged
    policy: str = ""  #: what wrote the responses
    order: tuple[int, ...] | None = None  #: responses[order[0]] was shown first; none: not known
    time: str | None = None  #: when, ISO 8601 in UTC; simulated labelers answer outside of time
    policies: tuple[str, ...] | None = None  #: what wrote each response, where not one `policy` wrote all; none: it did
    strength: float | None = None  #: > 0: how much better the better of two is, a margin or a grade; none: not known
    preference: float | None = None  #: probability that the first of two is better; none: 1, 0 or ½, as the ranks say

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
        if self.policies is not None:
            self._require_policies(self.policies)
        if self.strength is not None:
            self._require_strength(self.strength)
        if self.preference is not None:
            self._require_preference(self.preference)

    def _require_policies(self, policies: tuple[str, ...]) -> None:
        if len(policies) != len(self.responses):
            raise DataError(f"policies must name one for each of the {len(self.responses)} responses, got {policies}")
        if self.policy:
            raise DataError(f"either one policy wrote all responses ({self.policy!r}) or policies say which wrote each")

    def _require_strength(self, strength: float) -> None:
        if len(self.responses) != 2 or self.ranks[0] == self.ranks[1]:
            raise DataError("strength is how much better one of two responses is; these are more than two, or a tie")
        if not 0 < strength < float("inf"):
            raise DataError(f"strength must be positive and finite, got {strength}; leave it out where it is not known")

    def _require_preference(self, preference: float) -> None:
        if len(self.responses) != 2 or not 0 <= preference <= 1:
            raise DataError(
                f"preference is the probability, 0 to 1, that the first of two responses is better; got {preference} "
                f"for {len(self.responses)}"
            )
        lead = self.ranks[1] - self.ranks[0]
        if (preference > 0.5) - (preference < 0.5) != (lead > 0) - (lead < 0):
            raise DataError(f"preference {preference} for the first response contradicts the ranks {list(self.ranks)}")

    @property
    def writers(self) -> tuple[str, ...]:
        """What wrote each response, [K]; "" where that is not known."""
        return self.policies or (self.policy,) * len(self.responses)

    @property
    def pairs(self) -> list[tuple[int, int, float]]:
        """Every pair (i, j), i < j, of different responses, with the preference for i.

        It is 1, 0, or 0.5 for a tie, or the `preference` between two where that is known.
        """
        both = itertools.combinations(range(len(self.ranks)), 2)
        ranked = [(i, j, self.ranks[j] - self.ranks[i]) for i, j in both if self.responses[i] != self.responses[j]]
        if self.preference is not None:
            return [(i, j, float(self.preference)) for i, j, _ in ranked]
        return [(i, j, 0.5 + 0.5 * ((lead > 0) - (lead < 0))) for i, j, lead in ranked]


@runtime_checkable
class RewardModel(Protocol):
    """Says how good whole responses are. Any callable of the same signature does too."""

    def score(self, prompts: list[str], responses: list[str]) -> NDArray[np.floating]:
        """One finite number per response, [B]; it never depends on batch mates.

        A mapping of names to such numbers is accepted too: the score is their sum, and each is reported by its name.
        A model that shares the policy's vocabulary may also have `score_ids(prompt_ids, response_ids)`, which takes
        lists of token ids and spares the text.
        """
        ...


class ProcessRewardModel(Protocol):
    """Says how good every token is. It may also have `score`, or be called, for what the whole response is worth."""

    def score_tokens(self, prompts: list[str], responses: list[list[str]]) -> Sequence[Any]:
        """One finite number per token of each response, [T_i] each; responses are the texts of their tokens so far.

        A number may depend on the prompt and on the tokens up to its own, never on later ones or on batch mates.
        """
        ...


class Labeler(Protocol):
    """Ranks responses: a person, a simulated one, or a language model."""

    name: str

    def rank(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], queries: Sequence[int]
    ) -> Sequence[tuple[int, ...] | None]:
        """The `Comparison.ranks` of each query, which is a prompt with its K responses in the order they are shown.

        None in place of ranks: the labeler does not answer this query. It was asked all the same, and is counted so.
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
    """A distribution over next tokens with a value estimate, trainable by gradient.

    It may also have `begin(rollout)`: what frozen layers make of the episodes, or None. An update of several passes
    makes it once and gives its rows to `evaluate(rollout[rows], begun[rows])`.
    """

    def decoder(self, num_rows: int, law: SamplingLaw) -> Decoder:
        """A fresh decoder of `num_rows` rows that samples under `law`."""
        ...

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forced pass: logp, values and entropy of every response position, each [B, T], with gradient."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """What an optimizer may change."""
        ...


class Sampler(Protocol):
    """What an agent may ask of the environment before an update: the next prompts, answered by any policy."""

    def __call__(
        self, policy: Policy | Literal["reference"], *, greedy: bool = False, group_size: int | None = None
    ) -> Rollout:
        """Finished, scored episodes: the update's prompts, each answered `group_size` times (none: as the agent says).

        Whoever asks, and however often, within one update the prompts are the same and stand in the same order.
        """
        ...


class Agent(Protocol):
    """Learns from rollouts of its own policy.

    What else an agent may have, and otherwise need not: `group_size`, how many rows in succession answer the same
    prompt; `kl_mode`, what the rewards that it learns from contain ("reward"; "reference" for soft Q-learning);
    `best_of`, among how many responses its policy is to choose by the score when it is evaluated (1); and
    `rollouts(sample) -> tuple[Rollout, ...]`, where one rollout of its policy is not all it wants to see: `update` is
    given them all, its own policy's first.
    """

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


class OfflineAgent(Protocol):
    """Learns from data that is there already, and samples nothing."""

    learns_from: Literal["pairs", "log"]  # of the class: `Pairs`, or a `Rollout` of logged responses with their rewards

    @property
    def policy(self) -> Policy:
        """What it has learned so far."""
        ...

    def fit(self, data: Any, *, updates: int | None = None, start: int = 0) -> Iterator[dict[str, float]]:
        """Learn, yielding metrics at every gradient step: `updates` of them, or as many as its own settings say.

        `start` is the number of steps that an interrupted run has taken already; with the state it had then restored,
        the rest are those that it would have taken.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the policy's weights that a resumed run needs (tensors and JSON values)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...
