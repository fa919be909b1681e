import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from rlhf_env.records.safe_text import safe_html, safe_text

HOSTILE = {
    "\x1b]0;owned\x07": "‹U+001B›]0;owned‹U+0007›",
    "\x1b[2J": "‹U+001B›[2J",
    "\x9b2J": "‹U+009B›2J",
    "a\x7fb\x00": "a‹U+007F›b‹U+0000›",
    "user\u202egpj.exe": "user‹U+202E›gpj.exe",
    "\u2066isolate\u2069": "‹U+2066›isolate‹U+2069›",
    "zero\u200bwidth\ufeff": "zero‹U+200B›width‹U+FEFF›",
    "tag\U000e0041": "tag‹U+E0041›",
    "half \ud800": "half ‹U+D800›",
    "line\u2028end": "line‹U+2028›end",
    "overwritten\rlog": "overwritten‹U+000D›log",
    "forged\n2026 INFO ok": "forged⏎2026 INFO ok",
    "tab\tstop": "tab⇥stop",
    "[link=https://example.org]x[/link]": "[link=https://example.org]x[/link]",
    "[/foo]": "[/foo]",
    "</script><img onerror=x>": "</script><img onerror=x>",
}


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_controlling_characters_become_visible(text):
    assert safe_text(text) == HOSTILE[text]


def test_honest_text_is_unchanged():
    text = "Grüße, 世界! 😀 ‘q’ — é\u0301 [0.5] 100 %\u00a0x"
    assert safe_text(text) == text


def test_line_breaks_and_tabs_can_be_kept():
    assert safe_text("a\n\tb\r\x1b", multiline=True) == "a\n\tb‹U+000D›‹U+001B›"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_rich_prints_it_literally(text):
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=200).print(Text(safe_text(text)))
    assert out.getvalue() == HOSTILE[text] + "\n"


def test_html_cannot_be_left():
    assert safe_html('</script><a b="c">\u202e\n&') == "&lt;/script&gt;&lt;a b=&quot;c&quot;&gt;‹U+202E›\n&amp;"


@given(st.text(st.characters(exclude_categories=[])))
def test_nothing_unsafe_is_left_of_any_text(text):
    shown = safe_text(text)
    assert not {"Cc", "Cf", "Cs", "Zl", "Zp"} & {unicodedata.category(c) for c in shown}
    shown.encode("utf-8")
