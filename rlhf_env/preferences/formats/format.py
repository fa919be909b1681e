"""What every form of comparisons in files has, and the few steps that several of them share."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.records.jsonl import require_keys
from rlhf_env.types import Comparison

Row = dict[str, Any]
Placed = tuple[str, Comparison]  # a comparison, and where it was read: "pairs.jsonl:7"


@dataclass(frozen=True)
class Format:
    """One form of rows that hold comparisons.

    `read` and `write` count in the `Counter` that they are given what one side holds and the other cannot, by its name
    in plural: nothing gets lost without being counted.
    """

    sentence: str  #: what a row is, for errors: "a pair (chosen, rejected)"
    tells: Callable[[Mapping[str, Any]], int]  #: how many keys of a row are as in this form; 0: it is none
    read: Callable[[Sequence[tuple[str, Row]], Counter[str]], list[Placed]]  #: rows with their places to comparisons
    write: Callable[[Sequence[Comparison], Counter[str]], list[Row]] | None = None  #: none: it is only read


def row_by_row(
    read: Callable[[Row, str, Counter[str]], Iterable[Comparison]],
) -> Callable[[Sequence[tuple[str, Row]], Counter[str]], list[Placed]]:
    """The `Format.read` of a form whose rows are read one by one, each being any number of comparisons."""

    def read_all(rows: Sequence[tuple[str, Row]], lost: Counter[str]) -> list[Placed]:
        return [(where, comparison) for where, row in rows for comparison in read(row, where, lost)]

    return read_all


def comparison_at(where: str, prompt: str, responses: Sequence[str], ranks: Sequence[int], **known: Any) -> Comparison:
    """A comparison, or the `DataError` of one that is none, with where it was read."""
    try:
        return Comparison(prompt, tuple(responses), tuple(ranks), **known)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def written_by(*policies: str) -> dict[str, Any]:
    """What a `Comparison` calls the policies that wrote each response: one `policy` where they are the same."""
    return {"policy": policies[0]} if len(set(policies)) == 1 else {"policies": policies}


def require_items(items: Sequence[Any], key: str, kind: type, where: str) -> None:
    """Refuse a list `key` with an item that is not of `kind`."""
    for i, item in enumerate(items):
        require_keys({f"{key}[{i}]": item}, {f"{key}[{i}]": kind}, where)


_KNOWN: dict[str, Callable[[Comparison], bool]] = {
    "labelers": lambda c: c.labeler != "",
    "policies": lambda c: any(c.writers),
    "orders of presentation": lambda c: c.order is not None,
    "times": lambda c: c.time is not None,
    "strengths": lambda c: c.strength is not None,
    "soft labels": lambda c: c.preference is not None,
}


def count_lost(comparisons: Sequence[Comparison], lost: Counter[str], *, held: Collection[str]) -> None:
    """Count what comparisons know and a form does not hold; `held` are the names of what it does."""
    for name, is_known in _KNOWN.items():
        if name not in held and (count := sum(map(is_known, comparisons))):
            lost[name] += count


def as_pairs(comparisons: Sequence[Comparison], lost: Counter[str]) -> list[Comparison]:
    """Rankings as comparisons of two, for forms that hold no more; that they were one ranking is lost, and counted."""
    pairs: list[Comparison] = []
    for c in comparisons:
        if len(c.responses) == 2:
            pairs.append(c)
        else:
            lost["rankings of more than two (written as their pairs)"] += 1
            pairs += (_pair(c, i, j) for i, j in itertools.combinations(range(len(c.responses)), 2))
    return pairs


def _pair(c: Comparison, i: int, j: int) -> Comparison:
    lead = c.ranks[j] - c.ranks[i]
    order = None if c.order is None else (0, 1) if c.order.index(i) < c.order.index(j) else (1, 0)
    return replace(
        c,
        responses=(c.responses[i], c.responses[j]),
        ranks=(int(lead < 0), int(lead > 0)),
        order=order,
        policies=None if c.policies is None else (c.policies[i], c.policies[j]),
    )


def decided(comparisons: Sequence[Comparison], lost: Counter[str]) -> list[Comparison]:
    """The pairs in which one of two different responses is preferred, that one first; the others are counted."""
    kept = []
    for c in as_pairs(comparisons, lost):
        if c.responses[0] == c.responses[1]:
            lost["pairs of identical responses"] += 1
        elif c.ranks[0] == c.ranks[1]:
            lost["ties"] += 1
        else:
            kept.append(c if c.ranks[0] == 0 else turned(c))
    return kept


def turned(c: Comparison) -> Comparison:
    """The same judgement of two responses, with the second response first."""
    return replace(
        c,
        responses=c.responses[::-1],
        ranks=c.ranks[::-1],
        order=None if c.order is None else (1 - c.order[0], 1 - c.order[1]),
        policies=None if c.policies is None else c.policies[::-1],
        preference=None if c.preference is None else 1 - c.preference,
    )


_PROMPTS = ("prompt", "instruction", "question", "query", "input", "context")


def prompt_among(fields: Mapping[str, Any], others: Collection[str], where: str) -> str:
    """The text of the field that is the prompt: the only one beside `others`, or the one that is called like one."""
    texts = {name: text for name, text in fields.items() if name not in others and isinstance(text, str)}
    names = list(texts) if len(texts) == 1 else [name for name in _PROMPTS if name in texts][:1]
    if not names:
        raise DataError(
            f"{where}: which field is the prompt? Beside what is compared there is "
            f"{', '.join(map(repr, texts)) or 'none'}; call it {' or '.join(map(repr, _PROMPTS))}"
        )
    return texts[names[0]]
