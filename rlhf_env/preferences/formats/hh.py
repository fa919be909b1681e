"""Anthropic's hh-rlhf: {"chosen", "rejected"}, two whole transcripts whose common beginning is the prompt.

Bai et al. 2022, arXiv 2204.05862; https://github.com/anthropics/hh-rlhf, README, "Data format".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.preferences.formats.format import Format, Row, count_lost, decided, row_by_row
from rlhf_env.preferences.formats.transcript import ASSISTANT, HUMAN, end_of_prompt, transcript
from rlhf_env.records.jsonl import require_keys
from rlhf_env.types import Comparison

_KEYS = ("chosen", "rejected")


def _tells(row: Mapping[str, Any]) -> int:
    texts = [row.get(key) for key in _KEYS]
    return 2 * ("prompt" not in row and all(isinstance(text, str) and text.startswith(HUMAN) for text in texts))


def _read(row: Row, where: str, lost: Counter[str]) -> list[Comparison]:
    require_keys(row, dict.fromkeys(_KEYS, str), where)
    chosen, rejected = (row[key] for key in _KEYS)
    end = end_of_prompt(chosen, rejected)
    if end is None:
        raise DataError(f"{where}: chosen and rejected are no transcripts of one prompt: no {ASSISTANT!r} is in both")
    return [Comparison(chosen[:end], (chosen[end:], rejected[end:]), (0, 1))]


def _write(comparisons: Sequence[Comparison], lost: Counter[str]) -> list[Row]:
    """Prompts that are no transcripts become the first turn of one, and are counted."""
    kept, rows = [], []
    for c in decided(comparisons, lost):
        prompt, responses = c.prompt, c.responses
        if not (prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)):
            prompt = transcript([{"role": "user", "content": prompt}]) + ASSISTANT
            responses = [f" {response}" for response in responses]
        chosen, rejected = (prompt + response for response in responses)
        if end_of_prompt(chosen, rejected) != len(prompt):
            lost["pairs whose responses begin with the same turn"] += 1
            continue
        if prompt != c.prompt:
            lost["prompts that were no transcripts (now the first turn of one)"] += 1
        kept.append(c)
        rows.append({"chosen": chosen, "rejected": rejected})
    count_lost(kept, lost, held=())
    return rows


HH = Format(
    sentence="a pair of transcripts (chosen, rejected, both beginning with Human:)",
    tells=_tells,
    read=row_by_row(_read),
    write=_write,
)
