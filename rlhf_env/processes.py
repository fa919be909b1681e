"""Several processes that train one policy: which of them this one is, and what they tell each other.

Each process writes and learns from its share of the same episodes, chosen by their position in the batch, and all of
them take the same gradient step. `torchrun` starts them; inside `together` they know of each other, elsewhere there is
one. What they exchange as objects is pickled, among themselves only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rlhf_env.errors import ConfigError, RLHFEnvError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_BUCKET = 2**24  # numbers in one message: 64 MB in float32

# This process's number and how many there are. A group that others have made, for a purpose of their own, is not ours.
_rank, _count = 0, 1


@contextmanager
def together(device: str = "cpu") -> Iterator[int]:
    """Inside, the processes that `torchrun` started work as one; yields how many there are.

    Without `torchrun` that is 1, and nothing changes. They talk by NCCL where `device` is "cuda", which then means a
    GPU of its own for each process of a machine, and by gloo elsewhere. Raises `ConfigError` where one GPU is named for
    all of them.
    """
    global _rank, _count
    asked = started_by_torchrun()
    if asked == 1:
        yield 1
        return
    import torch
    import torch.distributed as dist

    kind = torch.device(device)
    if kind.type == "cuda":
        if kind.index is not None:
            raise ConfigError(
                f"{asked} processes cannot share the device {device!r}: say device=cuda, one GPU for each"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    try:
        if dist.get_world_size() != asked:
            raise ConfigError(f"torchrun speaks of {asked} processes, and {dist.get_world_size()} have met")
        _rank, _count = dist.get_rank(), asked
        yield asked
    finally:
        _rank, _count = 0, 1
        dist.destroy_process_group()


def started_by_torchrun() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count() -> int:
    """How many processes work together."""
    return _count


def rank() -> int:
    """The number of this process, from 0."""
    return _rank


def share(total: int) -> slice:
    """Which of `total` rows are this process's: one stretch, as long as the others' or one longer."""
    first, last = (total * each // _count for each in (_rank, _rank + 1))
    return slice(first, last)


def gather(value: T) -> list[T]:
    """What every process says, in the order of their numbers, in every process. Any objects, tensors on the CPU."""
    if _count == 1:
        return [value]
    import torch.distributed as dist

    said: list[T] = [value] * _count
    dist.all_gather_object(said, value)
    return said


def agreed(work: Callable[[], T]) -> T:
    """What `work` returns here; an error of this package that it raises in one process is raised in all."""
    if _count == 1:
        return work()
    found, error = None, None
    try:
        found = work()
    except RLHFEnvError as raised:
        error = raised
    if broken := next((each for each in gather(error) if each is not None), None):
        raise broken
    return found  # type: ignore[return-value]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, many of them in one message."""
    if _count == 1:
        return
    import torch
    import torch.distributed as dist

    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        last = i + 1 == len(tensors) or tensors[i + 1].dtype != tensor.dtype
        if last or sum(each.numel() for each in bucket) >= _BUCKET:
            whole = torch.cat([each.flatten() for each in bucket])
            dist.all_reduce(whole)
            for each, part in zip(bucket, whole.split([each.numel() for each in bucket]), strict=True):
                each.copy_(part.view_as(each))
            bucket = []


def in_first(work: Callable[[], T]) -> T:
    """What `work` returns in process 0, which alone does it; what it raises there, all of them raise."""
    if _count == 1:
        return work()
    import torch.distributed as dist

    found: list[T | Exception | None] = [None]
    if _rank == 0:
        try:
            found = [work()]
        except (RLHFEnvError, OSError) as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]  # type: ignore[return-value]
