"""Which weights of a Hugging Face model stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rlhf_env.errors import ConfigError


def layers_of(model: Any) -> Sequence[nn.Module]:
    """The blocks of a transformer, in their order."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ConfigError(f"cannot find the {count} layers of {type(model).__name__}")


def freeze_layers(model: Any, k: int) -> None:
    """Keep the embeddings and the first `k` blocks as they are; 0: nothing. `ConfigError` where there are fewer."""
    blocks = layers_of(model) if k else []
    if not 0 <= k <= len(blocks):
        raise ConfigError(f"cannot freeze {k} of {len(blocks)} layers")
    if k > 0:
        for module in [*(m for m in model.modules() if isinstance(m, nn.Embedding)), *blocks[:k]]:
            module.requires_grad_(False)
