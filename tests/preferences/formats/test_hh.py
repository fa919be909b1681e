"""Transcripts of hh-rlhf: the prompt is what both have in common, up to the last turn of the assistant."""

import json

import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import load_comparisons, read_comparisons, write_comparisons
from rlhf_env.types import Comparison
from tests.tiny_files import write_rows


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: hi\n\nAssistant: hello", "\n\nHuman: hi\n\nAssistant: go away", "\n\nHuman: hi\n\nAssistant:"),
        # both responses begin with the same words
        (
            "\n\nHuman: hi\n\nAssistant: I am glad",
            "\n\nHuman: hi\n\nAssistant: I am not",
            "\n\nHuman: hi\n\nAssistant:",
        ),
        # several turns, of which the last differs
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        ),
        # they part in the first turn, and go on
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: x\n\nHuman: y\n\nAssistant: z",
            "\n\nHuman: a\n\nAssistant:",
        ),
    ],
)
def test_the_prompt_ends_with_the_assistants_last_common_turn(tmp_path, chosen, rejected, prompt):
    file = write_rows(tmp_path / "hh.jsonl", hh(chosen, rejected))
    reading = load_comparisons(file)
    assert reading.form == "hh"
    assert reading.comparisons == [Comparison(prompt, (chosen[len(prompt) :], rejected[len(prompt) :]), (0, 1))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            hh("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d"),
            ":2: chosen and rejected are no transcripts of",
        ),
        (hh("\n\nHuman: a", "\n\nHuman: a"), ":2: chosen and rejected are no transcripts of one prompt"),
        (
            hh("\n\nHuman: a\n\nAssistant: b", "b"),
            ":2: this row is a pair .chosen, rejected., but .*:1 is a pair of transc",
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, ":2: this row is a pair"),
    ],
)
def test_what_is_no_pair_of_transcripts_is_refused(tmp_path, row, message):
    good = hh("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c")
    with pytest.raises(DataError, match=message):
        read_comparisons(write_rows(tmp_path / "hh.jsonl", good, row))


def test_other_prompts_become_the_first_turn_and_are_counted(tmp_path):
    comparisons = [
        Comparison("hi", ("hello", "go away"), (0, 1)),
        Comparison("\n\nHuman: a\n\nAssistant:", (" c", " b"), (1, 0), labeler="ann"),
        Comparison("q", (" x\n\nAssistant: y", " x\n\nAssistant: z"), (0, 1)),
    ]
    assert write_comparisons(tmp_path / "hh.jsonl", comparisons, "hh") == (
        2,
        {
            "prompts that were no transcripts (now the first turn of one)": 1,
            "pairs whose responses begin with the same turn": 1,
            "labelers": 1,
        },
    )
    assert read_comparisons(tmp_path / "hh.jsonl") == [
        Comparison("\n\nHuman: hi\n\nAssistant:", (" hello", " go away"), (0, 1)),
        Comparison("\n\nHuman: a\n\nAssistant:", (" b", " c"), (0, 1)),
    ]


def test_real_conversations_as_transcripts(shared_data, tmp_path):
    """The file has a prompt of its own; put back before the responses, it is what hh-rlhf publishes."""
    lines = (shared_data / "preferences" / "hh_harmless_base.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    published = [hh(*(f"{row['prompt']} {row[key]}" for key in ("chosen", "rejected"))) for row in rows]
    file = write_rows(tmp_path / "hh.jsonl", *published)
    reading = load_comparisons(file)
    assert (reading.form, len(reading.comparisons), reading.lost) == ("hh", 1807, {})
    assert [c.prompt for c in reading.comparisons] == [row["prompt"] for row in rows]
    assert write_comparisons(tmp_path / "again.jsonl", reading.comparisons, "hh") == (1807, {})
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text(encoding="utf-8").splitlines()]
    assert again == published
