"""Gradient descent on the weights of a reward model that may change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields

from torch import Tensor, nn

from rlhf_env.errors import ConfigError
from rlhf_env.models.adapters import adapt, without_adapters
from rlhf_env.models.descent import descend
from rlhf_env.models.freezing import freeze_layers
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.settings import BradleyTerryConfig

_OPTIONS = ("loss", "ties", "tie_parameter", "margin", "label_smoothing", "flip_rate", "center", "l2")


def require_taken(config: BradleyTerryConfig, who: str, takes: Collection[str]) -> None:
    """Raise `ConfigError` where `config` asks for something of the loss that `who` does not know."""
    usual = {field.name: field.default for field in fields(config)}
    if other := [name for name in _OPTIONS if name not in takes and getattr(config, name) != usual[name]]:
        raise ConfigError(f"{who} knows nothing of {' and '.join(other)}: leave it out")


def learn(
    reward: ClassifierReward,
    examples: int,
    loss_of: Callable[[list[int]], tuple[Tensor, dict[str, float]]],
    config: BradleyTerryConfig,
    seed: int,
    *,
    beside: Sequence[nn.Parameter] = (),
) -> Iterator[dict[str, float]]:
    """`descend` on `reward` and the parameters `beside` it, with `config`'s blocks frozen or its adapters in place.

    Afterwards, also where it is broken off, the adapters are merged and what learned before may learn again.
    """
    learning = {name for name, p in reward.model.named_parameters() if p.requires_grad}
    freeze_layers(reward.model, config.freeze_layers)
    if config.lora_rank:
        adapt(reward.model.base_model, rank=config.lora_rank, alpha=2 * config.lora_rank, seed=seed)
    try:
        parameters = [p for p in reward.model.parameters() if p.requires_grad]
        yield from descend([*parameters, *beside], examples, loss_of, config, seed)
    finally:
        if config.lora_rank:
            reward.model = without_adapters(reward.model, merge=True)
        for name, p in reward.model.named_parameters():
            p.requires_grad_(name in learning)
