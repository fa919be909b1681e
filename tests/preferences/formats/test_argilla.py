"""Argilla's exports, nested and flat: rankings and labels, of several people; drafts are counted."""

import json

import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import load_comparisons, read_comparisons
from rlhf_env.types import Comparison
from tests.tiny_files import write_rows

FIELDS = {"prompt": "p", "response_1": "a", "response_2": "b", "response_3": "c"}


def record(*answers, fields=FIELDS, **questions):
    """A record as `to_json` writes it."""
    return {
        "id": "7f",
        "fields": fields,
        "metadata": {},
        "suggestions": {"ranking": {"value": ["response_3"], "score": None, "agent": None}},
        "responses": {"ranking": list(answers), **questions},
        "vectors": {},
        "_server_id": "8e",
    }


def answer(value, user="u1", **more):
    return {"value": value, "user_id": user, **more}


def test_a_ranking_lists_the_names_of_fields_the_best_first(tmp_path):
    file = tmp_path / "records.json"  # to_json writes one array
    rows = [record(answer(["response_2", "response_3", "response_1"]), answer(["response_1", "response_2"], "u2"))]
    file.write_text(json.dumps(rows))
    reading = load_comparisons(file)
    assert (reading.form, reading.lost) == ("argilla", {})
    assert reading.comparisons == [
        Comparison("p", ("a", "b", "c"), (2, 0, 1), "u1"),
        Comparison("p", ("a", "b"), (0, 1), "u2"),
    ]


def test_equal_ranks_are_a_tie_and_options_may_have_hyphens(tmp_path):
    value = [{"rank": 1, "value": "response-3"}, {"rank": 1, "value": "response-1"}, {"rank": 3, "value": "response-2"}]
    assert read_comparisons(write_rows(tmp_path / "a.jsonl", record(answer(value)))) == [
        Comparison("p", ("a", "b", "c"), (0, 1, 0), "u1")
    ]


@pytest.mark.parametrize(("label", "ranks"), [("response_1", (0, 1)), ("Response-2", (1, 0)), ("tie", (0, 0))])
def test_a_label_names_the_better_of_two_fields(tmp_path, label, ranks):
    fields = {"instruction": "p", "context": "not the prompt", "response_1": "a", "response_2": "b"}
    file = write_rows(tmp_path / "a.jsonl", record(answer(label), fields=fields, why=[answer("because")]))
    assert read_comparisons(file) == [Comparison("p", ("a", "b"), ranks, "u1")]


def test_drafts_and_discarded_answers_are_counted_not_read(tmp_path):
    value = ["response_1", "response_2"]
    rows = [
        record(answer(value, status="submitted"), answer(value, "u2", status="draft")),
        record(answer(value, status="discarded")),
        record(),
    ]
    reading = load_comparisons(write_rows(tmp_path / "a.jsonl", *rows))
    assert len(reading.comparisons) == 1
    assert reading.lost == {
        "answers that are draft": 1,
        "answers that are discarded": 1,
        "records without an answer": 2,
    }


def test_flat_records_of_data_sets(tmp_path):
    row = {
        "id": "7f",
        "status": "completed",
        "_server_id": "8e",
        **FIELDS,
        "ranking.responses": [["response_1", "response_2"], ["response_2", "response_1"], ["response_1", "response_2"]],
        "ranking.responses.users": ["u1", "u2", "u3"],
        "ranking.responses.status": ["submitted", "submitted", "draft"],
        "ranking.suggestion": None,
    }
    reading = load_comparisons(write_rows(tmp_path / "a.jsonl", row))
    assert reading.comparisons == [
        Comparison("p", ("a", "b"), (0, 1), "u1"),
        Comparison("p", ("a", "b"), (1, 0), "u2"),
    ]
    assert reading.lost == {"answers that are draft": 1}
    with pytest.raises(DataError, match=":1: 'ranking.responses' and its .users and .status differ in length"):
        read_comparisons(write_rows(tmp_path / "a.jsonl", row | {"ranking.responses.users": ["u1"]}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (record(answer(["response_1", "response_9"])), ":1: no question compares fields: none of 'ranking' has an ans"),
        (record(answer(["response_1", "Response-1"])), ":1: the ranking .* names a field twice"),
        (record(answer(["response_1"])), ":1: no question compares fields"),
        (record(answer("response_1")), ":1: the label 'response_1' is of two fields, whose names end with _1 and _2"),
        (record(answer("prompt"), fields={"prompt": "p", "x_1": "a", "x_2": "b"}), ":1: the label 'prompt' is none of"),
        (record(answer("tie"), again=[answer("tie")]), ":1: several questions compare fields: 'ranking', 'again'"),
        (
            record(answer(["x_1", "x_2"]), fields={"one": "p", "two": "q", "x_1": "a", "x_2": "b"}),
            ":1: which field is the prompt. .* there is 'one', 'two'; call it 'prompt' or",
        ),
        (record(answer(["response_1", "response_2"]), answer(7)), ":1: the answer 7 names no fields to compare"),
        ({"fields": FIELDS, "responses": {"q": {"value": 1}}}, ":1: responses: 'q' must be a list, it is an object"),
        ({"fields": FIELDS, "responses": {"q": [7]}}, r":1: 'q\[0\]' must be an object, it is an integer"),
        ({"fields": FIELDS}, ":1: the key 'responses' is missing"),
    ],
)
def test_a_record_that_says_no_ranking_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_comparisons(write_rows(tmp_path / "a.jsonl", row))
