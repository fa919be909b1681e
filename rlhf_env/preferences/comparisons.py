"""Comparisons in files: read in any of the `FORMATS`, written in most of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.formats.argilla import ARGILLA
from rlhf_env.preferences.formats.format import Format
from rlhf_env.preferences.formats.graded import GRADED
from rlhf_env.preferences.formats.hh import HH
from rlhf_env.preferences.formats.labelstudio import LABEL_STUDIO
from rlhf_env.preferences.formats.pandalm import PANDALM
from rlhf_env.preferences.formats.ranks import RANKS
from rlhf_env.preferences.formats.trl import TRL
from rlhf_env.records.jsonl import write_jsonl
from rlhf_env.text.sources import read_rows
from rlhf_env.types import Comparison

FORMATS: dict[str, Format] = {
    "ranks": RANKS,
    "trl": TRL,
    "hh": HH,
    "pandalm": PANDALM,
    "graded": GRADED,
    "argilla": ARGILLA,
    "labelstudio": LABEL_STUDIO,
}


@dataclass(frozen=True)
class Reading:
    """What was read from a source of comparisons."""

    form: str  #: one of `FORMATS`
    comparisons: list[Comparison]
    places: list[str]  #: where each was read: "pairs.jsonl:7"
    lost: Counter[str]  #: what the source holds and comparisons do not, by its name: cancelled annotations, …


def read_comparisons(source: str | Path, form: str | None = None) -> list[Comparison]:
    """The comparisons of a `.jsonl` or `.json` file or of the data set `hf:NAME[:SPLIT]`, in their order.

    The keys of the rows say in which of the `FORMATS` they are, or `form` does; one file holds one. Where several
    people judged, each judgement is a comparison. Other keys are ignored. `DataError` names file, line and reason.
    """
    return load_comparisons(source, form).comparisons


def load_comparisons(source: str | Path, form: str | None = None) -> Reading:
    """`read_comparisons` with the places of the comparisons, and with what could not be read."""
    rows = read_rows(source)
    name = _detected(rows) if form is None else form
    if name not in FORMATS:
        raise ConfigError(f"'{name}' is no form of comparisons: choose one of {', '.join(FORMATS)}")
    lost = Counter[str]()
    placed = FORMATS[name].read(rows, lost)
    if not placed:
        raise DataError(f"{source}: there is no judgement to read: {_counts(lost)}")
    return Reading(name, [comparison for _, comparison in placed], [where for where, _ in placed], lost)


def write_comparisons(
    path: str | Path, comparisons: Iterable[Comparison], form: str = "ranks"
) -> tuple[int, Counter[str]]:
    """Write comparisons in one of the `FORMATS`; returns the number of rows, and what was lost, counted by its name.

    As "ranks" nothing is lost: `read_comparisons` makes equal records of it. The file is replaced whole or not at all.
    """
    comparisons = list(comparisons)
    write = FORMATS[form].write if form in FORMATS else None
    if write is None:
        writable = ", ".join(name for name, each in FORMATS.items() if each.write is not None)
        raise ConfigError(f"comparisons are not written as '{form}': choose one of {writable}")
    lost = Counter[str]()
    rows = write(comparisons, lost)
    if not rows:
        reason = f"; left out: {_counts(lost)}" if lost else ""
        raise DataError(f"{path}: there are no comparisons to write{reason}")
    write_jsonl(path, rows)
    return len(rows), lost


def distinct(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], int]:
    """The comparisons with at least two different responses, and how many others there were.

    A ranking of identical texts teaches nothing about them, whatever it says.
    """
    kept = [c for c in comparisons if len(set(c.responses)) > 1]
    return kept, len(comparisons) - len(kept)


def _detected(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The form of the first row, which all have."""
    (first, row), *others = rows
    found = _forms(row)
    if not found:
        known = ", ".join(f"{name}: {each.sentence}" for name, each in FORMATS.items())
        keys = ", ".join(map(repr, row)) or "no key"
        raise DataError(f"{first}: this row is no comparison in a known form ({known}); it has {keys}")
    if len(found) > 1:
        raise DataError(
            f"{first}: this row may be {' or '.join(FORMATS[name].sentence for name in found)}; say which: "
            f"`rlhf-env preferences convert --from` {' or '.join(found)}"
        )
    for where, other in others:
        if (forms := _forms(other)) != found:
            what = " or ".join(FORMATS[name].sentence for name in forms) or "in no known form"
            raise DataError(
                f"{where}: this row is {what}, but {first} is {FORMATS[found[0]].sentence}; one file holds one form, "
                "so split it in two"
            )
    return found[0]


def _forms(row: dict[str, Any]) -> list[str]:
    """The names of the forms of which a row has the most keys; none where it has none."""
    told = {name: each.tells(row) for name, each in FORMATS.items()}
    return [name for name, keys in told.items() if keys and keys == max(told.values())]


def _counts(lost: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in lost.items())
