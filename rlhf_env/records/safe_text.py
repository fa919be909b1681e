"""Text that a model, a data set or a stranger wrote, made safe to show.

Raw, it can retitle or clear a terminal, reverse what is read, or forge log lines. Every sink shows it through here;
with rich, print `rich.text.Text(safe_text(text))`, never a plain string, whose `[brackets]` rich takes for markup.
"""

from __future__ import annotations

import html
import unicodedata

_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (bidi, zero width), surrogate, line and paragraph separator


def safe_text(text: str, *, multiline: bool = False) -> str:
    """`text` with every invisible or controlling character shown as its code point, such as ‹U+001B›.

    A line break is shown as ⏎ and a tab as ⇥, so that one text stays one line; `multiline=True` keeps both as they are.
    """
    if text.isprintable():
        return text
    kept = {"\n": "\n", "\t": "\t"} if multiline else {"\n": "⏎", "\t": "⇥"}
    return "".join(kept.get(c) or (f"‹U+{ord(c):04X}›" if unicodedata.category(c) in _UNSAFE else c) for c in text)


def safe_html(text: str) -> str:
    """`safe_text` with its line breaks, escaped for HTML content and for quoted attributes."""
    return html.escape(safe_text(text, multiline=True))
