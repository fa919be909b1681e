import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_env.errors import DataError
from rlhf_env.records.jsonl import (
    append_jsonl,
    parse_jsonl,
    read_json,
    read_json_rows,
    read_jsonl,
    read_numbered_jsonl,
    require_keys,
    require_valid,
    write_json,
    write_jsonl,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


def test_reads_one_object_per_line(file):
    file.write_bytes('{"prompt": "Grüße", "n": 1}\n{"prompt": "b\\n", "n": 2.5}\n'.encode())
    assert read_jsonl(file) == [{"prompt": "Grüße", "n": 1}, {"prompt": "b\n", "n": 2.5}]


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_are_accepted(file):
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n{"a": 3}')
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_only_a_newline_ends_a_row(file):
    file.write_text('{"a": "one\u2028row\x85"}\n', encoding="utf-8")
    assert read_jsonl(file) == [{"a": "one\u2028row\x85"}]


BAD_SECOND_LINES = {
    b'{"a": 1,}': ":2:9: malformed JSON: Illegal trailing comma before end of object|:2:9: malformed JSON: Expecting",
    b'{"a": 1': ":2:8: malformed JSON",
    b'{"a": 1} {"a": 2}': ":2:10: malformed JSON: Extra data",
    b'{"a": 1, "a": 2}': ":2: the key 'a' occurs twice",
    b'{"a": {"b": 1, "b": 1}}': ":2: the key 'b' occurs twice",
    b'{"a": NaN}': ":2: NaN is no JSON",
    b'{"a": [-Infinity]}': ":2: -Infinity is no JSON",
    b'{"a": 1e999}': ":2: 1e999 is no JSON",
    b'{"a": "\\ud800"}': ":2: half of a surrogate pair",
    b'{"\\udc00": 1}': ":2: half of a surrogate pair",
    b'{"a": "\xff"}': ":2: byte 8 is not UTF-8",
    b"[1, 2]": ":2: a JSON object was expected, this is a list",
    b"null": ":2: a JSON object was expected, this is null",
    b'{"a": ' + b"[" * 100_000: ":2: JSON nested too deeply",
    b'{"a": ' + b"1" * 5000 + b"}": ":2: Exceeds the limit",
}


@pytest.mark.parametrize("line", BAD_SECOND_LINES, ids=lambda line: line[:24].decode("latin-1"))
def test_a_bad_line_is_refused_with_file_line_and_reason(file, line):
    file.write_bytes(b'{"a": 0}\n' + line + b"\n")
    with pytest.raises(DataError, match=BAD_SECOND_LINES[line]) as caught:
        read_jsonl(file)
    assert str(caught.value).startswith(str(file) + ":2")


def test_a_whole_emoji_written_as_a_surrogate_pair_is_fine(file):
    file.write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert read_jsonl(file) == [{"a": "😀"}]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(DataError, match="rows.jsonl: the file is empty"):
        read_jsonl(file)


def test_a_missing_file_is_refused_in_one_line(file):
    with pytest.raises(DataError, match="rows.jsonl: No such file"):
        read_jsonl(file)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (str, "{}", ":1: the key 'k' is missing; the row has none"),
        (str, '{"a": 1, "K": 2}', ":1: the key 'k' is missing; the row has 'a', 'K'"),
        (str, '{"k": 1}', ":1: 'k' must be a string, it is an integer"),
        (str, '{"k": null}', ":1: 'k' must be a string, it is null"),
        (int, '{"k": 1.0}', ":1: 'k' must be an integer, it is a number"),
        (int, '{"k": true}', ":1: 'k' must be an integer, it is true or false"),
        (float, '{"k": false}', ":1: 'k' must be a number, it is true or false"),
        (bool, '{"k": 1}', ":1: 'k' must be true or false, it is an integer"),
    ],
)
def test_required_keys_and_types(file, kind, row, message):
    file.write_text(row)
    with pytest.raises(DataError) as caught:
        read_jsonl(file, required={"k": kind})
    assert str(caught.value) == f"{file}{message}"


def test_an_integer_is_a_number(file):
    file.write_text('{"k": 1}')
    assert read_jsonl(file, required={"k": float}) == [{"k": 1}]


