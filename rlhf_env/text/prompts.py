"""Where prompts come from, and in which order they are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.jsonl import read_jsonl


def load_prompts(path: str | Path, *, field: str = "prompt") -> list[str]:
    """Prompts of a file: `.jsonl` (one object per line, its `field`) or `.txt` (one prompt per line)."""
    path = Path(path)
    if path.suffix == ".jsonl":
        prompts = [row[field] for row in read_jsonl(path, required={field: str})]
    elif path.suffix == ".txt":
        prompts = _read_lines(path)
    else:
        raise DataError(f"{path}: prompts are read from .jsonl or .txt files")
    if not prompts:
        raise DataError(f"{path}: the file holds no prompts")
    return prompts


def prompt_indices(seed: int, start: int, count: int, size: int) -> NDArray[np.int64]:
    """Which of `size` prompts stand at positions start … start + count − 1 of an endless shuffled sequence: [count].

    Each epoch of `size` positions is a permutation made from (seed, epoch) alone, so a resumed run needs only `start`.
    """
    if size < 1 or start < 0 or count < 0:
        raise ConfigError(f"prompt positions need size ≥ 1, start ≥ 0, count ≥ 0; got {size}, {start}, {count}")
    first, last = start // size, (start + count) // size
    order = [np.random.default_rng([seed, epoch]).permutation(size) for epoch in range(first, last + 1)]
    return np.concatenate(order)[start - first * size :][:count]


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not valid UTF-8 at byte {error.start} of the line") from error
    while prompts and not prompts[-1].strip():
        prompts.pop()
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise DataError(f"{path}:{number}: blank line; a .txt file has one prompt per line (use .jsonl otherwise)")
    return prompts
