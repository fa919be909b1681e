"""Supervised fine-tuning: teach a policy to answer like a set of demonstrations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_env.errors import ConfigError, DataError, NonFiniteError, RLHFEnvError
from rlhf_env.functional import gather_logp, masked_mean, masked_sum
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.descent import descend
from rlhf_env.settings import SFTConfig
from rlhf_env.text.codec import Codec
from rlhf_env.text.demonstrations import Demonstration, load_demonstrations


@dataclass(frozen=True)
class EncodedDemonstration:
    """Token ids of a prompt, its response and EOS, of which the policy learns those from `learned_from` on."""

    ids: tuple[int, ...]
    learned_from: int  #: index of the first token that is learned, at least 1: nothing predicts token 0

    def __post_init__(self) -> None:
        if not 1 <= self.learned_from < len(self.ids):
            raise ValueError(f"learned_from must be 1 … {len(self.ids) - 1}, got {self.learned_from}")


def encode_demonstrations(
    codec: Codec,
    demonstrations: Sequence[Demonstration],
    *,
    context_length: int | None,
    too_long: Literal["error", "drop"] = "error",
) -> list[EncodedDemonstration]:
    """Each demonstration as the policy meets it in the environment: prompt as `codec` encodes it, response, EOS.

    The response and EOS are learned. Without a prompt there is no chat template either, and every token is learned but
    the first and what the tokenizer puts before all texts. Demonstrations of more than `context_length` tokens are an
    error, or left out. Raises `DataError` with the place of the demonstration.
    """
    if too_long not in ("error", "drop"):
        raise ConfigError(f"too_long must be 'error' or 'drop', got {too_long!r}")
    if not demonstrations:
        raise DataError("there are no demonstrations to learn from")
    plain, eos = Codec(codec.tokenizer), codec.require_eos()
    rows: list[EncodedDemonstration] = []
    for number, demonstration in enumerate(demonstrations):
        try:
            rows.append(_encode(codec, plain, eos, demonstration))
        except RLHFEnvError as error:
            raise DataError(f"{_place(demonstration, number)}: {error}") from error
    if context_length is None:
        return rows
    fitting = [row for row in rows if len(row.ids) <= context_length]
    if len(fitting) < len(rows) and (too_long == "error" or not fitting):
        first = next(i for i, row in enumerate(rows) if len(row.ids) > context_length)
        count = f"{len(rows) - len(fitting)} of {len(rows)} demonstrations are too long"
        remedy = ("leave them out with too_long=drop, or " if fitting else "") + "take a model with more context"
        raise DataError(
            f"{_place(demonstrations[first], first)}: {len(rows[first].ids)} tokens, EOS included, do not fit the "
            f"context of {context_length}; {count}: {remedy}"
        )
    return fitting


def fit_demonstrations(
    policy: CausalLM,
    rows: Sequence[EncodedDemonstration],
    config: SFTConfig = SFTConfig(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Minimise the mean negative log-likelihood per learned token, yielding metrics at every step.

    `loss` is the mean over the learned tokens of the batch, in nats; `tokens` counts those learned so far. The order
    depends on (seed, epoch) alone. Raises `NonFiniteError`, with the weights as they were, where a gradient breaks.
    """
    if not rows:
        raise DataError("there are no demonstrations to learn from")
    tokens = 0

    def loss_of(batch: list[int]) -> tuple[Tensor, dict[str, float]]:
        nonlocal tokens
        chosen = [rows[i] for i in batch]
        tokens += sum(len(row.ids) - row.learned_from for row in chosen)
        return demonstration_loss(policy, chosen), {"tokens": tokens}

    yield from descend([p for p in policy.parameters() if p.requires_grad], len(rows), loss_of, config, seed)


def demonstration_loss(policy: CausalLM, rows: Sequence[EncodedDemonstration]) -> Tensor:
    """Mean negative log-likelihood per learned token, in nats, with gradient."""
    logp, learned = _log_probs(policy, rows)
    return -masked_mean(logp, learned)


def read_demonstrations(source: str, policy: CausalLM) -> list[EncodedDemonstration]:
    """The demonstrations of a file or data set, encoded for a policy; those beyond its context are left out."""
    codec, context = Codec(policy.tokenizer, chat_template="auto"), policy.context_length
    return encode_demonstrations(codec, load_demonstrations(source), context_length=context, too_long="drop")


@torch.no_grad()
def mean_nll(policy: CausalLM, rows: Sequence[EncodedDemonstration], batch_size: int = 64) -> float:
    """Mean negative log-likelihood per learned token of all `rows`, in nats; every token weighs the same."""
    if not rows:
        raise DataError("there are no demonstrations to measure on")
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        logp, learned = _log_probs(policy, rows[start : start + batch_size])
        total -= masked_sum(logp.double(), learned).item()
        count += int(learned.sum())
    if not math.isfinite(total):
        raise NonFiniteError("the log-likelihood of the demonstrations is not finite: the weights hold NaN or infinity")
    return total / count


def _encode(codec: Codec, plain: Codec, eos: int, demonstration: Demonstration) -> EncodedDemonstration:
    prompt, response = demonstration.prompt, demonstration.response
    if prompt:
        before = codec.encode_prompt(prompt)
        ids, learned_from = before + codec.encode_response(before, prompt, response), len(before)
    else:
        ids = plain.encode_prompt(response)
        learned_from = max(1, len(ids) - len(plain.encode(response)))
    return EncodedDemonstration((*ids, eos), learned_from)


def _place(demonstration: Demonstration, number: int) -> str:
    return demonstration.where or f"demonstration {number}"


def _log_probs(policy: CausalLM, batch: Sequence[EncodedDemonstration]) -> tuple[Tensor, Tensor]:
    """Log-probability [B, K] of the last K tokens of the right-padded batch, and which of them are learned, bool."""
    width, first = max(len(row.ids) for row in batch), min(row.learned_from for row in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask, learned = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
    for i, row in enumerate(batch):
        length = len(row.ids)
        ids[i, :length], mask[i, :length], learned[i, row.learned_from : length] = torch.tensor(row.ids), True, True
    ids, mask, learned = ids.to(policy.device), mask.to(policy.device), learned.to(policy.device)
    logits, _ = policy(ids, mask, keep=width - first + 1)  # not those of the prompts: they have the most columns
    log_probs = logits[:, :-1].to(policy.dtype).log_softmax(-1)
    return gather_logp(log_probs, ids[:, first:]), learned[:, first:]
