"""Argilla 2: what `dataset.records.to_json` and `to_datasets` export; only read.

https://github.com/argilla-io/argilla, argilla/src/argilla/records: `Record.to_dict` in _resource.py ("fields", and
"responses" {question: [{"value", "user_id"}]}), and, flat, `_record_to_dict` in _io/_generic.py ("QUESTION.responses"
with ".users" and ".status"). A ranking's value lists names of fields, the best first (responses.py); in the API it is
[{"rank", "value"}], where equal ranks are a tie. A label's value is the name of the better of two fields, or "tie".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.preferences.formats.format import Format, Row, comparison_at, prompt_among, require_items, row_by_row
from rlhf_env.records.jsonl import require_keys
from rlhf_env.types import Comparison

_TIE = "tie"
_ANSWERS = ".responses"


def _tells(row: Mapping[str, Any]) -> int:
    nested = isinstance(row.get("fields"), dict) + isinstance(row.get("responses"), dict)
    return nested or sum(any(key.endswith(_ANSWERS + column) for key in row) for column in _COLUMNS.values())


def _read(row: Row, where: str, lost: Counter[str]) -> Iterator[Comparison]:
    fields, questions = _nested(row, where)
    answers = []
    for answer in _of_one_question(fields, questions, where):
        status = answer.get("status") or "submitted"  # to_json leaves it out
        if status == "submitted":
            answers.append(answer)
        else:
            lost[f"answers that are {status}"] += 1
    if not answers:
        lost["records without an answer"] += 1
    for answer in answers:
        user = answer.get("user_id")
        names, ranks = _ranking(answer.get("value"), fields, where)
        yield comparison_at(
            where,
            prompt_among(fields, names, where),
            [fields[name] for name in names],
            ranks,
            labeler="" if user is None else str(user),
        )


def _nested(row: Row, where: str) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """The texts of a record, by field, and its answers, by question, of a flat record in the same form."""
    if "fields" in row:
        require_keys(row, {"fields": dict, "responses": dict}, where)
        questions = row["responses"]
        require_keys(questions, dict.fromkeys(questions, list), f"{where}: responses")
        for question, answers in questions.items():
            require_items(answers, question, dict, where)
        return {name: text for name, text in row["fields"].items() if isinstance(text, str)}, questions
    keys = [key for key in row if key.endswith(_ANSWERS)]
    if not keys:
        raise DataError(f"{where}: this is no record: it has neither 'fields' nor answers to a 'QUESTION{_ANSWERS}'")
    questions = {key.removesuffix(_ANSWERS): _answers(row, key, where) for key in keys}
    fields = {k: text for k, text in row.items() if isinstance(text, str) and "." not in k and k not in _NO_FIELDS}
    return fields, questions


_NO_FIELDS = ("id", "status", "_server_id")


def _answers(row: Row, key: str, where: str) -> list[Any]:
    """The answers to a question of a flat record, whose columns are all there or None."""
    columns = {name: row.get(f"{key}{suffix}") for name, suffix in _COLUMNS.items()}
    given = {name: column for name, column in columns.items() if column is not None}
    require_keys(given, dict.fromkeys(given, list), f"{where}: {key}")
    if len({len(column) for column in given.values()}) > 1:
        raise DataError(f"{where}: {key!r} and its .users and .status differ in length")
    return [dict(zip(given, answer, strict=True)) for answer in zip(*given.values(), strict=True)]


_COLUMNS = {"value": "", "user_id": ".users", "status": ".status"}


def _of_one_question(fields: Mapping[str, str], questions: Mapping[str, list[Any]], where: str) -> list[Any]:
    """The answers of the one question that compares fields."""
    comparing = [
        name for name, answers in questions.items() if any(_compares(answer.get("value"), fields) for answer in answers)
    ]
    if len(comparing) > 1:
        raise DataError(f"{where}: several questions compare fields: {', '.join(map(repr, comparing))}; export one")
    if not comparing and any(questions.values()):
        raise DataError(
            f"{where}: no question compares fields: none of {', '.join(map(repr, questions))} has an answer that ranks "
            f"or names some of {', '.join(map(repr, fields)) or 'them (there are none)'}, or says {_TIE!r}"
        )
    return questions[comparing[0]] if comparing else []


def _compares(value: Any, fields: Mapping[str, str]) -> bool:
    if isinstance(value, str):
        return value.lower() == _TIE or _field(value, fields) is not None
    names = [item.get("value") if isinstance(item, dict) else item for item in value] if isinstance(value, list) else []
    return len(names) > 1 and all(isinstance(name, str) and _field(name, fields) is not None for name in names)


def _field(name: str, fields: Mapping[str, str]) -> str | None:
    """The field that an option names; Argilla's own templates call the option of `response_1` "response-1"."""
    return next((field for field in fields if _plain(field) == _plain(name)), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _ranking(value: Any, fields: Mapping[str, str], where: str) -> tuple[list[str], list[int]]:
    """The names of the fields that are compared, in the order of the record, and their ranks."""
    if not _compares(value, fields):
        raise DataError(f"{where}: the answer {value!r} names no fields to compare; the record has {list(fields)}")
    if isinstance(value, str):
        pair = [name for name in fields if re.fullmatch(r".+_\w", _plain(name))]
        if len(pair) != 2:
            raise DataError(
                f"{where}: the label {value!r} is of two fields, whose names end with _1 and _2, _a and _b or such; "
                f"the record has {list(fields)}"
            )
        best = _field(value, fields)
        if value.lower() != _TIE and best not in pair:
            raise DataError(f"{where}: the label {value!r} is none of {pair} and {_TIE!r}")
        return pair, [int(value.lower() != _TIE and name != best) for name in pair]
    rank: dict[str | None, int] = {}
    for place, item in enumerate(value):
        if isinstance(item, dict):
            require_keys(item, {"rank": int, "value": str}, where)
        name = item["value"] if isinstance(item, dict) else item
        rank[_field(name, fields)] = item["rank"] if isinstance(item, dict) else place
    names: Sequence[str] = [name for name in fields if name in rank]
    if len(names) != len(value):
        raise DataError(f"{where}: the ranking {value!r} names a field twice")
    places = sorted(set(rank.values()))
    return list(names), [places.index(rank[name]) for name in names]


ARGILLA = Format(
    sentence="a record of Argilla (fields, responses)",
    tells=_tells,
    read=row_by_row(_read),
)
