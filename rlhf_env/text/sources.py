"""Where rows of data come from: JSON Lines, JSON arrays, Hugging Face data sets and files of one text per line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.jsonl import read_json_rows, read_numbered_jsonl, require_keys, require_valid


def read_rows(source: str | Path, *, required: Mapping[str, type] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Every row of a `.jsonl` file or of the data set `hf:NAME[:SPLIT]`, each with where it stands ("pairs.jsonl:7").

    A `.json` file holds one array of rows, which are counted from 0 ("export.json row 7"): so annotation tools export.
    NAME is a folder written by `save_to_disk` or the name of a data set on the hub, SPLIT is "train" if it is left out;
    its rows are counted from 0 ("hf:NAME:SPLIT row 7"), and None in them is a missing key. All kinds of rows are
    checked as `read_jsonl` says, `required` keys and types included.
    """
    if str(source).startswith("hf:"):
        return _data_set_rows(str(source), required or {})
    if Path(source).suffix == ".jsonl":
        return [(f"{source}:{number}", row) for number, row in read_numbered_jsonl(source, required=required)]
    if Path(source).suffix == ".json":
        rows = [(f"{source} row {number}", row) for number, row in enumerate(read_json_rows(source))]
        for where, row in rows:
            require_keys(row, required or {}, where)
        return rows
    raise DataError(
        f"{source}: data are .jsonl files, .json files of one array, Hugging Face data sets (hf:NAME[:SPLIT]) or, for "
        "texts, .txt files"
    )


def has_lines(source: str | Path) -> bool:
    """Whether `source` is a file for `read_lines`; everything else is for `read_rows`."""
    return not str(source).startswith("hf:") and Path(source).suffix == ".txt"


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """Every line of a UTF-8 text file as it stands, each with where it stands ("texts.txt:7").

    A byte-order mark, CRLF and blank lines at the end are accepted; other blank lines and an empty file are errors.
    """
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    lines = []
    for number, line in enumerate(data, start=1):
        try:
            lines.append((f"{path}:{number}", line.removesuffix(b"\r").decode()))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: byte {error.start + 1} is not UTF-8") from error
    while lines and not lines[-1][1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{path}: the file is empty; one text per line was expected")
    for where, line in lines:
        if not line.strip():
            raise DataError(f"{where}: blank line; a .txt file has one text per line (use .jsonl otherwise)")
    return lines


def _data_set_rows(source: str, required: Mapping[str, type]) -> list[tuple[str, dict[str, Any]]]:
    name, _, split = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f"{source}: a data set is named as hf:NAME or hf:NAME:SPLIT")
    try:
        values = list(_load_data_set(name, split).with_format(None))
    except (ConfigError, DataError):
        raise
    except Exception as error:  # reading a data set runs builders and decoders, which raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{source}: the data set cannot be read: {reason}") from error
    if not values:
        raise DataError(f"{source}: the data set is empty")
    rows = [(f"hf:{name}:{split or 'train'} row {i}", _without_none(row)) for i, row in enumerate(values)]
    for where, row in rows:
        require_valid(row, where)
        require_keys(row, required, where)
    return rows


def _load_data_set(name: str, split: str) -> Any:
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise ConfigError("reading Hugging Face data sets needs `datasets`: pip install 'rlhf-env[hf]'") from error
    if not Path(name).is_dir():
        if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise DataError(f"hf:{name}: there is no folder {name}")
        return load_dataset(name, split=split or "train")
    try:
        data = load_from_disk(name)
    except IndexError as error:  # what it makes of a folder that was saved without rows
        raise DataError(f"hf:{name}: the data set is empty") from error
    if isinstance(data, DatasetDict):
        if (split or "train") not in data:
            raise DataError(f"hf:{name}: there is no split {split or 'train'!r}; there are {', '.join(map(str, data))}")
        return data[split or "train"]
    if split and split != str(data.split):
        raise DataError(f"hf:{name}: the folder holds one data set without splits, so leave out ':{split}'")
    return data


def _without_none(value: Any) -> Any:
    """Without the keys that hold None: Arrow fills those that a row lacks."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
