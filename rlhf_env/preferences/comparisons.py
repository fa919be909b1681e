"""Comparisons in files: read in two forms, written in either, split without leaking prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.jsonl import require_keys, write_jsonl
from rlhf_env.text.sources import read_rows
from rlhf_env.types import Comparison

_SPLIT_STREAM = 3


def read_comparisons(source: str | Path) -> list[Comparison]:
    """The comparisons of a `.jsonl` file or of the data set `hf:NAME[:SPLIT]`, in their order.

    A row is a ranking, `{"prompt", "responses": […], "ranks": […]}` with optional "labeler", "policy", "order" and
    "time" as in `Comparison`, or a pair, `{"prompt", "chosen", "rejected"}`: three strings, or three lists of one
    message each (TRL's standard and conversational preference formats). One file holds one form. Other keys are
    ignored. `DataError` names file, line and reason.
    """
    rows = read_rows(source)
    first_where, first_form = rows[0][0], _form(rows[0][1], rows[0][0])
    comparisons = []
    for where, row in rows:
        if (form := _form(row, where)) != first_form:
            raise DataError(
                f"{where}: this row is {_FORMS[form]}, but {first_where} is {_FORMS[first_form]}; one file holds one "
                "form, so split it in two"
            )
        comparisons.append(_ranking(row, where) if form == "ranking" else _pair(row, where))
    return comparisons


def write_comparisons(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Write one ranking per line, from which `read_comparisons` makes equal records.

    The file is replaced whole or not at all. What is not known (labeler, policy, order, time) is left out of a row.
    """
    rows = [{f.name: value for f in fields(c) if (value := getattr(c, f.name)) != f.default} for c in comparisons]
    if not rows:
        raise DataError(f"{path}: there are no comparisons to write")
    write_jsonl(path, rows)


def write_trl(path: str | Path, comparisons: Iterable[Comparison]) -> int:
    """Write every pair of responses that is no tie as {"prompt", "chosen", "rejected"}; returns how many there are.

    A ranking of K responses without ties gives K(K − 1)/2 rows, one after another. TRL has no form for a tie, so ties
    are left out; if nothing else is there, `DataError` is raised and no file written.
    """
    rows = []
    for c in comparisons:
        for i, j, preference in c.pairs:
            if preference != 0.5:
                chosen, rejected = (i, j) if preference == 1 else (j, i)
                rows.append({"prompt": c.prompt, "chosen": c.responses[chosen], "rejected": c.responses[rejected]})
    if not rows:
        raise DataError(f"{path}: there is no pair to write in which one response is preferred")
    write_jsonl(path, rows)
    return len(rows)


def distinct(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], int]:
    """The comparisons with at least two different responses, and how many others there were.

    A ranking of identical texts teaches nothing about them, whatever it says.
    """
    kept = [c for c in comparisons if len(set(c.responses)) > 1]
    return kept, len(comparisons) - len(kept)


def split_by_prompt(
    comparisons: Sequence[Comparison], share: float, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Comparisons to learn from and comparisons held out, about `share` of all, each in the order given.

    All comparisons of a prompt are on one side, so that what is measured was never seen, and each side has a prompt at
    least. Where all have the same prompt, single comparisons are held out instead.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of comparisons held out must be between 0 and 1, it is {share}")
    if len(comparisons) < 2:
        raise DataError(
            f"at least two comparisons are needed, one to learn from and one to measure on; this is {len(comparisons)}"
        )
    by_prompt: dict[str, list[int]] = {}
    for i, c in enumerate(comparisons):
        by_prompt.setdefault(c.prompt, []).append(i)
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


def _form(row: dict[str, Any], where: str) -> str:
    ranking, pair = (sum(key in row for key in keys) for keys in (("responses", "ranks"), ("chosen", "rejected")))
    if ranking == pair == 0:
        raise DataError(
            f"{where}: this row is neither a ranking (prompt, responses, ranks) nor a pair (prompt, chosen, rejected); "
            f"it has {', '.join(map(repr, row)) or 'no key'}"
        )
    if ranking == pair:
        raise DataError(f"{where}: this row has keys of a ranking (responses, ranks) and of a pair (chosen, rejected)")
    return "ranking" if ranking > pair else "pair"


def _ranking(row: dict[str, Any], where: str) -> Comparison:
    optional = {key: kind for key, kind in _OPTIONAL.items() if key in row}
    require_keys(row, {"prompt": str, "responses": list, "ranks": list} | optional, where)
    for key, kind in (("responses", str), ("ranks", int), ("order", int)):
        _require_items(row.get(key, []), key, kind, where)
    known: dict[str, Any] = {key: tuple(row[key]) if key == "order" else row[key] for key in optional}
    try:
        return Comparison(row["prompt"], tuple(row["responses"]), tuple(row["ranks"]), **known)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _pair(row: dict[str, Any], where: str) -> Comparison:
    if "prompt" not in row:
        raise DataError(
            f"{where}: the key 'prompt' is missing; if chosen and rejected both begin with the prompt (TRL's implicit "
            'prompt), give the prompt a key of its own, "prompt", and leave it out of the two'
        )
    keys = ("prompt", "chosen", "rejected")
    as_messages = [isinstance(row.get(key), list) for key in keys]
    if any(as_messages) and not all(as_messages) and all(key in row for key in keys):
        raise DataError(f"{where}: prompt, chosen and rejected must be three strings, or three lists of one message")
    require_keys(row, dict.fromkeys(keys, list if any(as_messages) else str), where)
    if any(as_messages):
        prompt, chosen, rejected = (_only_message(row[key], key, where) for key in keys)
    else:
        prompt, chosen, rejected = (row[key] for key in keys)
    return Comparison(prompt, (chosen, rejected), (0, 1))


def _only_message(messages: list[Any], key: str, where: str) -> str:
    _require_items(messages, key, dict, where)
    if len(messages) != 1:
        raise DataError(
            f"{where}: {key!r} holds {len(messages)} messages, but only one question and its answers are read: one "
            "user message as prompt, one assistant message each as chosen and rejected; write longer conversations as "
            "strings, all that comes before the answer being the prompt"
        )
    require_keys(messages[0], {"role": str, "content": str}, f"{where}: {key}[0]")
    role = "user" if key == "prompt" else "assistant"
    if messages[0]["role"] != role:
        raise DataError(f"{where}: the role of {key}[0] must be {role!r}, it is {messages[0]['role']!r}")
    return messages[0]["content"]


def _require_items(items: list[Any], key: str, kind: type, where: str) -> None:
    for i, item in enumerate(items):
        require_keys({f"{key}[{i}]": item}, {f"{key}[{i}]": kind}, where)


_FORMS = {"ranking": "a ranking (responses, ranks)", "pair": "a pair (chosen, rejected)"}
_OPTIONAL = {"labeler": str, "policy": str, "order": list, "time": str}
