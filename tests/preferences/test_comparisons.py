"""Comparisons in files: which form a file is in, our own form, and each error with its line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.comparisons import (
    FORMATS,
    distinct,
    load_comparisons,
    read_comparisons,
    write_comparisons,
)
from rlhf_env.types import Comparison


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pairs.jsonl"


def write_lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- reading ---------------------------------------------------------------------------------------

RANKING = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 0, 1]}
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def test_rankings_with_and_without_what_is_optional(file):
    known = {"labeler": "ann", "policy": "sft", "order": [2, 0, 1], "time": "2026-01-01T00:00:00Z"}
    assert read_comparisons(write_lines(file, RANKING, RANKING | known)) == [
        Comparison("p", ("a", "b", "c"), (1, 0, 1)),
        Comparison("p", ("a", "b", "c"), (1, 0, 1), "ann", "sft", (2, 0, 1), "2026-01-01T00:00:00Z"),
    ]


def test_the_chosen_of_a_pair_is_its_first_and_best_response(file):
    assert read_comparisons(write_lines(file, PAIR)) == [Comparison("p", ("good", "bad"), (0, 1))]


def test_other_keys_are_ignored(file):
    rows = [PAIR | {"id": 7, "score_chosen": 0.5}, PAIR | {"responses": ["x"]}]
    assert read_comparisons(write_lines(file, *rows)) == [Comparison("p", ("good", "bad"), (0, 1))] * 2
    assert len(read_comparisons(write_lines(file, RANKING | {"model": "m", "chosen": None}))) == 1


def test_prompts_and_responses_may_be_empty(file):
    row = {"prompt": "", "chosen": "", "rejected": "x"}
    assert read_comparisons(write_lines(file, row)) == [Comparison("", ("", "x"), (0, 1))]


def test_one_line_without_an_end_after_a_byte_order_mark_is_a_file(file):
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert len(read_comparisons(file)) == 1


BAD_SECOND_LINES = {  # after the ranking in line 1
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1],}': ":2:57: malformed JSON|:2:58: malformed JSON",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, NaN]}': ":2: NaN is no JSON",
    '{"prompt": "p", "prompt": "q", "responses": ["a", "b"], "ranks": [0, 1]}': ":2: the key 'prompt' occurs twice",
    '{"prompt": "\\ud800", "responses": ["a", "b"], "ranks": [0, 1]}': ":2: half of a surrogate pair",
    '["p", ["a", "b"], [0, 1]]': ":2: a JSON object was expected, this is a list",
    '{"responses": ["a", "b"], "ranks": [0, 1]}': ":2: the key 'prompt' is missing; the row has 'responses', 'ranks'",
    '{"prompt": "p", "responses": ["a", "b"]}': ":2: the key 'ranks' is missing; the row has 'prompt', 'responses'",
    '{"prompt": "p", "response": ["a", "b"], "ranks": [0, 1]}': ":2: the key 'responses' is missing; the row has 'pro",
    '{"prompt": 3, "responses": ["a", "b"], "ranks": [0, 1]}': ":2: 'prompt' must be a string, it is an integer",
    '{"prompt": "p", "responses": "ab", "ranks": [0, 1]}': ":2: 'responses' must be a list, it is a string",
    '{"prompt": "p", "responses": ["a", null], "ranks": [0, 1]}': r":2: 'responses\[1\]' must be a string, it is null",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1.0]}': r":2: 'ranks\[1\]' must be an integer, it is a numb",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [false, true]}': r":2: 'ranks\[0\]' must be an integer, it is t",
    '{"prompt": "p", "responses": ["a"], "ranks": [0]}': ":2: a comparison needs at least 2 responses, it has 1",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0]}': ":2: the ranks of 2 responses are 2 integers from 0",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 2]}': r":2: .* without a gap.* got \[0, 2\]",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}': r":2: .* from 0 \(best\).* got \[1, 2\]",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "order": [0, 0]}': r":2: order must name each of the 2",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "order": "ab"}': ":2: 'order' must be a list, it is a s",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "order": [0, "1"]}': r":2: 'order\[1\]' must be an int",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "labeler": 7}': ":2: 'labeler' must be a string, it is",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "time": null}': ":2: 'time' must be a string, it is nu",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "policies": ["sft"]}': ":2: policies must name one for",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "policies": ["a", 1]}': r":2: 'policies\[1\]' must be",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "strength": 0}': ":2: strength must be positive and fin",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 0], "strength": 1}': ":2: strength is how much better one o",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "strength": "2"}': ":2: 'strength' must be a number, it",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "preference": 0.4}': ":2: preference 0.4 .* contradicts",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "preference": true}': ":2: 'preference' must be a numb",
    '{"prompt": "p", "answers": ["a", "b"]}': ":2: this row is in no known form, but .*pairs.jsonl:1 is a ranking",
    "{}": ":2: this row is in no known form, but .*pairs.jsonl:1 is a ranking",
    '{"prompt": "p", "responses": [], "ranks": [], "chosen": "a", "rejected": "b"}': (
        ":2: this row is a ranking .* or a pair .*, but .*pairs.jsonl:1 is a ranking"
    ),
    '{"prompt": "p", "chosen": "a", "rejected": "b"}': (
        ":2: this row is a pair .*, but .*pairs.jsonl:1 is a ranking .* one file holds one form"
    ),
}


@pytest.mark.parametrize("line", BAD_SECOND_LINES)
def test_a_bad_ranking_is_refused_with_file_line_and_reason(file, line):
    file.write_text(f"{json.dumps(RANKING)}\n{line}\n")
    with pytest.raises(DataError, match=BAD_SECOND_LINES[line]) as caught:
        read_comparisons(file)
    assert str(caught.value).startswith(f"{file}:2")


def test_lines_are_counted_as_an_editor_counts_them(file):
    file.write_text(f"\n{json.dumps(PAIR)}\r\n\n{json.dumps({'prompt': 'p', 'chosen': 'a'})}\n")
    with pytest.raises(DataError, match=":4: the key 'rejected' is missing"):
        read_comparisons(file)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"pairs\.jsonl: the file is empty"):
        read_comparisons(file)


# --- writing ---------------------------------------------------------------------------------------


def test_what_is_not_known_is_left_out_and_the_keys_keep_their_order(file):
    known = Comparison("p", ("ä", "b"), (0, 0), policy="sft", labeler="ann", time="2026-01-01T00:00:00Z", order=(1, 0))
    write_comparisons(file, [Comparison("p", ("a", "b"), (1, 0)), known])
    assert file.read_text(encoding="utf-8") == (
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 0]}\n'
        '{"prompt": "p", "responses": ["ä", "b"], "ranks": [0, 0], "labeler": "ann", "policy": "sft", '
        '"order": [1, 0], "time": "2026-01-01T00:00:00Z"}\n'
    )


@st.composite
def any_comparison(draw):
    responses = tuple(draw(st.lists(st.text(max_size=8), min_size=2, max_size=5)))
    raw = draw(st.lists(st.integers(0, 4), min_size=len(responses), max_size=len(responses)))
    ranks = tuple(sorted(set(raw)).index(rank) for rank in raw)
    known = {
        "labeler": draw(st.text(max_size=8)),
        "policy": draw(st.text(max_size=8)),
        "order": draw(st.none() | st.permutations(range(len(responses))).map(tuple)),
        "time": draw(st.none() | st.text()),
    }
    if draw(st.booleans()):
        known |= {"policy": "", "policies": tuple(draw(st.text(max_size=3)) for _ in responses)}
    if len(responses) == 2 and ranks[0] != ranks[1]:
        known["strength"] = draw(st.none() | st.integers(1, 9) | st.floats(min_value=1e-300, allow_infinity=False))
    if len(responses) == 2 and draw(st.booleans()):
        lead = ranks[1] - ranks[0]
        known["preference"] = 0.5 + 0.5 * lead * draw(st.floats(1e-9, 1))
    return Comparison(draw(st.text(max_size=8)), responses, ranks, **known)


@settings(max_examples=50, deadline=None)
@given(comparisons=st.lists(any_comparison(), min_size=1, max_size=4))
def test_any_comparisons_are_read_as_they_were_written(tmp_path_factory, comparisons):
    file = tmp_path_factory.mktemp("any") / "c.jsonl"
    write_comparisons(file, comparisons)
    assert read_comparisons(file) == comparisons


def test_a_file_that_could_not_be_read_back_is_not_written(file):
    with pytest.raises(DataError, match=r"pairs\.jsonl: there are no comparisons to write"):
        write_comparisons(file, [])
    with pytest.raises(DataError, match=r"pairs\.jsonl: there are no comparisons to write; left out: 1 ties"):
        write_comparisons(file, [Comparison("p", ("a", "b"), (0, 0))], "trl")
    with pytest.raises(ConfigError, match="not written as 'argilla': choose one of ranks, trl, hh, pandalm, graded"):
        write_comparisons(file, [Comparison("p", ("a", "b"), (0, 1))], "argilla")
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: cannot write 'responses'"):
        write_comparisons(file, [Comparison("p", ("a", "\ud800"), (0, 1))])
    assert not file.exists()


def test_identical_responses_are_left_out_and_counted():
    same, partly, other = (Comparison("p", texts, (0, 1, 2)) for texts in [("a",) * 3, ("a", "a", "b"), ("", "a", "b")])
    assert distinct([same, partly, same, other]) == ([partly, other], 2)


# --- which form -------------------------------------------------------------------------------------

ONE_OF_EACH = {
    "ranks": RANKING,
    "trl": PAIR,
    "hh": {"chosen": "\n\nHuman: p\n\nAssistant: good", "rejected": "\n\nHuman: p\n\nAssistant: bad"},
    "pandalm": {"instruction": "p", "response1": "a", "response2": "b", "annotator1": 1},
    "graded": {"prompt": "p", "response_a": "a", "response_b": "b", "preference": -1},
    "argilla": {"fields": {"prompt": "p", "r1": "a", "r2": "b"}, "responses": {"q": [{"value": ["r1", "r2"]}]}},
    "labelstudio": {
        "data": {"prompt": "p", "text1": "a", "text2": "b"},
        "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "left"}}]}],
    },
}


MESSAGES = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
ROWS_TO_SPOIL = {form: [row] for form, row in ONE_OF_EACH.items()}
ROWS_TO_SPOIL["ranks"] += [PAIR_OF_ALL := {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "order": [1, 0]}]
ROWS_TO_SPOIL["ranks"] += [PAIR_OF_ALL | {"policies": ["x", "y"], "strength": 2, "preference": 0.75, "labeler": "l"}]
ROWS_TO_SPOIL["trl"] += [{"chosen": MESSAGES, "rejected": MESSAGES}, {"chosen": "p a", "rejected": "p b", "margin": 1}]
ROWS_TO_SPOIL["trl"] += [{"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]}]
ROWS_TO_SPOIL["pandalm"] += [
    {"prompt": "p", "response_1": "a", "response_2": "b", "human_labels": [1], "models": ["x", "y"]}
]
ROWS_TO_SPOIL["graded"] += [ONE_OF_EACH["graded"] | {"labeller": "l", "model_a": "m", "model_b": "n"}]
ROWS_TO_SPOIL["argilla"] += [
    {
        "prompt": "p",
        "r_1": "a",
        "r_2": "b",
        "q.responses": ["r_1"],
        "q.responses.users": ["u"],
        "q.responses.status": ["draft"],
    },
    {
        "fields": {"prompt": "p", "r1": "a", "r2": "b"},
        "responses": {"q": [{"value": [{"rank": 1, "value": "r1"}], "user_id": "u"}]},
    },
]
ROWS_TO_SPOIL["labelstudio"] += [
    {
        "data": {"prompt": "p", "items": [{"id": "x", "body": "a"}, {"id": "y", "title": "b"}]},
        "annotations": [{"completed_by": {"id": 1}, "result": [{"type": "ranker", "value": {"ranker": ["x", "y"]}}]}],
    }
]


@pytest.mark.parametrize("form", FORMATS)
def test_the_keys_of_a_row_say_its_form(file, form):
    reading = load_comparisons(write_lines(file, ONE_OF_EACH[form], ONE_OF_EACH[form]))
    assert reading.form == form
    assert reading.places == [f"{file}:1", f"{file}:2"]
    assert reading.comparisons == [reading.comparisons[0]] * 2 and not reading.lost


@pytest.mark.parametrize("form", FORMATS)
def test_a_form_that_is_named_is_not_guessed(file, form):
    assert load_comparisons(write_lines(file, ONE_OF_EACH[form]), form).form == form
    other = next(row for name, row in ONE_OF_EACH.items() if name not in (form, "hh"))
    with pytest.raises(DataError, match=":1: "):
        read_comparisons(write_lines(file, other), form)


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_a_file_holds_one_form(file, first, second):
    if first != second:
        with pytest.raises(DataError, match=":2: this row is .*, but .*pairs.jsonl:1 is .*; one file holds one form"):
            read_comparisons(write_lines(file, ONE_OF_EACH[first], ONE_OF_EACH[second]))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 3)
    | st.floats(-1, 1)
    | st.sampled_from(["", "a", "left", "tie", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["value", "role", "id"]), inner, max_size=2)
    ),
    max_leaves=5,
)


MISSING = object()


def nodes(value, path=()):
    """The paths of all that is in a row, the row itself excepted."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    if copy[path[0]] is MISSING:
        del copy[path[0]]
    return copy


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_row_it_is_read_or_refused_by_its_line(tmp_path_factory, form, data):
    row = data.draw(st.sampled_from(ROWS_TO_SPOIL[form]))
    for _ in range(data.draw(st.integers(1, 2))):
        if paths := list(nodes(row)):
            row = replaced(row, data.draw(st.sampled_from(paths)), data.draw(JSON | st.just(MISSING)))
    file = write_lines(tmp_path_factory.mktemp("any") / "c.jsonl", row)
    for named in (form, None):
        try:
            comparisons = read_comparisons(file, named)
        except DataError as error:
            assert str(error).startswith((f"{file}:1: ", f"{file}: there is no judgement to read"))
        else:  # what is read is of the types that it should be: it comes back from our own form
            write_comparisons(file.with_name("again.jsonl"), comparisons)
            assert read_comparisons(file.with_name("again.jsonl")) == comparisons


