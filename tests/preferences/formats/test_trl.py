"""TRL's preference formats: strings and messages, prompts explicit and implicit, margins."""

import json

import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import load_comparisons, read_comparisons, write_comparisons
from rlhf_env.types import Comparison
from tests.tiny_files import write_rows

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def read(tmp_path):
    return lambda *rows: read_comparisons(write_rows(tmp_path / "pairs.jsonl", *rows), "trl")


def said(*turns):
    """Messages by turns: the user's, the assistant's, …"""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def answered(*turns):
    return said("", *turns)[1:]


# --- strings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # the example of TRL's documentation
        ("The sky is great.", "The sky is green.", "The sky is"),  # where TRL would cut within a word
        ("Q: a film? A: good", "Q: a film? A: bad", "Q: a film? A:"),
        ("the films are", "the film is", "the"),
        ("is it so? yes", "is it so? yes, it is", "is it so? yes"),
        ("line\nyes", "line\nno", "line\n"),
    ],
)
def test_an_implicit_prompt_is_what_both_begin_with_in_whole_words(read, chosen, rejected, prompt):
    (comparison,) = read({"chosen": chosen, "rejected": rejected})
    assert comparison.prompt == prompt
    assert [prompt + response for response in comparison.responses] == [chosen, rejected]


@pytest.mark.parametrize(("chosen", "rejected"), [("good", "bad"), ("good", "great"), ("", ""), (" a", " b")])
def test_where_there_is_no_common_beginning_the_prompt_is_missing(read, chosen, rejected):
    with pytest.raises(DataError, match=":1: the key 'prompt' is missing, and chosen and rejected do not begin with"):
        read({"chosen": chosen, "rejected": rejected})


def test_a_margin_is_a_strength_and_0_is_none(read):
    rows = [PAIR | {"margin": 3}, PAIR | {"margin": 0.25}, PAIR | {"margin": 0}]
    assert [c.strength for c in read(*rows)] == [3, 0.25, None]
    with pytest.raises(DataError, match=":1: strength must be positive and finite, got -1"):
        read(PAIR | {"margin": -1})
    with pytest.raises(DataError, match=":1: 'margin' must be a number, it is a string"):
        read(PAIR | {"margin": "3"})


# --- messages --------------------------------------------------------------------------------------

SKY = "What color is the sky?"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": said(SKY), "chosen": answered("It is blue."), "rejected": answered("It is green.")},
        {"chosen": said(SKY, "It is blue."), "rejected": said(SKY, "It is green.")},
        {"prompt": SKY, "chosen": said(SKY, "It is blue."), "rejected": said(SKY, "It is green.")},  # UltraFeedback
    ],
    ids=["explicit", "implicit", "implicit beside a string"],
)
def test_one_question_and_its_answers_are_plain_texts(read, row):
    assert read(row) == [Comparison(SKY, ("It is blue.", "It is green."), (0, 1))]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": said("a", "b", "c"), "chosen": answered("d"), "rejected": answered("e")},
        {"chosen": said("a", "b", "c", "d"), "rejected": said("a", "b", "c", "e")},
    ],
    ids=["explicit", "implicit"],
)
def test_a_longer_conversation_is_a_transcript(read, row):
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert read(row) == [Comparison(prompt, (" d", " e"), (0, 1))]


def test_a_system_message_and_answers_of_several_turns(read):
    system = [{"role": "system", "content": "be kind"}]
    row = {"prompt": system + said("a"), "chosen": answered("b", "c", "d"), "rejected": answered("e")}
    assert read(row) == [
        Comparison("\n\nSystem: be kind\n\nHuman: a\n\nAssistant:", (" b\n\nHuman: c\n\nAssistant: d", " e"), (0, 1))
    ]


def test_beside_transcripts_one_question_is_a_transcript_too(read):
    single = {"prompt": said("q"), "chosen": answered("x"), "rejected": answered("y")}
    longer = {"prompt": said("a", "b", "c"), "chosen": answered("d"), "rejected": answered("e")}
    assert read(single)[0].prompt == "q"
    assert read(single, longer)[0] == Comparison("\n\nHuman: q\n\nAssistant:", (" x", " y"), (0, 1))


