"""Label Studio's JSON export: left or right, rankings, cancelled annotations."""

import json

import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import load_comparisons, read_comparisons
from rlhf_env.types import Comparison
from tests.tiny_files import write_rows

DATA = {"prompt": "p", "text1": "a", "text2": "b"}
ITEMS = {
    "prompt": "p",
    "items": [
        {"id": "blog", "title": "Blog", "body": "a"},
        {"id": "mdn", "title": "MDN", "body": "b"},
        {"id": 3, "title": "c"},
    ],
}


def chosen(side, **more):
    value = {"from_name": "pw", "to_name": "text1,text2", "type": "pairwise", "value": {"selected": side}}
    return {"id": 1, "completed_by": 10, "was_cancelled": False, "result": [value], **more}


def ranked(ranker):
    return {"result": [{"from_name": "rank", "to_name": "results", "type": "ranker", "value": {"ranker": ranker}}]}


def task(*annotations, data=DATA, **more):
    return {"id": 1, "data": data, "annotations": list(annotations), "predictions": [], "drafts": [], **more}


def test_left_is_shown_first_and_each_annotation_is_a_comparison(tmp_path):
    file = tmp_path / "export.json"
    when = "2021-03-09T22:16:08.728353Z"
    annotations = chosen("left", created_at=when), chosen("right", completed_by={"id": 4, "email": "ann@example.org"})
    file.write_text(json.dumps([task(*annotations)]))
    reading = load_comparisons(file)
    assert (reading.form, reading.lost) == ("labelstudio", {})
    assert reading.comparisons == [
        Comparison("p", ("a", "b"), (0, 1), "10", order=(0, 1), time=when),
        Comparison("p", ("a", "b"), (1, 0), "ann@example.org", order=(0, 1)),
    ]


def test_the_tags_say_which_text_was_left(tmp_path):
    swapped = chosen("left")
    swapped["result"][0]["to_name"] = "text2,text1"
    assert read_comparisons(write_rows(tmp_path / "l.jsonl", task(swapped)))[0].responses == ("b", "a")


@pytest.mark.parametrize("names", [("answer1", "answer2"), ("response_a", "response_b"), ("left", "right")])
def test_where_tags_have_other_names_the_keys_of_data_say_it(tmp_path, names):
    data = {names[1]: "b", "question": "p", names[0]: "a"}
    (comparison,) = read_comparisons(write_rows(tmp_path / "l.jsonl", task(chosen("right"), data=data)))
    assert (comparison.prompt, comparison.responses, comparison.ranks) == ("p", ("a", "b"), (1, 0))


@pytest.mark.parametrize("ranker", [["mdn", "3", "blog"], {"rank": ["mdn", 3, "blog"]}])
def test_a_ranking_lists_ids_the_best_first(tmp_path, ranker):
    assert read_comparisons(write_rows(tmp_path / "l.jsonl", task(ranked(ranker), data=ITEMS))) == [
        Comparison("p", ("a", "b", "c"), (2, 0, 1))
    ]


def test_what_is_no_judgement_is_counted(tmp_path):
    rows = [
        task(chosen("left", was_cancelled=True), chosen("left", lead_time=4.2), predictions=[{}, {}], drafts=[{}]),
        task(chosen("left") | {"result": []}),
        task(),
    ]
    reading = load_comparisons(write_rows(tmp_path / "l.jsonl", *rows))
    assert len(reading.comparisons) == 1
    assert reading.lost == {
        "cancelled annotations": 1,
        "annotations that compare nothing": 1,
        "tasks without an annotation": 1,
        "predictions": 2,
        "drafts": 1,
        "seconds taken": 1,
    }


TWICE = chosen("left")["result"] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (task(chosen("middle")), r":1: annotations\[0\]: 'selected' must be 'left' or 'right', it is 'middle'"),
        (task(chosen("left"), chosen(["left"])), r":1: annotations\[1\]: 'selected' must be 'left' or 'right', it is"),
        (task(chosen("left", result=TWICE)), r":1: annotations\[0\]: 2 results compare something, one is read"),
        (task(chosen("left"), data={"prompt": "p", "x": "a", "y": "b"}), ":1: .* which texts were left and right"),
        (
            task(chosen("left"), data={"text1": "a", "text2": "b"}),
            ":1: .* which field is the prompt. .* there is none; call it",
        ),
        (task(ranked(["mdn", "blog"]), data=ITEMS), ":1: .* 'ranker' must list each of 'blog', 'mdn', '3' once"),
        (task(ranked({"best": ["mdn"], "_": ["blog", "3"]}), data=ITEMS), ":1: .*buckets have no order among them"),
        (task(ranked(["a"]), data={"prompt": "p"}), ":1: .* data holds 0 lists of items to rank, one is read"),
        (
            task(ranked(["a"]), data={"prompt": "p", "items": [{"id": "a"}]}),
            r":1: .* items\[0\] needs an 'id' of its ow",
        ),
        (task({"completed_by": 1}), r":1: annotations\[0\]: the key 'result' is missing"),
        (task(7), r":1: 'annotations\[0\]' must be an object, it is an integer"),
    ],
)
def test_an_annotation_that_cannot_be_told_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_comparisons(write_rows(tmp_path / "l.jsonl", row))
