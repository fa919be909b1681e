"""Weight-averaged reward models: one model whose weights are the mean of several models' weights.

Ramé et al. 2024 (WARM, arXiv 2401.12187): it costs one forward pass where an ensemble costs one for each member, and
labels that err mislead it less. It holds for models fine-tuned from the same pretrained weights; of others, the mean of
the weights is the weights of nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_env.errors import ConfigError
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.heads import stored
from rlhf_env.text.codec import Codec


def average_weights(
    members: Sequence[ClassifierReward | str | Path],
    prompts: Sequence[str] | None = None,
    responses: Sequence[str] | None = None,
) -> ClassifierReward:
    """The classifier whose weights are the mean of the members', normalised on these responses of a reference.

    Members are classifiers or their folders, all of one architecture, tokenizer and way of reading; any difference
    raises `ConfigError`. The members' normalisers are not the average's: where one has a normaliser, the responses must
    be given. `save_pretrained` leaves a folder like any other reward model's.
    """
    if not members:
        raise ConfigError("there are no reward models whose weights to average")
    if (prompts is None) != (responses is None):
        raise ConfigError("to normalise on responses, give their prompts, too")
    models = [one if isinstance(one, ClassifierReward) else ClassifierReward(one) for one in members]
    first = models[0]
    for i, other in enumerate(models[1:], start=1):
        if differs := _differences(first, other):
            raise ConfigError(
                f"weights are averaged of models that differ in nothing else, and member {i} is not like member 0: "
                f"{differs}"
            )
    if responses is None and any((one.mean, one.std) != (0.0, 1.0) for one in models):
        raise ConfigError(
            "a member is normalised, and its mean and std are not those of averaged weights: give prompts and "
            "responses of a reference to normalise the average on"
        )
    model = copy.deepcopy(first.model)
    with torch.no_grad():
        states = [one.model.state_dict() for one in models]
        for name, weight in model.state_dict().items():
            weight.copy_(_mean(name, [state[name] for state in states]))
    averaged = ClassifierReward.from_model(
        model,
        first.tokenizer,
        label=first.label,
        of=first.of,  # type: ignore[arg-type]
        batch_size=first.batch_size,
        max_length=first.max_length,
    )
    if prompts is not None and responses is not None:
        averaged.normalize_on(prompts, responses)
    return averaged


def _mean(name: str, weights: Sequence[Tensor]) -> Tensor:
    """In float64, so that equal weights have exactly themselves for a mean."""
    if weights[0].is_floating_point():
        return torch.stack([weight.double() for weight in weights]).mean(0)
    if not all(torch.equal(weight, weights[0]) for weight in weights):
        raise ConfigError(f"{name} holds whole numbers that differ between the members: there is no mean of them")
    return weights[0]


def _differences(first: ClassifierReward, other: ClassifierReward) -> str:
    """In what two models differ other than in their weights and normalisers; "" where in nothing."""
    if type(first.model) is not type(other.model):
        return f"it is a {type(other.model).__name__}, no {type(first.model).__name__}"
    a, b = (_shapes(one) for one in (first, other))
    if names := sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)):
        return f"another shape or name of {', '.join(names[:3])}"
    a, b = (_settings(one) for one in (first, other))
    if names := sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)):
        return f"another {', '.join(names[:5])}"
    return ""


def _shapes(reward: ClassifierReward) -> dict[str, Any]:
    return {name: (weight.shape, weight.dtype) for name, weight in reward.model.state_dict().items()}


def _settings(reward: ClassifierReward) -> dict[str, Any]:
    """What makes equal weights give equal logits."""
    config = reward.model.config.to_dict()
    kept = {k: v for k, v in config.items() if not k.startswith(("reward_", "_", "transformers_"))}
    read = {"vocabulary": Codec.of(reward.tokenizer).fingerprint, "max_length": reward.max_length}
    head = stored(reward.head)
    moments = ("means", "stds")  # of a head's logits, which a reference's responses settle anew
    made = {"head": head["reward_kind"]} | {k: v for k, v in head["reward_head"].items() if k not in moments}
    return kept | read | made | {"label": reward.label, "of": reward.of}
