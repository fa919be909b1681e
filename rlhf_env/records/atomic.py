"""Files and folders that are there whole or not at all, whenever the process is killed or the power fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data` in one step: a reader sees the old bytes or the new, never a mixture."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_folder_atomic(path: Path, fill: Callable[[Path], None]) -> None:
    """Replace the folder at `path` by the one that `fill` is given to write to.

    A reader sees all of the old one or all of the new one, and between two renames none.
    """
    partial, old = (path.with_name(f".{path.name}.{word}.tmp") for word in ("new", "old"))
    for left in (partial, old):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    for written in [*partial.rglob("*"), partial]:
        sync(written)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_partial(path: Path) -> bool:
    """Whether a file or folder is what was being written when its process was killed."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk (Windows cannot do this to a folder)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
