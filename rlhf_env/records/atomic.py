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

    A reader sees all of the old one or all of the new one, and between two renames none: after a kill there,
    `settle_folder` puts the old one back.
    """
    settle_folder(path)
    partial, old = _beside(path)
    partial.mkdir(parents=True)
    fill(partial)
    for written in [*partial.rglob("*"), partial]:
        sync(written)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle_folder(path: Path) -> None:
    """Remove what a killed `write_folder_atomic` left beside `path`; the old one returns where none was in place."""
    partial, old = _beside(path)
    if old.exists() and not path.exists():
        os.rename(old, path)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)


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


def _beside(path: Path) -> tuple[Path, Path]:
    """Where the new folder is written, and where the old one waits until the new one is in its place."""
    return path.with_name(f".{path.name}.new.tmp"), path.with_name(f".{path.name}.old.tmp")
