"""What a policy learns to imitate: responses to prompts, or plain texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.records.jsonl import require_keys
from rlhf_env.text.corpus import BUILT_IN_REVIEWS, film_reviews
from rlhf_env.text.sources import has_lines, read_lines, read_rows


@dataclass(frozen=True)
class Demonstration:
    """A good response to a prompt."""

    prompt: str  #: empty: the response is plain text, learned whole
    response: str
    where: str = ""  #: where it was read, for errors: "texts.txt:7"


def load_demonstrations(source: str | Path) -> list[Demonstration]:
    """Demonstrations of a `.txt` file (one text per line), a `.jsonl` file or the data set `hf:NAME[:SPLIT]`.

    All rows of a source have `text`, or all have `prompt` and `response` (or `completion`, as TRL calls it); other keys
    are ignored. Raises `DataError` with file, line and reason. "builtin:reviews" are the film reviews of this package.
    """
    if source == BUILT_IN_REVIEWS:
        return [Demonstration("", text, f"{source} {number}") for number, text in enumerate(film_reviews())]
    if has_lines(source):
        return [Demonstration("", line, where) for where, line in read_lines(source)]
    rows = read_rows(source)
    (first, kind) = rows[0][0], _kind(*rows[0])
    for where, row in rows:
        if _kind(where, row) != kind:
            raise DataError(
                f"{where}: the row has {_kind(where, row)!r} where {first} has {kind!r}: use rows of one kind"
            )
    return [_demonstration(where, row, kind) for where, row in rows]


def _kind(where: str, row: dict[str, Any]) -> str:
    """Which key of a row holds what is to be learned."""
    kinds = [key for key in ("text", "response", "completion") if key in row]
    if len(kinds) == 1:
        return kinds[0]
    has = f"the row has {', '.join(map(repr, row)) or 'none'}"
    if not kinds:
        raise DataError(f"{where}: a demonstration has the key 'text', or 'prompt' and 'response'; {has}")
    raise DataError(f"{where}: a demonstration has one of {', '.join(map(repr, kinds))}, not several; {has}")


def _demonstration(where: str, row: dict[str, Any], kind: str) -> Demonstration:
    require_keys(row, {kind: str} if kind == "text" else {"prompt": str, kind: str}, where)
    if not row[kind].strip():
        raise DataError(f"{where}: {kind!r} is blank, so there is nothing to learn from it")
    return Demonstration("" if kind == "text" else row["prompt"], row[kind], where)
