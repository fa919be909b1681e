"""Conversations as one text, as Anthropic's hh-rlhf writes them: "\\n\\nHuman: … \\n\\nAssistant: …".

A prompt ends with "\\n\\nAssistant:", and the response begins with the space after the colon.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURNS = {"system": "\n\nSystem:", "user": HUMAN, "assistant": ASSISTANT}
ROLES = tuple(_TURNS)


def transcript(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages {"role", "content"} as one text."""
    return "".join(f"{_TURNS[message['role']]} {message['content']}" for message in messages)


def end_of_prompt(first: str, second: str) -> int | None:
    """Where the prompt of two transcripts ends: after the last "\\n\\nAssistant:" that is in both; none: there is none.

    Not where they begin to differ, since two responses may begin with the same words.
    """
    start = os.path.commonprefix([first, second]).rfind(ASSISTANT)
    return None if start < 0 else start + len(ASSISTANT)
