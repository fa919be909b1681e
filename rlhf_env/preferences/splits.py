"""Splits of comparisons by prompt, so that what is measured was never learned from."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.text.prompts import hash_fraction
from rlhf_env.types import Comparison

_SPLIT_STREAM = 3


def normalised(prompt: str) -> str:
    """A prompt without what makes near-duplicates: case, white space, and other ways to write the same characters."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


class _Prompted(Protocol):
    @property
    def prompt(self) -> str: ...


Asked = TypeVar("Asked", bound=_Prompted)


def split_by_prompt(comparisons: Sequence[Asked], share: float, seed: int) -> tuple[list[Asked], list[Asked]]:
    """Comparisons to learn from and comparisons held out, about `share` of all, each in the order given.

    Whatever has a prompt is split like comparisons. All of a prompt, and of prompts that are `normalised` alike, are on
    one side, so that what is measured was never seen, and each side has a prompt at least. Where all have the same
    prompt, single comparisons are held out instead.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of comparisons held out must be between 0 and 1, it is {share}")
    if len(comparisons) < 2:
        raise DataError(
            f"at least two comparisons are needed, one to learn from and one to measure on; this is {len(comparisons)}"
        )
    by_prompt: dict[str, list[int]] = {}
    for i, c in enumerate(comparisons):
        by_prompt.setdefault(normalised(c.prompt), []).append(i)
    groups = list(by_prompt.values()) if len(by_prompt) > 1 else [[i] for i in range(len(comparisons))]
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(len(groups))

    held_out, wanted = set[int](), share * len(comparisons)
    for group in (groups[i] for i in order[1:]):  # the first is always learned from
        if abs(len(held_out) + len(group) - wanted) <= abs(len(held_out) - wanted):
            held_out.update(group)
    if not held_out:  # every prompt but the first has more comparisons than are wanted
        held_out.update(min((groups[i] for i in order[1:]), key=len))
    learned = [c for i, c in enumerate(comparisons) if i not in held_out]
    return learned, [c for i, c in enumerate(comparisons) if i in held_out]


def folds_by_prompt(
    comparisons: Sequence[Comparison], count: int
) -> Iterator[tuple[list[Comparison], list[Comparison]]]:
    """What is learned from and what is held out, `count` times: every comparison is held out once.

    A hash of the `normalised` prompt says in which fold it is, so all comparisons of a prompt are in one.
    """
    if count < 2:
        raise ConfigError(f"to learn from some folds and measure on another there must be at least 2, not {count}")
    fold = [int(count * hash_fraction(normalised(c.prompt), "folds")) for c in comparisons]
    for k in range(count):
        yield (
            [c for c, f in zip(comparisons, fold, strict=True) if f != k],
            [c for c, f in zip(comparisons, fold, strict=True) if f == k],
        )


def split_by_shares(
    comparisons: Sequence[Comparison], shares: Mapping[str, float], seed: int = 0
) -> dict[str, list[Comparison]]:
    """The comparisons of each side, by its name and in the order given: "train" has what the `shares` leave.

    A hash of the normalised prompt and the seed alone says on which side a prompt is. So prompts that differ only in
    case or white space are on one side, and a prompt stays where it is when comparisons are added, removed or
    reordered. The price: a side's size is its share of the prompts on average only, as if each were drawn.
    """
    if not all(0 < share < 1 for share in shares.values()) or not 0 < sum(shares.values()) < 1:
        raise ConfigError(f"shares must be between 0 and 1, in sum, too, and leave some for train; got {dict(shares)}")
    if "train" in shares:
        raise ConfigError("train is what the other sides leave: give their shares only")
    names = [*shares, "train"]
    ends = np.cumsum([*shares.values()])
    sides: dict[str, list[Comparison]] = {name: [] for name in names}
    for c in comparisons:
        side = int(np.searchsorted(ends, hash_fraction(normalised(c.prompt), f"preferences {seed}"), side="right"))
        sides[names[side]].append(c)
    if empty := [name for name, side in sides.items() if not side]:
        prompts = len({normalised(c.prompt) for c in comparisons})
        raise DataError(
            f"of {prompts} prompts none fell to {' and '.join(empty)}: give it a larger share, or another seed"
        )
    return sides