def test_rows_can_be_read_with_the_numbers_of_their_lines(file):
    file.write_bytes(b'\r\n{"a": 1}\n\n{"a": 2}\n')
    assert read_numbered_jsonl(file) == [(2, {"a": 1}), (4, {"a": 2})]
    with pytest.raises(DataError, match=":2: 'a' must be a string"):
        read_numbered_jsonl(file, required={"a": str})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "x:1: 'bad' holds a number that is not finite"),
        ([{"deep": float("-inf")}], "x:1: 'bad' holds a number that is not finite"),
        ("\ud800", "x:1: 'bad' holds half of a surrogate pair"),
        ({"\udc00": 1}, "x:1: 'bad' holds half of a surrogate pair"),
    ],
    ids=repr,
)
def test_rows_from_elsewhere_are_checked_for_what_json_cannot_hold(value, message):
    require_valid({"fine": ["😀", 1.5, None, {"a": b"bytes are not JSON but do no harm"}]}, "x:1")
    with pytest.raises(DataError, match=message):
        require_valid({"fine": 1, "bad": value}, "x:1")


def test_rows_from_elsewhere_are_checked_for_their_keys():
    require_keys({"k": 1, "other": object()}, {"k": float}, "x:1")
    with pytest.raises(DataError, match="x:1: 'k' must be a number, it is a set"):
        require_keys({"k": {1}}, {"k": float}, "x:1")


def test_append_adds_a_whole_row_at_once(file):
    append_jsonl(file, {"update": 1, "kl": np.float32(0.5), "n": np.int64(3)})
    append_jsonl(file, {"update": 2, "text": "a\nb"})
    assert file.read_bytes() == b'{"update": 1, "kl": 0.5, "n": 3}\n{"update": 2, "text": "a\\nb"}\n'


@pytest.mark.parametrize(
    "value", [float("nan"), [float("inf")], np.float32("nan"), "\ud800", {1, 2}, np.zeros(2)], ids=repr
)
def test_what_could_not_be_read_back_is_not_written(file, value):
    append_jsonl(file, {"fine": 1})
    with pytest.raises(DataError, match="rows.jsonl: cannot write 'bad'"):
        append_jsonl(file, {"fine": 1, "bad": value})
    with pytest.raises(DataError, match="rows.jsonl:2: cannot write 'bad'"):
        write_jsonl(file, [{"fine": 2}, {"bad": value}])
    assert file.read_bytes() == b'{"fine": 1}\n'


def test_write_replaces_the_file_and_leaves_nothing_else(file):
    file.write_text("old")
    write_jsonl(file, [{"a": "ä"}, {"a": "b"}])
    assert file.read_text(encoding="utf-8") == '{"a": "ä"}\n{"a": "b"}\n'
    assert list(file.parent.iterdir()) == [file]


def test_a_whole_file_can_be_one_object(tmp_path):
    write_json(tmp_path / "s.json", {"kl": 1.5, "names": ["a"]})
    assert (tmp_path / "s.json").read_text() == '{\n  "kl": 1.5,\n  "names": [\n    "a"\n  ]\n}\n'
    assert read_json(tmp_path / "s.json") == {"kl": 1.5, "names": ["a"]}
    (tmp_path / "s.json").write_text('{\n  "kl": ,\n}')
    with pytest.raises(DataError, match=r"s.json:2:9: malformed JSON"):
        read_json(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "s.json: a JSON array of objects was expected, this is an object"),
        ("[]", "s.json: the file is empty; a JSON array of objects was expected"),
        ('[{"a": 1}, 7]', "s.json row 1: a JSON object was expected, this is an integer"),
        ('[{"a": 1},\n {"a": }]', "s.json:2:8: malformed JSON"),
        ('[{"a": NaN}]', "s.json: NaN is no JSON"),
        ('[{"a": 1, "a": 2}]', "s.json: the key 'a' occurs twice"),
        ('[{"a": "\\ud800"}]', "s.json: half of a surrogate pair"),
    ],
)
def test_an_array_of_objects_is_read_as_strictly_as_lines(tmp_path, content, message):
    (tmp_path / "s.json").write_text('[{"a": 1}, {"b": null}]')
    assert read_json_rows(tmp_path / "s.json") == [{"a": 1}, {"b": None}]
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_json_rows(tmp_path / "s.json")


@given(st.binary(max_size=200))
def test_any_bytes_are_either_read_or_refused(data):
    try:
        rows = parse_jsonl(data, "fuzz", {})
    except DataError as error:
        assert str(error).startswith("fuzz:")
    else:
        assert all(isinstance(row, dict) for row in rows)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=4))
def test_the_json_of_any_row_is_read_as_it_was(rows):
    for escaped in (True, False):
        data = "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode()
        assert parse_jsonl(data, "rows", {}) == rows
