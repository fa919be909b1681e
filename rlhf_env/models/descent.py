"""Minimising a mean loss over a fixed set of examples: the loop that fine-tuning and reward models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_env.errors import NonFiniteError
from rlhf_env.settings import BradleyTerryConfig, SFTConfig


def descend(
    parameters: Sequence[nn.Parameter],
    examples: int,
    loss_of: Callable[[list[int]], tuple[Tensor, dict[str, float]]],
    config: SFTConfig | BradleyTerryConfig,
    seed: int,
) -> Iterator[dict[str, float]]:
    """AdamW with a learning rate that falls linearly to 0 and gradients clipped at norm 1, yielding a row per step.

    `loss_of` gives the loss of a batch of example numbers, and what else its row shall say. The order depends on
    (seed, epoch) alone. Raises `NonFiniteError`, with the weights as they were, where a gradient breaks.
    """
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    per_epoch = -(-examples // config.batch_size)
    steps = config.epochs * per_epoch
    for step in range(steps):
        epoch, part = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(examples)
        loss, facts = loss_of(order[part * config.batch_size : (part + 1) * config.batch_size].tolist())
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient became non-finite in step {step}; the step was not taken")
        optimizer.step()
        yield {"step": step + 1, "steps": steps, "loss": loss.item(), **facts, "gradient_norm": norm.item()}