def test_a_row_in_two_forms_is_refused_with_the_names_to_choose_from(file):
    write_lines(file, RANKING | PAIR)
    with pytest.raises(DataError, match=r":1: this row may be a ranking .* or a pair .*--from` ranks or trl"):
        read_comparisons(file)
    assert read_comparisons(file, "trl") == [Comparison("p", ("good", "bad"), (0, 1))]
    assert len(read_comparisons(file, "ranks")[0].responses) == 3


def test_a_row_in_no_form_is_refused_with_the_forms_there_are(file):
    with pytest.raises(DataError, match=r":1: this row is no comparison in a known form .*; it has 'text'") as caught:
        read_comparisons(write_lines(file, {"text": "a"}))
    assert all(form in str(caught.value) for form in FORMATS)
    with pytest.raises(ConfigError, match="'csv' is no form of comparisons: choose one of ranks, trl"):
        read_comparisons(write_lines(file, PAIR), "csv")


def test_an_array_of_rows_is_a_file_and_its_rows_are_counted_from_0(tmp_path):
    file = tmp_path / "export.json"
    file.write_text(json.dumps([PAIR, PAIR], indent=1))
    assert load_comparisons(file).places == [f"{file} row 0", f"{file} row 1"]
    file.write_text(json.dumps([PAIR, {"prompt": "p", "chosen": "a"}]))
    with pytest.raises(DataError, match=r"export\.json row 1: the key 'rejected' is missing"):
        read_comparisons(file)


def test_a_file_without_a_judgement_is_refused_and_says_what_it_holds(file):
    task = ONE_OF_EACH["labelstudio"]
    cancelled = task | {"annotations": [task["annotations"][0] | {"was_cancelled": True}]}
    with pytest.raises(DataError, match=r"no judgement to read: 2 cancelled annotations"):
        read_comparisons(write_lines(file, cancelled, cancelled))