def test_two_equal_conversations_differ_in_nothing_but_have_a_prompt(read):
    assert read({"chosen": said("a", "b"), "rejected": said("a", "b")}) == [Comparison("a", ("b", "b"), (0, 1))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "chosen": "good", "rejcted": "bad"},
            ":2: the key 'rejected' is missing; the row has 'prompt'",
        ),
        ({"prompt": "p", "chosen": None, "rejected": "bad"}, ":2: 'chosen' must be a string, it is null"),
        (
            {"prompt": "p", "chosen": answered("a"), "rejected": answered("b")},
            ":2: the key 'prompt' is missing, and .* me",
        ),
        ({"prompt": "p", "chosen": answered("a"), "rejected": "b"}, ":2: 'rejected' must be a list, it is a string"),
        (
            {"prompt": said("p"), "chosen": "a", "rejected": "b"},
            ":2: prompt holds messages, so chosen and rejected must",
        ),
        ({"prompt": said("p"), "chosen": said("p", "a"), "rejected": answered("b")}, ":2: what chosen adds to the pro"),
        ({"prompt": said("p"), "chosen": [], "rejected": answered("b")}, ":2: 'chosen' holds no message"),
        (
            {"prompt": said("p"), "chosen": said("a"), "rejected": answered("b")},
            ":2: what chosen adds to the prompt must",
        ),
        (
            {"prompt": said("p"), "chosen": answered("a", "q"), "rejected": answered("b")},
            ":2: .* must begin and end with",
        ),
        (
            {"prompt": said("p", "a"), "chosen": answered("a"), "rejected": answered("b")},
            ":2: the last message of the pr",
        ),
        (
            {"prompt": ["p"], "chosen": answered("a"), "rejected": answered("b")},
            r":2: 'prompt\[0\]' must be an object,",
        ),
        (
            {"prompt": said("p"), "chosen": answered("a"), "rejected": answered(None)},
            r":2: rejected\[0\]: 'content' mu",
        ),
        (
            {"prompt": [{"content": "p"}], "chosen": answered("a"), "rejected": answered("b")},
            r":2: prompt\[0\]: the key",
        ),
        (
            {"prompt": [{"role": "tool", "content": "p"}], "chosen": answered("a"), "rejected": answered("b")},
            r":2: the role of prompt\[0\] is 'tool', none of system, user, assistant",
        ),
    ],
)
def test_a_bad_pair_is_refused_with_file_line_and_reason(read, row, message):
    with pytest.raises(DataError, match=message):
        read(PAIR, row)


# --- writing ---------------------------------------------------------------------------------------


def test_pairs_are_those_without_a_tie_and_the_rest_is_counted(tmp_path):
    file = tmp_path / "pairs.jsonl"
    three = Comparison("p", ("worst", "best", "middle"), (2, 0, 1), labeler="ann", order=(1, 0, 2))
    tied = Comparison("q", ("a", "b", "c"), (1, 0, 1), policy="sft")
    rest = [
        Comparison("r", ("x", "y"), (0, 0)),
        Comparison("s", ("same", "same"), (0, 1)),
        Comparison("t", ("no", "yes"), (1, 0), preference=0.25, time="2026-01-01"),
    ]
    assert write_comparisons(file, [three, tied, *rest], "trl") == (
        6,
        {
            "rankings of more than two (written as their pairs)": 2,
            "ties": 2,
            "pairs of identical responses": 1,
            "labelers": 3,
            "policies": 2,
            "orders of presentation": 3,
            "soft labels": 1,
            "times": 1,
        },
    )
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"prompt": "p", "chosen": "best", "rejected": "worst"},
        {"prompt": "p", "chosen": "middle", "rejected": "worst"},
        {"prompt": "p", "chosen": "best", "rejected": "middle"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        {"prompt": "q", "chosen": "b", "rejected": "c"},
        {"prompt": "t", "chosen": "yes", "rejected": "no"},
    ]


def test_all_rows_have_a_margin_or_none(tmp_path):
    strong, plain = Comparison("p", ("a", "b"), (0, 1), strength=2), Comparison("q", ("a", "b"), (1, 0))
    for those, margins in (([plain], [None]), ([plain, strong], [0.0, 2])):
        assert write_comparisons(tmp_path / "pairs.jsonl", those, "trl") == (len(those), {})
        rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
        assert [row.get("margin") for row in rows] == margins
    assert [c.strength for c in read_comparisons(tmp_path / "pairs.jsonl")] == [None, 2]


# --- real data -------------------------------------------------------------------------------------


def test_human_preferences_of_hh_rlhf(shared_data, tmp_path):
    file = shared_data / "preferences" / "hh_harmless_base.jsonl"
    reading = load_comparisons(file)
    assert (reading.form, reading.lost) == ("trl", {})
    assert len(reading.comparisons) == len(file.read_bytes().splitlines()) == 1807
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(c.prompt, *c.responses) for c in reading.comparisons] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in rows
    ]
    assert write_comparisons(tmp_path / "trl.jsonl", reading.comparisons, "trl") == (1807, {})
    assert read_comparisons(tmp_path / "trl.jsonl") == reading.comparisons
