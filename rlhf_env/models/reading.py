"""What a model says of responses and of observations, given nothing but its forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_env.errors import ConfigError
from rlhf_env.functional import gather_logp, restrict
from rlhf_env.models.observation import require_observation
from rlhf_env.types import Rollout, SamplingLaw


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
