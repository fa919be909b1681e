"""Where prompts come from, and in which order they are used."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.text.corpus import BUILT_IN_REVIEWS, review_openings
from rlhf_env.text.sources import has_lines, read_lines, read_rows


def load_prompts(path: str | Path, *, field: str = "prompt") -> list[str]:
    """Prompts of a `.txt` file (one per line), a `.jsonl` file or the data set `hf:NAME[:SPLIT]` (their `field`).

    "builtin:reviews" are the openings of this package's film reviews.
    """
    if path == BUILT_IN_REVIEWS:
        return review_openings()
    if has_lines(path):
        return [line for _, line in read_lines(path)]
    return [row[field] for _, row in read_rows(path, required={field: str})]


def openings(texts: Sequence[str], words: int) -> list[str]:
    """The distinct first `words` words of the texts that have more, in order of appearance, spaced as they are there.

    They make prompts out of whole texts: each is how some text begins, up to the end of a word.
    """
    if words < 1:
        raise ConfigError(f"an opening has at least 1 word, got {words}")
    found: dict[str, None] = {}
    for text in texts:
        ends = [word.end() for word in itertools.islice(re.finditer(r"\S+", text), words + 1)]
        if len(ends) > words:
            found[text[: ends[words - 1]]] = None
    if not found:
        raise DataError(
            f"none of the {len(texts)} texts has more than {words} words, so none leaves something to write after them"
        )
    return list(found)


def split_by_hash(texts: Sequence[str], share: float, salt: str = "") -> tuple[list[str], list[str]]:
    """The texts of the two sides of a split, the second of about `share` of all.

    The side of a text is decided by its own SHA-256 (and `salt`), so it stays where it is when others are added,
    removed or reordered, and equal texts are never on both sides.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of a split must be between 0 and 1, it is {share}")
    sides: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        sides[hash_fraction(text, salt) < share].append(text)
    return sides


def hash_fraction(text: str, salt: str = "") -> float:
    """A number in [0, 1), evenly spread over texts, made of the SHA-256 of `salt` and the text alone."""
    digest = hashlib.sha256(f"{salt}\0{text}".encode(errors="surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def prompt_indices(seed: int, start: int, count: int, size: int) -> NDArray[np.int64]:
    """Which of `size` prompts stand at positions start … start + count − 1 of an endless shuffled sequence: [count].

    Each epoch of `size` positions is a permutation made from (seed, epoch) alone, so a resumed run needs only `start`.
    """
    if size < 1 or start < 0 or count < 0:
        raise ConfigError(f"prompt positions need size ≥ 1, start ≥ 0, count ≥ 0; got {size}, {start}, {count}")
    first, last = start // size, (start + count) // size
    order = [np.random.default_rng([seed, epoch]).permutation(size) for epoch in range(first, last + 1)]
    return np.concatenate(order)[start - first * size :][:count]
