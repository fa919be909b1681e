"""Our own form, which holds all that a `Comparison` holds: {"prompt", "responses": […], "ranks": […]}."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rlhf_env.preferences.formats.format import Format, Row, comparison_at, require_items, row_by_row
from rlhf_env.records.jsonl import require_keys
from rlhf_env.types import Comparison

_REQUIRED = {"prompt": str, "responses": list, "ranks": list}
_OPTIONAL = {
    "labeler": str,
    "policy": str,
    "order": list,
    "time": str,
    "policies": list,
    "strength": float,
    "preference": float,
}
_ITEMS = {"responses": str, "ranks": int, "order": int, "policies": str}


def _read(row: Row, where: str, lost: Counter[str]) -> list[Comparison]:
    optional = {key: kind for key, kind in _OPTIONAL.items() if key in row}
    require_keys(row, _REQUIRED | optional, where)
    for key, kind in _ITEMS.items():
        require_items(row.get(key, []), key, kind, where)
    known: dict[str, Any] = {key: tuple(row[key]) if kind is list else row[key] for key, kind in optional.items()}
    return [comparison_at(where, row["prompt"], row["responses"], row["ranks"], **known)]


def _write(comparisons: Sequence[Comparison], lost: Counter[str]) -> list[Row]:
    """A row leaves out what is not known."""
    return [{f.name: value for f in fields(c) if (value := getattr(c, f.name)) != f.default} for c in comparisons]


RANKS = Format(
    sentence="a ranking (responses, ranks)",
    tells=lambda row: isinstance(row.get("responses", ()), list) + ("ranks" in row),
    read=row_by_row(_read),
    write=_write,
)
