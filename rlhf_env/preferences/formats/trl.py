"""TRL's preference formats: {"prompt", "chosen", "rejected"}, strings or messages, the prompt explicit or implicit.

https://github.com/huggingface/trl, docs/source/dataset_formats.md, "Preference"; its implicit prompts are found as by
`extract_prompt`, trl/data_utils.py, but never end within a word. A column `margin` is the m of
−log σ(r_chosen − r_rejected − m), docs/source/reward_trainer.md.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.preferences.formats.format import (
    Format,
    Placed,
    Row,
    comparison_at,
    count_lost,
    decided,
    require_items,
)
from rlhf_env.preferences.formats.hh import HH
from rlhf_env.preferences.formats.transcript import ASSISTANT, ROLES, transcript
from rlhf_env.records.jsonl import require_keys
from rlhf_env.types import Comparison

_KEYS = ("prompt", "chosen", "rejected")
_Message = dict[str, Any]
_Parts = tuple[list[_Message], list[_Message], list[_Message]]  # prompt, chosen, rejected


def _read(rows: Sequence[tuple[str, Row]], lost: Counter[str]) -> list[Placed]:
    conversations = [_messages(row, where) if _is_conversation(row) else None for where, row in rows]
    # One question with one answer is read as two plain texts, but not beside transcripts in the same file.
    plain = all(len(messages) == 1 for each in conversations if each is not None for messages in each)
    comparisons: list[Placed] = []
    for (where, row), each in zip(rows, conversations, strict=True):
        prompt, chosen, rejected = _texts(row, where) if each is None else _as_texts(each, plain)
        strength = _strength(row, where)
        comparisons.append((where, comparison_at(where, prompt, (chosen, rejected), (0, 1), strength=strength)))
    return comparisons


def _is_conversation(row: Row) -> bool:
    return isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list)


def _texts(row: Row, where: str) -> tuple[str, str, str]:
    if isinstance(row.get("prompt"), list):
        raise DataError(f"{where}: prompt holds messages, so chosen and rejected must be lists of messages, too")
    if "prompt" in row:
        require_keys(row, dict.fromkeys(_KEYS, str), where)
        return row["prompt"], row["chosen"], row["rejected"]
    require_keys(row, {"chosen": str, "rejected": str}, where)
    chosen, rejected = row["chosen"], row["rejected"]
    end = len(os.path.commonprefix([chosen, rejected]))
    if any(_is_within_word(text, end) for text in (chosen, rejected)):
        while end and _is_of_word(chosen[end - 1]):
            end -= 1
    prompt = chosen[:end].removesuffix(" ")  # which belongs to the response
    if not prompt.strip():
        raise DataError(
            f"{where}: the key 'prompt' is missing, and chosen and rejected do not begin with the same words, as they "
            'would with an implicit prompt; give the prompt a key of its own ("prompt": "" where there is none)'
        )
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_within_word(text: str, end: int) -> bool:
    return 0 < end < len(text) and _is_of_word(text[end - 1]) and _is_of_word(text[end])


def _messages(row: Row, where: str) -> _Parts:
    """Prompt, chosen and rejected as messages; the prompt is what both begin with where it is not given as messages."""
    explicit = isinstance(row.get("prompt"), list)
    require_keys(row, dict.fromkeys(_KEYS if explicit else _KEYS[1:], list), where)
    for key in _KEYS if explicit else _KEYS[1:]:
        _require_messages(row[key], key, where)
    prompt, chosen, rejected = row["prompt"] if explicit else [], row["chosen"], row["rejected"]
    if not explicit:
        both = zip(chosen, rejected, strict=False)
        same = next((i for i, (a, b) in enumerate(both) if a != b), min(len(chosen), len(rejected)))
        same = min(same, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not prompt:
            raise DataError(
                f"{where}: the key 'prompt' is missing, and chosen and rejected do not begin with the same messages, "
                "as they would with an implicit prompt"
            )
    if prompt[-1]["role"] != "user":
        raise DataError(f"{where}: the last message of the prompt must be the user's, it is {prompt[-1]['role']!r}")
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise DataError(f"{where}: what {key} adds to the prompt must begin and end with the assistant's message")
    return prompt, chosen, rejected


def _require_messages(messages: list[Any], key: str, where: str) -> None:
    require_items(messages, key, dict, where)
    if not messages:
        raise DataError(f"{where}: {key!r} holds no message")
    for i, message in enumerate(messages):
        require_keys(message, {"role": str, "content": str}, f"{where}: {key}[{i}]")
        if message["role"] not in ROLES:
            raise DataError(f"{where}: the role of {key}[{i}] is {message['role']!r}, none of {', '.join(ROLES)}")


def _as_texts(parts: _Parts, plain: bool) -> tuple[str, str, str]:
    prompt, chosen, rejected = parts
    if plain:
        return prompt[0]["content"], chosen[0]["content"], rejected[0]["content"]
    texts = [transcript(answer).removeprefix(ASSISTANT) for answer in (chosen, rejected)]
    return transcript(prompt) + ASSISTANT, texts[0], texts[1]


def _strength(row: Row, where: str) -> float | None:
    if "margin" not in row:
        return None
    require_keys(row, {"margin": float}, where)
    return row["margin"] or None  # of 0 the loss is that without a margin


def _write(comparisons: Sequence[Comparison], lost: Counter[str]) -> list[Row]:
    """Rows all have a margin, 0 where no strength is known, or none has: a column of a data set is whole."""
    pairs = decided(comparisons, lost)
    count_lost(pairs, lost, held=["strengths"])
    rows = [{"prompt": c.prompt, "chosen": c.responses[0], "rejected": c.responses[1]} for c in pairs]
    if any(c.strength is not None for c in pairs):
        rows = [{**row, "margin": c.strength or 0.0} for row, c in zip(rows, pairs, strict=True)]
    return rows


TRL = Format(
    sentence="a pair (chosen, rejected)",
    tells=lambda row: 0 if HH.tells(row) else ("chosen" in row) + ("rejected" in row),
    read=_read,
    write=_write,
)
