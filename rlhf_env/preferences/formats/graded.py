"""Graded comparisons: responses a and b, and how much better a is, such as +2 … −2, 0 being a tie.

The human evaluation of Tülu, Wang et al. 2023, arXiv 2306.04751; https://github.com/allenai/open-instruct. Its marks of
whether each response is acceptable are no comparisons, and are counted as not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlhf_env.preferences.formats.format import Format, Row, as_pairs, comparison_at, count_lost, row_by_row, written_by
from rlhf_env.records.jsonl import require_keys
from rlhf_env.types import Comparison

_KEYS = ("response_a", "response_b", "preference")


def _read(row: Row, where: str, lost: Counter[str]) -> list[Comparison]:
    models = [key for key in ("model_a", "model_b") if key in row]
    labeler = "labeler" if "labeler" in row else "labeller"
    optional = [*models, *([labeler] if labeler in row else [])]
    require_keys(row, {"prompt": str, **dict.fromkeys(_KEYS[:2], str), "preference": float}, where)
    require_keys(row, dict.fromkeys(optional, str), where)
    if marks := sum(key in row for key in ("a_acceptable", "b_acceptable")):
        lost["marks of acceptable responses"] += marks
    grade = row["preference"]
    return [
        comparison_at(
            where,
            row["prompt"],
            [row["response_a"], row["response_b"]],
            (int(grade < 0), int(grade > 0)),
            labeler=row.get(labeler, ""),
            strength=abs(grade) or None,
            **written_by(row.get("model_a", ""), row.get("model_b", "")),
        )
    ]


def _write(comparisons: Sequence[Comparison], lost: Counter[str]) -> list[Row]:
    """A grade whose strength is not known is 1, and counted."""
    pairs, rows = as_pairs(comparisons, lost), []
    count_lost(pairs, lost, held=["labelers", "policies", "strengths"])
    for c in pairs:
        sign = c.ranks[1] - c.ranks[0]
        if sign and c.strength is None:
            lost["strengths that were not known (now 1)"] += 1
        rows.append(
            {
                "prompt": c.prompt,
                "response_a": c.responses[0],
                "response_b": c.responses[1],
                "preference": sign * (1 if c.strength is None else c.strength),
                **({"labeler": c.labeler} if c.labeler else {}),
                **({"model_a": c.writers[0], "model_b": c.writers[1]} if any(c.writers) else {}),
            }
        )
    return rows


GRADED = Format(
    sentence="a graded pair (response_a, response_b, preference)",
    tells=lambda row: sum(key in row for key in _KEYS),
    read=row_by_row(_read),
    write=_write,
)
