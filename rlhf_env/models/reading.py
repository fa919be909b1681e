"""What a model says of responses and of observations, given nothing but its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_env.errors import ConfigError
from rlhf_env.functional import gather_logp, restrict, token_statistics
from rlhf_env.models.observation import require_observation
from rlhf_env.types import Rollout, SamplingLaw

_LOGITS = 2**24  # numbers: 64 MB in float32


class _Model(Protocol):
    """Raw logits [B, K, ≥ V] and values [B, K] of the last K = `keep` columns (0: all); padding changes nothing."""

    @property
    def device(self) -> torch.device: ...
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, *, keep: int = 0) -> tuple[Tensor, Tensor]: ...


def response_log_probs(model: _Model, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Teacher-forced log-probabilities [B, T, V] under `rollout.law`, and values [B, T], before each token."""
    t = rollout.response_ids.shape[1]
    logits, values = model(rollout.input_ids, rollout.attention_mask, keep=t + 1)
    positions = torch.arange(t, device=logits.device).expand(len(rollout), t)
    log_probs = rollout.law.log_probs(logits[:, :-1], positions)
    return log_probs if rollout.candidates is None else restrict(log_probs, rollout.candidates), values[:, :-1]


def evaluate_states(
    heads: Callable[[Tensor], tuple[Tensor, Tensor]], hidden: Tensor, row: Tensor, t: Tensor, rollout: Rollout
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, value and entropy at every response token, each [B, T] and 0 in the padding.

    `hidden` [M, D] is the last hidden state before token t [M] of episode `row` [M]. Never more than 64 MB of logits
    are there at once: with a gradient, those of other parts are made again when it is their turn.
    """
    size = max(1, _LOGITS // rollout.law.vocab_size)
    count = max(1, -(-len(row) // size))

    def part(hidden: Tensor, row: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw, values = heads(hidden)
        logits = rollout.law.logits(raw, t)
        if rollout.candidates is not None:
            logits = restrict(logits, rollout.candidates[row, t])
        logp, entropy = token_statistics(logits, rollout.response_ids[row, t])
        return logp, values, entropy

    def again(*args: Tensor) -> Any:
        return checkpoint(part, *args, use_reentrant=False)

    once = count == 1 or not torch.is_grad_enabled()
    parts = [(part if once else again)(*each) for each in zip(*(x.split(size) for x in (hidden, row, t)), strict=True)]
    found = parts[0] if count == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
    nowhere = hidden.new_zeros(rollout.response_ids.shape, dtype=found[0].dtype)
    logp, values, entropy = (nowhere.to(x.dtype).index_put((row, t), x) for x in found)
    return logp, values, entropy


@torch.no_grad()
def action_log_probs(
    model: _Model, observation: Mapping[str, Any], actions: NDArray[np.int64], law: SamplingLaw, embedded: int
) -> NDArray[np.floating]:
    """log π of `actions` [N] in the environment's observations (arrays [N, L]), of a model that reads `embedded` ids.

    Raises `ConfigError` where something between the environment and here has changed the observations.
    """
    require_observation(observation, embedded)
    if law.truncates and "candidates" not in observation:
        raise ConfigError(
            "the law has top-k or top-p but the observation no candidates: pass on the whole observation, and the "
            "law of the environment that it comes from"
        )
    tensors = {name: torch.as_tensor(np.asarray(values), device=model.device) for name, values in observation.items()}
    ids, mask = left_padded(tensors["input_ids"], tensors["attention_mask"].bool())
    logits, _ = model(ids, mask, keep=1)
    log_probs = law.log_probs(logits[:, -1], tensors["response_mask"].sum(1))
    if law.truncates:
        log_probs = restrict(log_probs, tensors["candidates"])
    return gather_logp(log_probs, torch.as_tensor(actions, device=model.device)).cpu().numpy()


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of right-padded rows [B, L] to the left, and drop columns that no row uses."""
    width = max(int(mask.sum(1).max()), 1)
    columns = torch.arange(width, device=ids.device) - (width - mask.sum(1, keepdim=True))  # [B, width], < 0: padding
    return ids.gather(1, columns.clamp(min=0)), columns >= 0
