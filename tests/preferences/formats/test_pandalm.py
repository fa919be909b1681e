"""PandaLM: one row, several annotators, each of whom is a comparison."""

import json
from collections import Counter

import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import load_comparisons, read_comparisons, write_comparisons
from rlhf_env.types import Comparison
from tests.tiny_files import write_rows

PUBLISHED = {
    "idx": 0,
    "cmp_key": "bloom-7b_llama-7b",
    "instruction": "Rewrite the sentence.",
    "input": "It is so.",
    "response1": "So it is.",
    "response2": "So.",
    "annotator1": 2,
    "annotator2": 0,
    "annotator3": 1,
}


def test_each_annotator_is_a_comparison(tmp_path):
    texts = ("Rewrite the sentence.\n\nIt is so.", ("So it is.", "So."))
    assert read_comparisons(write_rows(tmp_path / "p.jsonl", PUBLISHED)) == [
        Comparison(*texts, ranks, f"annotator{number}", policies=("bloom-7b", "llama-7b"))
        for number, ranks in enumerate([(1, 0), (0, 0), (0, 1)], start=1)
    ]


def test_rows_with_a_list_of_labels(tmp_path):
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "human_labels": [1, 0], "models": ["m", "m"], "ai": 2}
    assert read_comparisons(write_rows(tmp_path / "p.jsonl", row)) == [
        Comparison("p", ("a", "b"), (0, 1), "annotator1", "m"),
        Comparison("p", ("a", "b"), (0, 0), "annotator2", "m"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotator2": 3}, ":1: annotator2 says 3, which is none of 0 .a tie., 1 and 2"),
        ({"annotator2": "1"}, ":1: 'annotator2' must be an integer, it is a string"),
        ({"annotator2": None}, ":1: 'annotator2' must be an integer, it is null"),
        ({"response2": None}, ":1: 'response2' must be a string, it is null"),
        ({"input": 7}, ":1: 'input' must be a string, it is an integer"),
        ({"human_labels": [1, "2"]}, r":1: 'human_labels\[1\]' must be an integer, it is a string"),
        ({"human_labels": []}, ":1: nobody judged this pair"),
        ({"models": ["m"]}, ":1: 'models' must name two, it names 1"),
    ],
)
def test_a_bad_row_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_comparisons(write_rows(tmp_path / "p.jsonl", PUBLISHED | changes))


def test_the_published_file_has_a_number_that_is_none(tmp_path):
    line = json.dumps(PUBLISHED | {"input": float("nan")})
    with pytest.raises(DataError, match=":1: NaN is no JSON"):
        read_comparisons(write_rows(tmp_path / "p.jsonl", line))


def test_who_judges_again_does_so_in_a_row_of_their_own(tmp_path):
    ann, bob = (Comparison("p", ("a", "b"), (0, 1), name) for name in ("ann", "bob"))
    other = Comparison("p", ("a", "b"), (1, 0), "bob")
    rows, lost = write_comparisons(tmp_path / "p.jsonl", [ann, bob, other], "pandalm")
    assert (rows, lost) == (2, {"labelers' names (now annotator1, …)": 2})
    assert [(c.labeler, c.ranks) for c in read_comparisons(tmp_path / "p.jsonl")] == [
        ("annotator1", (0, 1)),
        ("annotator2", (0, 1)),
        ("annotator2", (1, 0)),
    ]


def test_real_annotations_are_read_and_written_without_loss(shared_data, tmp_path):
    file = shared_data / "preferences" / "pandalm_3annotators.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    reading = load_comparisons(file)
    assert (reading.form, reading.lost, len(rows), len(reading.comparisons)) == ("pandalm", {}, 999, 2997)
    label = {(0, 0): 0, (0, 1): 1, (1, 0): 2}
    for number in range(3):
        theirs = [c for c in reading.comparisons if c.labeler == f"annotator{number + 1}"]
        assert [label[c.ranks[0], c.ranks[1]] for c in theirs] == [row["human_labels"][number] for row in rows]
        assert [(c.prompt, *c.responses, *c.writers) for c in theirs] == [
            (row["prompt"], row["response_1"], row["response_2"], *row["models"]) for row in rows
        ]
    published = json.loads((shared_data / "expected" / "preference_checks.json").read_text())["pandalm"]
    said = [label[c.ranks[0], c.ranks[1]] for c in reading.comparisons]
    votes = [Counter(said[i : i + 3]).most_common(1)[0] for i in range(0, len(said), 3)]
    majority = Counter(verdict if count > 1 else 0 for verdict, count in votes)
    assert {str(verdict): count for verdict, count in majority.items()} == published["published_majority_counts"]
    assert write_comparisons(tmp_path / "p.jsonl", reading.comparisons, "pandalm") == (999, {})
    assert read_comparisons(tmp_path / "p.jsonl") == reading.comparisons
