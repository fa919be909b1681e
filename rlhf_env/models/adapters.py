"""Low-rank adapters: train a few weights beside frozen ones, which serve as the reference at the same time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_env.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_env.models.causal_lm import CausalLM


def add_lora(
    policy: CausalLM, *, rank: int = 8, alpha: int = 16, targets: Sequence[str] | None = None, seed: int = 0
) -> CausalLM:
    """Freeze the body of `policy` and put adapters of `rank` into it, so that only they and the value head learn.

    `policy` itself is changed, and returned; how, and with which errors, says `adapt`.
    """
    adapt(policy.model, rank=rank, alpha=alpha, targets=targets, seed=seed)
    policy.value_head.requires_grad_(True)
    return policy


def adapt(model: nn.Module, *, rank: int, alpha: int, targets: Sequence[str] | None = None, seed: int = 0) -> None:
    """Freeze a Hugging Face model and put adapters of `rank` into it.

    Each linear layer whose name ends in one of `targets` (default: all but the output layer) becomes
    W x + alpha/rank · B A x, with A random by `seed` and B = 0, so that nothing changes at first (Hu et al. 2021,
    arXiv 2106.09685, eq. 3). Adapters of a half-precision body are float32. Raises `ConfigError` where peft is
    missing, a target is not there, or there are adapters already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("LoRA needs peft, which is not installed: pip install 'rlhf-env[lora]'") from error
    if rank < 1 or alpha < 1:
        raise ConfigError(f"rank and alpha must be at least 1, got rank={rank}, alpha={alpha}")
    if any(_adapted(model)):
        raise ConfigError("this model has adapters already")
    layers = _linear_layers(model)
    for target in targets or ():
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(f"there is no linear layer {target!r} to adapt in this model; it has {known}")
    endings = tuple(f".{target}" for target in targets or layers)
    chosen = [name for name in layers if f".{name}".endswith(endings)]
    conv1d = any(type(layer).__name__ == "Conv1D" for layer in layers.values())  # GPT-2 stores W transposed
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, fan_in_fan_out=conv1d)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # steps of a small learning rate vanish in half precision


def without_adapters(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """The model as it was before `add_lora`, around the same weights; or with the adapters `merge`d into new ones."""
    plain = same_weights(model)
    names = list(_adapted(plain))
    if not names:
        raise ConfigError("this policy has no adapters to leave out: call add_lora(policy) first, or use frozen_copy()")
    for name in names:
        adapted: Any = plain.get_submodule(name)
        layer = adapted.base_layer
        if merge:
            weight = layer.weight + adapted.get_delta_weight("default").to(layer.weight.dtype)
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, layer)
    vars(plain).pop("peft_config", None)
    return plain


def same_weights(model: nn.Module) -> nn.Module:
    """New modules around the very same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _adapted(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if hasattr(module, "base_layer"))


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but the output layer, which may be the embedding too."""
    output: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not output
    }
