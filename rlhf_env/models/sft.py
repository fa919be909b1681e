"""Supervised fine-tuning: teach a policy to write like a set of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_env.errors import ConfigError, DataError, NonFiniteError
from rlhf_env.functional import gather_logp, masked_mean
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.text.codec import Codec


@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning."""

    learning_rate: float = 1e-3  #: of AdamW, falling linearly to 0
    epochs: int = 3  #: passes over the texts
    batch_size: int = 64  #: texts per gradient step
    weight_decay: float = 0.01  #: of AdamW

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.epochs < 1 or self.batch_size < 1:
            raise ConfigError("SFT needs learning_rate > 0, epochs ≥ 1 and batch_size ≥ 1")


def fit_texts(
    policy: CausalLM,
    texts: Sequence[str],
    config: SFTConfig = SFTConfig(),
    *,
    seed: int = 0,  # noqa: B008 (frozen)
) -> Iterator[dict[str, float]]:
    """Minimise the mean negative log-likelihood per token of `texts`, EOS included, yielding metrics at every step.

    `loss` is in nats per token. The first token of a text is learned only where the tokenizer puts a BOS before it.
    Raises `DataError` naming the text that is empty or longer than the context.
    """
    codec = Codec.of(policy.tokenizer)
    ends = [codec.require_eos()]
    rows = [codec.encode_prompt(text) + ends for text in texts]
    if not rows:
        raise DataError("there are no texts to learn from")
    for number, row in enumerate(rows):
        if policy.context_length is not None and len(row) > policy.context_length:
            raise DataError(f"text {number} has {len(row)} tokens, more than the context of {policy.context_length}")
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    per_epoch = -(-len(rows) // config.batch_size)
    steps = config.epochs * per_epoch
    for step in range(steps):
        epoch, part = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        batch = [rows[i] for i in order[part * config.batch_size : (part + 1) * config.batch_size]]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        logits, _ = policy(ids, mask)
        logp = gather_logp(logits[:, :-1].to(policy.dtype).log_softmax(-1), ids[:, 1:])
        loss = -masked_mean(logp, mask[:, 1:])
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient became non-finite in step {step}; the step was not taken")
        optimizer.step()
        yield {"step": step + 1, "steps": steps, "loss": loss.item(), "gradient_norm": norm.item()}
