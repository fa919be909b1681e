"""Graded comparisons: the sign says which is better, the size how much."""

import json
from collections import Counter

import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import load_comparisons, read_comparisons, write_comparisons
from rlhf_env.types import Comparison
from tests.tiny_files import write_rows

ROW = {"prompt": "p", "response_a": "a", "response_b": "b", "model_a": "m", "model_b": "n", "labeller": "yo"}


@pytest.mark.parametrize(
    ("grade", "ranks", "strength"),
    [(2, (0, 1), 2), (1, (0, 1), 1), (0, (0, 0), None), (-1, (1, 0), 1), (-2, (1, 0), 2), (0.5, (0, 1), 0.5)],
)
def test_a_grade_is_ranks_and_a_strength(tmp_path, grade, ranks, strength):
    file = write_rows(tmp_path / "g.jsonl", ROW | {"preference": grade})
    assert read_comparisons(file) == [Comparison("p", ("a", "b"), ranks, "yo", policies=("m", "n"), strength=strength)]


def test_what_need_not_be_known(tmp_path):
    row = {"prompt": "p", "response_a": "a", "response_b": "b", "preference": -1}
    assert read_comparisons(write_rows(tmp_path / "g.jsonl", row)) == [Comparison("p", ("a", "b"), (1, 0), strength=1)]
    assert read_comparisons(write_rows(tmp_path / "g.jsonl", row | {"labeler": "ann"}))[0].labeler == "ann"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": "a-is-better"}, ":1: 'preference' must be a number, it is a string"),
        ({"preference": None}, ":1: 'preference' must be a number, it is null"),
        ({"preference": 1, "response_b": 3}, ":1: 'response_b' must be a string, it is an integer"),
        ({"preference": 1, "labeller": 3}, ":1: 'labeller' must be a string, it is an integer"),
        ({}, ":1: the key 'preference' is missing"),
    ],
)
def test_a_bad_row_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_comparisons(write_rows(tmp_path / "g.jsonl", ROW | changes))


def test_a_strength_that_is_not_known_is_written_as_1_and_counted(tmp_path):
    comparisons = [Comparison("p", ("a", "b"), (1, 0)), Comparison("p", ("a", "b"), (0, 0))]
    assert write_comparisons(tmp_path / "g.jsonl", comparisons, "graded") == (
        2,
        {"strengths that were not known (now 1)": 1},
    )
    assert [c.strength for c in read_comparisons(tmp_path / "g.jsonl")] == [1, None]


def test_real_grades_are_read_and_written_without_loss(shared_data, tmp_path):
    file = shared_data / "preferences" / "tulu_human_eval.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    reading = load_comparisons(file)
    assert (reading.form, len(reading.comparisons)) == ("graded", 1150)
    assert reading.lost == {"marks of acceptable responses": 2 * 1150}
    assert len({c.labeler for c in reading.comparisons}) == 16
    grades = [(c.strength or 0) * (c.ranks[1] - c.ranks[0]) for c in reading.comparisons]
    assert Counter(grades) == {2: 188, 1: 235, 0: 376, -1: 191, -2: 160}
    assert [
        (grade, c.prompt, *c.responses, *c.writers, c.labeler)
        for grade, c in zip(grades, reading.comparisons, strict=True)
    ] == [
        tuple(
            row[key] for key in ("preference", "prompt", "response_a", "response_b", "model_a", "model_b", "labeller")
        )
        for row in rows
    ]
    assert write_comparisons(tmp_path / "g.jsonl", reading.comparisons, "graded") == (1150, {})
    assert read_comparisons(tmp_path / "g.jsonl") == reading.comparisons
