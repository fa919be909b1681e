"""Label Studio's JSON export, of projects with `<Pairwise>` or `<Ranker>`; only read.

https://labelstud.io/guide/task_format ("data", and "annotations" with "completed_by", "created_at", "was_cancelled",
"lead_time" and "result"); https://github.com/HumanSignal/label-studio, docs/source/tags/pairwise.md and ranker.md:
results of "type" "pairwise" have the value {"selected": "left" or "right"}, those of "type" "ranker" {"ranker": ids},
the best first, of a list of items {"id", "title", "body"}. Neither has a form for a tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.preferences.formats.format import Format, Row, comparison_at, prompt_among, require_items, row_by_row
from rlhf_env.records.jsonl import require_keys
from rlhf_env.types import Comparison

_SIDES = {"left": (0, 1), "right": (1, 0)}
_ENDS = (("1", "2"), ("a", "b"), ("A", "B"), ("left", "right"))


def _read(row: Row, where: str, lost: Counter[str]) -> Iterator[Comparison]:
    require_keys(row, {"data": dict, "annotations": list}, where)
    require_items(row["annotations"], "annotations", dict, where)
    if not row["annotations"]:
        lost["tasks without an annotation"] += 1
    for kind in ("predictions", "drafts"):
        if isinstance(row.get(kind), list) and row[kind]:
            lost[kind] += len(row[kind])
    for i, annotation in enumerate(row["annotations"]):
        here = f"{where}: annotations[{i}]"
        require_keys(annotation, {"result": list}, here)
        require_items(annotation["result"], "result", dict, here)
        results = [each for each in annotation["result"] if each.get("type") in ("pairwise", "ranker")]
        if annotation.get("was_cancelled") is True:
            lost["cancelled annotations"] += 1
        elif not results:
            lost["annotations that compare nothing"] += 1
        elif len(results) > 1:
            raise DataError(f"{here}: {len(results)} results compare something, one is read; export one of them")
        else:
            lost.update({"seconds taken": 1} if "lead_time" in annotation else {})
            yield _comparison(row["data"], annotation, results[0], here)


def _comparison(data: Row, annotation: Row, result: Row, where: str) -> Comparison:
    require_keys(result, {"value": dict}, where)
    known: dict[str, Any] = {"labeler": _labeler(annotation.get("completed_by"))}
    if isinstance(annotation.get("created_at"), str):
        known["time"] = annotation["created_at"]
    if result["type"] == "pairwise":
        names = _pair(data, result.get("to_name"), where)
        selected = result["value"].get("selected")
        if not isinstance(selected, str) or selected not in _SIDES:
            raise DataError(f"{where}: 'selected' must be 'left' or 'right', it is {selected!r}")
        texts, ranks, known["order"] = [data[name] for name in names], _SIDES[selected], (0, 1)  # left is read first
        return comparison_at(where, prompt_among(data, names, where), texts, ranks, **known)
    texts = _items(data, where)
    ids = result["value"].get("ranker")
    if isinstance(ids, dict) and len(ids) == 1:  # older versions name the list
        ids = next(iter(ids.values()))
    if not isinstance(ids, list) or sorted(map(str, ids)) != sorted(texts):
        raise DataError(
            f"{where}: 'ranker' must list each of {', '.join(map(repr, texts))} once, the best first; it is {ids!r} "
            "(buckets have no order among them)"
        )
    rank = {str(name): place for place, name in enumerate(ids)}
    prompt = prompt_among(data, (), where)
    return comparison_at(where, prompt, list(texts.values()), [rank[name] for name in texts], **known)


def _labeler(completed_by: Any) -> str:
    if isinstance(completed_by, dict):
        completed_by = completed_by.get("email") or completed_by.get("id")
    return "" if completed_by is None else str(completed_by)


def _pair(data: Row, to_name: Any, where: str) -> tuple[str, str]:
    """The keys of `data` that were shown left and right: those that the tags are called after, or x1 and x2, …"""
    texts = [name for name, text in data.items() if isinstance(text, str)]
    tags = to_name.split(",") if isinstance(to_name, str) else to_name if isinstance(to_name, list) else []
    if len(tags) == 2 and all(tag in texts for tag in tags):
        return tags[0], tags[1]
    found = [
        (first, first.removesuffix(left) + right)
        for left, right in _ENDS
        for first in texts
        if first.endswith(left) and first.removesuffix(left) + right in texts
    ]
    if len(found) != 1:
        raise DataError(
            f"{where}: which texts were left and right? Call the two <Text> tags as the keys of data that they show, "
            f"or the keys by numbers (answer1, answer2); data has {', '.join(map(repr, texts)) or 'no text'}"
        )
    return found[0]


def _items(data: Row, where: str) -> dict[str, str]:
    """The texts of the one list of items that data holds, by their ids."""
    lists = [value for value in data.values() if isinstance(value, list) and value]
    if len(lists) != 1:
        raise DataError(f"{where}: data holds {len(lists)} lists of items to rank, one is read")
    require_items(lists[0], "items", dict, where)
    texts: dict[str, str] = {}
    for i, item in enumerate(lists[0]):
        text = next((item[key] for key in ("body", "text", "html", "title") if isinstance(item.get(key), str)), None)
        if "id" not in item or text is None or str(item["id"]) in texts:
            raise DataError(f"{where}: items[{i}] needs an 'id' of its own and a text, 'body' or 'title'")
        texts[str(item["id"])] = text
    return texts


LABEL_STUDIO = Format(
    sentence="a task of Label Studio (data, annotations)",
    tells=lambda row: isinstance(row.get("data"), dict) + isinstance(row.get("annotations"), list),
    read=row_by_row(_read),
)
