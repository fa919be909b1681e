"""`rlhf-env preferences convert`: from our form of comparisons to TRL's and back."""

from __future__ import annotations

import json

import pytest

from tests.tiny_files import write_rows


@pytest.fixture
def ranked(tmp_path) -> str:
    """Three rankings: one without ties, one with a tie for the first place, one of identical responses."""
    return write_rows(
        tmp_path / "ranked.jsonl",
        {"prompt": "p", "responses": ["bad", "good", "fair"], "ranks": [2, 0, 1], "labeler": "ann"},
        {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [0, 0, 1]},
        {"prompt": "r", "responses": ["same", "same"], "ranks": [0, 1]},
    )


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_pair_that_is_no_tie_becomes_a_row_for_trl(command, ranked, tmp_path):
    out = tmp_path / "pairs.jsonl"
    code, shown, err = command("preferences", "convert", ranked, out, "--to", "trl")
    assert (code, err) == (0, "")
    assert shown.splitlines() == [
        f"read 3 comparisons from {ranked}",
        f"wrote 5 pairs to {out}; left out 1 tied pairs",
        "left out 1 comparisons of identical responses",
    ]
    pairs = {(row["prompt"], row["chosen"], row["rejected"]) for row in rows_of(out)}
    assert pairs == {
        ("p", "good", "bad"),
        ("p", "fair", "bad"),
        ("p", "good", "fair"),
        ("q", "x", "z"),
        ("q", "y", "z"),
    }


def test_pairs_become_rankings_of_two(command, ranked, tmp_path):
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
    )
    code, shown, _ = command("preferences", "convert", pairs, tmp_path / "out.jsonl", "--to", "ranks")
    assert code == 0 and f"wrote 1 comparisons to {tmp_path / 'out.jsonl'}" in shown
    assert rows_of(tmp_path / "out.jsonl") == [{"prompt": "p", "responses": ["good", "bad"], "ranks": [0, 1]}]


def test_rankings_stay_what_they_were(command, ranked, tmp_path):
    code, *_ = command("preferences", "convert", ranked, tmp_path / "out.jsonl", "--to", "ranks")
    assert code == 0
    first, second, _ = rows_of(tmp_path / "ranked.jsonl")
    assert rows_of(tmp_path / "out.jsonl") == [first, second]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "p"'], "malformed JSON"),
        (
            [{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 0]}],
            "there is no pair to write in which one response",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(command, rows, message, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", *rows)
    code, _, err = command("preferences", "convert", source, tmp_path / "out.jsonl", "--to", "trl")
    assert (code, err.count("\n")) == (1, 1) and err.startswith("error: ") and message in err
    assert not (tmp_path / "out.jsonl").exists()


def test_there_are_two_forms(command, ranked, tmp_path):
    code, _, err = command("preferences", "convert", ranked, tmp_path / "out.jsonl", "--to", "csv")
    assert code == 2 and "ranks" in err and "trl" in err
    assert command("preferences", "convert", ranked, tmp_path / "out.jsonl")[0] == 2  # --to has no default
