"""JSON Lines, strictly: what is read is an object per line without surprises, what is written can be read back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.records.atomic import write_atomic


def read_jsonl(path: str | Path, *, required: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """Every row of a UTF-8 file of JSON objects; `required` names keys that each row must have, and their types.

    Types are `str`, `int`, `float` (integers too), `bool`, `list` and `dict`. A byte-order mark, CRLF and blank lines
    are accepted. An empty file, malformed JSON, duplicate keys, numbers that are not finite, lone surrogates and rows
    that are no object raise `DataError` with file, line and reason.
    """
    return [row for _, row in read_numbered_jsonl(path, required=required)]


def read_numbered_jsonl(
    path: str | Path, *, required: Mapping[str, type] | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """The rows of `read_jsonl`, each with the number of its line, from 1 and blank lines counted."""
    rows = list(_numbered_rows(_read(path), str(path), required or {}))
    if not rows:
        raise DataError(f"{path}: the file is empty; one JSON object per line was expected")
    return rows


def parse_jsonl(data: bytes, name: str, required: Mapping[str, type]) -> list[dict[str, Any]]:
    """The rows in `data`, which may be none; errors call the file `name`."""
    return [row for _, row in _numbered_rows(data, name, required)]


def require_keys(row: Mapping[str, Any], required: Mapping[str, type], where: str) -> None:
    """Refuse a row without the `required` keys, or with values of other types, as `read_jsonl` does."""
    for key, kind in required.items():
        if key not in row:
            raise DataError(f"{where}: the key {key!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}")
        if not _is_a(row[key], kind):
            raise DataError(f"{where}: {key!r} must be {_NAMES[kind]}, it is {_kind(row[key])}")


def require_valid(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row that did not come from JSON for the values that JSON cannot hold: NaN, infinity, lone surrogates."""
    for key, value in row.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False, default=repr).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: {key!r} holds half of a surrogate pair, which is no character") from error
        except ValueError as error:
            raise DataError(f"{where}: {key!r} holds a number that is not finite: NaN or infinity") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The one JSON object that a whole UTF-8 file holds, read as strictly as a row of `read_jsonl`."""
    return _parse_object(_read(path).removeprefix(_BYTE_ORDER_MARK), str(path))


def read_json_rows(path: str | Path) -> list[dict[str, Any]]:
    """The objects of one JSON array that a whole UTF-8 file holds, each read as strictly as a row of `read_jsonl`.

    `DataError` calls them rows and counts them from 0; what is no JSON at all it finds by line and column.
    """
    value = _parse(_read(path).removeprefix(_BYTE_ORDER_MARK), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: a JSON array of objects was expected, this is {_kind(value)}")
    if not value:
        raise DataError(f"{path}: the file is empty; a JSON array of objects was expected")
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number}: a JSON object was expected, this is {_kind(row)}")
    return value


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, indented, to a file that is replaced whole or not at all."""
    write_atomic(Path(path), _encode(value, str(path), indent=2) + b"\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write all `rows` to a file at once: it is replaced whole or not at all."""
    lines = [_encode(row, f"{path}:{number}") + b"\n" for number, row in enumerate(rows, start=1)]
    write_atomic(Path(path), b"".join(lines))


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one row at the end of a file, in one write, and leave nothing in a buffer.

    A missing value is a missing key: a number that is not finite raises `DataError` with its key.
    """
    line = _encode(row, str(path)) + b"\n"
    with open(path, "ab", buffering=0) as file:
        file.write(line)


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _parse_object(data: bytes, name: str, line: int | None = None) -> dict[str, Any]:
    row = _parse(data, name, line)
    if not isinstance(row, dict):
        raise DataError(
            f"{name if line is None else f'{name}:{line}'}: a JSON object was expected, this is {_kind(row)}"
        )
    return row


def _parse(data: bytes, name: str, line: int | None = None) -> Any:
    where = name if line is None else f"{name}:{line}"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8") from error
    try:
        value = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_number, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{(line or 1) + error.lineno - 1}:{error.colno}: malformed JSON: {error.msg}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if "\\u" in text:  # UTF-8 has no surrogates, so only an escape can bring one in
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: half of a surrogate pair stands alone, which is no character") from error
    return value


def _numbered_rows(data: bytes, name: str, required: Mapping[str, type]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(data.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        if line.strip():
            row = _parse_object(line, name, number)
            require_keys(row, required, f"{name}:{number}")
            yield number, row


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return row


def _refuse_number(literal: str) -> float:
    raise ValueError(f"{literal} is no JSON; leave the key out where a value is missing")


def _finite_float(literal: str) -> float:
    value = float(literal)
    return value if math.isfinite(value) else _refuse_number(literal)


_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # a bool is an int to Python, not to JSON
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), f"a {type(value).__name__}")


def _encode(row: Mapping[str, Any], where: str, indent: int | None = None) -> bytes:
    def encode(value: Mapping[str, Any]) -> bytes:
        text = json.dumps(dict(value), ensure_ascii=False, allow_nan=False, indent=indent, default=_scalar)
        return text.encode("utf-8")

    try:
        return encode(row)
    except (TypeError, ValueError):
        for key, value in row.items():
            try:
                encode({key: value})
            except (TypeError, ValueError) as error:
                raise DataError(f"{where}: cannot write {key!r}: {error}") from error
        raise


def _scalar(value: Any) -> Any:
    if getattr(value, "shape", None) == ():  # a NumPy or torch number
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")
