"""Policies whose weights are spread over processes: fully sharded data parallelism.

Zhao et al. 2023, "PyTorch FSDP: experiences on scaling fully sharded data parallel" (arXiv 2304.11277); Rajbhandari et
al. 2020, "ZeRO" (arXiv 1910.02054). Between uses each process holds its part of every weight, of its gradient and of
Adam's state. A gradient step gathers one block after another; sampling and evaluation, in which every process goes its
own way, gather all weights for as long as they last.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_env import processes

_models: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()  # those whose weights are spread, in order
_together = False  # whether they are gathered, at the moment


def spread(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Leave this process its part of the weights of `model`, which are gathered block by block when it runs."""
    from torch.distributed.device_mesh import init_device_mesh  # half a second of imports that few need
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Logits are a view, and nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (processes.count(),))
    # Gradients are added up in float32 at the least.
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    policy = MixedPrecisionPolicy(reduce_dtype=dtype)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    _models[model] = None


def forget() -> None:
    """Take no more notice of models that were spread before.

    When the garbage collector finds them differs between processes, and all must gather the same.
    """
    _models.clear()


def is_spread(model: nn.Module) -> bool:
    """Whether this process holds no more than its part of the weights, at the moment."""
    return model in _models and not _together


def own_class(model: nn.Module) -> type:
    """The class of a model as it was before its weights were spread."""
    return type(model).__mro__[2] if model in _models else type(model)  # [0] is FSDP's mixture of [1] and [2]


@contextmanager
def gathered() -> Iterator[None]:
    """Inside, every process holds all weights of all policies, to read. All have to enter, and to leave."""
    global _together
    if _together or not _models:
        yield
        return
    units: list[Any] = [module for model in _models for module in model.modules() if hasattr(module, "unshard")]
    for unit in units:
        unit.unshard()
    _together = True
    try:
        yield
    finally:
        _together = False
        for unit in units:
            unit.reshard()


def is_part(tensor: Tensor) -> bool:
    """Whether this tensor is spread over the processes."""
    if not _models:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part(tensor: Any) -> Tensor:
    """What this process holds of a weight or its gradient: the same memory; all of it where it is not spread."""
    return tensor.detach().to_local() if is_part(tensor) else tensor


def whole(mine: Tensor, like: Any) -> Tensor:
    """All of what is spread as the weight `like` is, from the part of each process, on the CPU. All have to ask."""
    if not is_part(like) or mine.dim() == 0:
        return mine
    from torch.distributed.tensor import DTensor

    place = (like.device_mesh, like.placements)
    return DTensor.from_local(mine, *place, shape=like.shape, stride=like.stride()).full_tensor().cpu()


def part_of(everything: Tensor, like: Any) -> Tensor:
    """What this process is to hold of `everything`, which is to be spread as the weight `like` is."""
    if not is_part(like) or everything.dim() == 0:
        return everything
    from torch.distributed.tensor import distribute_tensor

    there = everything.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None).to_local()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, whole; tied weights are one tensor. All processes have to ask."""
    found: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    return {name: found.setdefault(id(value), whole(part(value), value)) for name, value in state.items()}


@torch.no_grad()
def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a whole `state` into a model, spread or not."""
    for name, value in model.state_dict(keep_vars=True).items():
        part(value).copy_(part_of(state[name], value))
