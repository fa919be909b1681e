import re

import pytest
from rich.cells import cell_len
from rich.text import Text

from rlhf_env.envs.rendering import render_ansi

PIECES = ["the", " film", " is", " awful"]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def backgrounds(text: str) -> dict[str, int]:
    """Background colour of each styled piece of text, by the 256-colour number."""
    parsed = Text.from_ansi(text)
    styles = [(parsed.plain[span.start : span.end], span.style) for span in parsed.spans]
    return {piece: style.bgcolor.number for piece, style in styles if style.bgcolor}


def test_without_numbers_only_prompt_and_response_are_shown():
    assert render_ansi("i think ", PIECES) == "\x1b[2mi think \x1b[0mthe film is awful"
    assert render_ansi("i think ", []) == "\x1b[2mi think \x1b[0m"


def test_tokens_are_green_or_red_by_sign_and_brighter_by_size():
    colours = backgrounds(render_ansi("", PIECES, reward=[0.0, 1.0, 0.1, -2.0]).split("\n")[0])
    assert colours == {" film": 34, " is": 22, " awful": 160}


def test_numbers_stand_under_their_tokens():
    text = plain(render_ansi("", ["a", " long word"], kl=[0.5, -0.25], reward=[-1, 12.5]))
    assert text.split("\n")[2:5] == [
        "token   a      ·long·word",
        "kl      +0.50  -0.25",
        "reward  -1.00  +12.50",
    ]


def test_wide_characters_keep_the_columns_aligned():
    token, kl = plain(render_ansi("", ["日本", "x"], kl=[1, 2])).split("\n")[2:4]
    assert cell_len(token[: token.index("x")]) == kl.index("+2.00")


def test_a_long_response_is_broken_to_the_width():
    lines = plain(render_ansi("", ["word"] * 30, kl=[0.0] * 30, width=40)).split("\n")[2:-1]
    assert max(map(len, lines)) <= 40
    assert [line.split()[0] for line in lines] == ["token", "kl"] * (len(lines) // 2)
    assert sum(line.count("word") for line in lines) == 30


def test_the_footer_lists_facts():
    text = render_ansi("p", ["x"], footer={"score": 0.53125, "kl": 3, "stop_reason": "eos"})
    assert plain(text).split("\n")[-1] == "score 0.5312 · kl 3 · stop_reason eos"


def test_model_text_cannot_steer_the_terminal():
    hostile = "\x1b[2J\x1b]0;owned\x07\r\u202e"
    text = render_ansi(hostile, [hostile], kl=[0], reward=[1], footer={"stop_reason": hostile})
    rest = plain(text)
    assert rest.count("‹U+001B›") >= 7
    assert not any(c in rest for c in "\x1b\x07\r\u202e")


def test_newlines_break_the_response_but_not_the_table():
    text = render_ansi("a\n", ["b\n\n", "c"], reward=[1, 1])
    assert plain(text).split("\n")[:5] == ["a", "b⏎", "⏎", "c", ""]
    assert plain(text).split("\n")[5].split() == ["token", "b⏎⏎", "c"]
    assert all(line.count("m") == 0 or line.endswith("\x1b[0m") for line in text.split("\n")[:4])  # no colour runs on


def test_numbers_must_match_the_tokens():
    with pytest.raises(ValueError):
        render_ansi("", PIECES, reward=[1.0])
    with pytest.raises(ValueError):
        render_ansi("", PIECES, kl=[1.0])
