"""Files that are there whole or not at all, whenever the process is killed or the power fails."""

from __future__ import annotations

import os
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


def is_partial(path: Path) -> bool:
    """Whether a file is what `write_atomic` was writing when its process was killed."""
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
