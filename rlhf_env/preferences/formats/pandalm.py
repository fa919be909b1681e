"""PandaLM's human annotations: two responses, and the verdict of each annotator: 1, 2, or 0 for a tie.

Wang et al. 2023, arXiv 2306.05087; https://github.com/WeOpenML/PandaLM, data/testset-v1.json ("instruction", "input",
"response1", "response2", "annotator1", …, "cmp_key"). Rows with "prompt", "response_1", "response_2", a list
"human_labels" and "models" are read, too. The published file has NaN for an empty "input", which is no JSON: write "".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.preferences.formats.format import (
    Format,
    Row,
    as_pairs,
    comparison_at,
    count_lost,
    require_items,
    row_by_row,
    written_by,
)
from rlhf_env.records.jsonl import require_keys
from rlhf_env.types import Comparison

_RANKS = {0: (0, 0), 1: (0, 1), 2: (1, 0)}
_LABELS = {ranks: label for label, ranks in _RANKS.items()}


def _annotators(row: Mapping[str, Any]) -> list[str]:
    return [key for key in row if re.fullmatch(r"annotator\d+", key)]


def _tells(row: Mapping[str, Any]) -> int:
    responses = any(keys <= row.keys() for keys in ({"response1", "response2"}, {"response_1", "response_2"}))
    return 3 if responses and ("human_labels" in row or _annotators(row)) else 0


def _read(row: Row, where: str, lost: Counter[str]) -> list[Comparison]:
    keys = ("response_1", "response_2") if "response_1" in row else ("response1", "response2")
    require_keys(row, dict.fromkeys(keys, str), where)
    labels = _labels(row, where)
    if not labels:
        raise DataError(f"{where}: nobody judged this pair: it has neither 'human_labels' nor 'annotator1'")
    comparisons = []
    for labeler, label in labels.items():
        if label not in _RANKS:
            raise DataError(f"{where}: {labeler} says {label}, which is none of 0 (a tie), 1 and 2")
        texts, known = [row[key] for key in keys], _policies(row, where)
        comparisons.append(comparison_at(where, _prompt(row, where), texts, _RANKS[label], labeler=labeler, **known))
    return comparisons


def _labels(row: Row, where: str) -> dict[str, int]:
    if "human_labels" in row:
        require_keys(row, {"human_labels": list}, where)
        require_items(row["human_labels"], "human_labels", int, where)
        return {f"annotator{number}": label for number, label in enumerate(row["human_labels"], start=1)}
    require_keys(row, dict.fromkeys(_annotators(row), int), where)
    return {key: row[key] for key in _annotators(row)}


def _prompt(row: Row, where: str) -> str:
    if "prompt" in row:
        require_keys(row, {"prompt": str}, where)
        return row["prompt"]
    require_keys(row, {"instruction": str} | ({"input": str} if "input" in row else {}), where)
    return "\n\n".join(text for text in (row["instruction"], row.get("input", "")) if text)


def _policies(row: Row, where: str) -> dict[str, Any]:
    """What wrote the two, of "models", or of "cmp_key": "bloom-7b_llama-7b", where that says which is which."""
    if "models" in row:
        require_keys(row, {"models": list}, where)
        require_items(row["models"], "models", str, where)
        if len(row["models"]) != 2:
            raise DataError(f"{where}: 'models' must name two, it names {len(row['models'])}")
        return written_by(*row["models"])
    names = row["cmp_key"].split("_") if isinstance(row.get("cmp_key"), str) else []
    return written_by(*names) if len(names) == 2 else {}


def _write(comparisons: Sequence[Comparison], lost: Counter[str]) -> list[Row]:
    """One row for all who judged the same pair; labelers without numbers get them as they appear."""
    pairs = as_pairs(comparisons, lost)
    count_lost(pairs, lost, held=["labelers", "policies"])
    names = {c.labeler: c.labeler for c in pairs}
    if not all(re.fullmatch(r"annotator\d+", name) for name in names):
        lost["labelers' names (now annotator1, …)"] += len(names)
        names = {name: f"annotator{number}" for number, name in enumerate(names, start=1)}
    rows: list[Row] = []
    current: dict[Any, Row] = {}
    for c in pairs:
        key, annotator = (c.prompt, c.responses, c.writers), names[c.labeler]
        if key not in current or annotator in current[key]:  # who judges a pair again does so in a new row
            texts = {"response1": c.responses[0], "response2": c.responses[1]}
            models = {"models": list(c.writers)} if any(c.writers) else {}
            current[key] = {"instruction": c.prompt, "input": "", **texts, **models}
            rows.append(current[key])
        current[key][annotator] = _LABELS[c.ranks[0], c.ranks[1]]
    return rows


PANDALM = Format(
    sentence="a pair with annotators' labels (response1, response2, annotator1 …)",
    tells=_tells,
    read=row_by_row(_read),
    write=_write,
)
