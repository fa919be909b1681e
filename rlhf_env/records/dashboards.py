"""Rows of metrics for TensorBoard and Weights & Biases: numbers, never texts of prompts and responses."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

from rlhf_env.errors import ConfigError
from rlhf_env.records.atomic import write_atomic

Tell = Callable[[float, dict[str, float]], None]


def require_dashboards(names: Sequence[str]) -> None:
    """Refuse those whose package is not installed."""
    for name in names:
        try:
            import_module(name)
        except ImportError:
            raise ConfigError(f"log_to: {name} is not installed: pip install 'rlhf-env[{name}]'") from None


@contextmanager
def open_dashboards(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], *, start: int = 0
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that shows each row of a run in `folder` on the dashboards `names`, by its "update".

    `start` is the update after which a resumed run goes on: what was shown of later ones is replaced (TensorBoard) or
    stays (Weights & Biases, which takes every update once), so none is there twice.
    """
    with ExitStack() as stack:
        tell = [stack.enter_context(_DASHBOARDS[name](folder, config, start)) for name in names]

        def show(row: Mapping[str, Any]) -> None:
            numbers = {k: v for k, v in row.items() if _is_number(v) and math.isfinite(v)}
            update = numbers.pop("update")
            for each in tell:
                each(update, numbers)

        yield show


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@contextmanager
def _tensorboard(folder: Path, config: Mapping[str, Any], start: int) -> Iterator[Tell]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1) as writer:

        def tell(update: float, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, update)
            writer.flush()  # a killed run goes on from its checkpoint, and shows nothing from before it again

        yield tell


@contextmanager
def _wandb(folder: Path, config: Mapping[str, Any], start: int) -> Iterator[Tell]:
    wandb: Any = import_module("wandb")
    identity = folder / "wandb" / "id"
    if not identity.is_file():
        identity.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(identity, uuid.uuid4().hex[:8].encode())
    run = wandb.init(
        project="rlhf-env",
        name=folder.resolve().name,
        id=identity.read_text(),
        dir=str(folder),
        config=dict(config),
        resume="allow",
    )
    try:
        yield lambda update, numbers: run.log(numbers, step=update)
    finally:
        run.finish()


_DASHBOARDS = {"tensorboard": _tensorboard, "wandb": _wandb}
