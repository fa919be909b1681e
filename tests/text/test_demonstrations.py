import json

import pytest

from rlhf_env.errors import DataError
from rlhf_env.text.demonstrations import Demonstration, load_demonstrations


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_a_line_of_text_is_a_demonstration_without_prompt(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes("\ufeffa film\r\n  naïve 😀\n\n".encode())
    assert load_demonstrations(file) == [
        Demonstration("", "a film", f"{file}:1"),
        Demonstration("", "  naïve 😀", f"{file}:2"),
    ]


def test_rows_hold_texts_and_other_keys_are_ignored(tmp_path):
    file = write(tmp_path / "t.jsonl", {"label": 0, "text": " a\n"}, {"text": "b", "prompt": 3})
    assert load_demonstrations(str(file)) == [
        Demonstration("", " a\n", f"{file}:1"),
        Demonstration("", "b", f"{file}:2"),
    ]


@pytest.mark.parametrize("name", ["response", "completion"])
def test_rows_hold_prompts_and_responses(tmp_path, name):
    file = write(tmp_path / "t.jsonl", {"prompt": "2 + 2 =", name: " 4", "score": None})
    assert load_demonstrations(file) == [Demonstration("2 + 2 =", " 4", f"{file}:1")]


def test_an_empty_prompt_is_no_prompt(tmp_path):
    file = write(tmp_path / "t.jsonl", {"prompt": "", "response": "a"}, {"prompt": "a", "response": "b"})
    assert [d.prompt for d in load_demonstrations(file)] == ["", "a"]


def test_a_data_set_is_a_source_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    source = f"hf:{tmp_path / 'd'}"
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "text": None}] * 2).save_to_disk(tmp_path / "d")
    assert load_demonstrations(source) == [Demonstration("a", "b", f"{source}:train row {i}") for i in range(2)]


def test_real_reviews_are_texts(shared_data):
    file = shared_data / "sentiment" / "rt_polarity.train.jsonl"
    demonstrations = load_demonstrations(file)
    assert demonstrations[0] == Demonstration("", "another rent installment for the ian fleming estate .", f"{file}:1")
    assert len(demonstrations) == sum(1 for _ in file.open(encoding="utf-8"))


GOOD = b'{"prompt": "a", "response": "b"}\n'
BAD = {  # what follows one good line → where and why it is refused
    b'{"prompt": "a", "response": }': ":2:29: malformed JSON: Expecting value",
    b'{"prompt": "a", "response": "b"': ":2:32: malformed JSON",
    b'["a", "b"]': ":2: a JSON object was expected, this is a list",
    b'{"prompt": "a", "response": "b", "score": NaN}': ":2: NaN is no JSON",
    b'{"prompt": "a", "response": "b", "prompt": "c"}': ":2: the key 'prompt' occurs twice",
    b'{"prompt": "a", "response": "\\ud83d"}': ":2: half of a surrogate pair",
    b'{"prompt": "a", "response": "\xff"}': ":2: byte 30 is not UTF-8",
    b'{"prompt": "a", "response": 4}': ":2: 'response' must be a string, it is an integer",
    b'{"prompt": "a", "response": null}': ":2: 'response' must be a string, it is null",
    b'{"prompt": [{"role": "user"}], "response": "b"}': ":2: 'prompt' must be a string, it is a list",
    b'{"response": "b"}': ":2: the key 'prompt' is missing; the row has 'response'",
    b'{"prompt": "a", "response": ""}': ":2: 'response' is blank",
    b'{"prompt": "a", "response": " \\n"}': ":2: 'response' is blank",
    b'{"prompt": "a"}': ":2: a demonstration has the key 'text', or 'prompt' and 'response'; the row has 'prompt'",
    b"{}": ":2: a demonstration has the key 'text', or 'prompt' and 'response'; the row has none",
    b'{"prompt": "a", "response": "b", "text": "c"}': ":2: a demonstration has one of 'text', 'response', not several",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line.decode("latin-1"))
def test_a_bad_row_is_refused_with_file_line_and_reason(tmp_path, line):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        load_demonstrations(file)
    assert str(caught.value).startswith(f"{file}{BAD[line]}")


@pytest.mark.parametrize(
    ("other", "key"), [({"text": "c"}, "text"), ({"prompt": "a", "completion": "b"}, "completion")]
)
def test_rows_of_two_kinds_are_refused_with_both_places(tmp_path, other, key):
    good = {"prompt": "a", "response": "b"}
    file = write(tmp_path / "mixed.jsonl", good, good, other)
    with pytest.raises(DataError) as caught:
        load_demonstrations(file)
    assert str(caught.value).startswith(f"{file}:3: the row has {key!r} where {file}:1 has 'response'")


def test_a_blank_text_is_refused_with_its_line(tmp_path):
    file = write(tmp_path / "t.jsonl", {"text": "a"}, {"text": "\t"})
    with pytest.raises(DataError, match=r"t\.jsonl:2: 'text' is blank"):
        load_demonstrations(file)
    (tmp_path / "t.txt").write_text("a\n\nb\n")
    with pytest.raises(DataError, match=r"t\.txt:2: blank line"):
        load_demonstrations(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e.jsonl", "e.jsonl: the file is empty"),
        ("e.txt", "e.txt: the file is empty"),
        ("e.csv", r"e.csv: data are \.jsonl files.* \.txt files"),
    ],
)
def test_a_source_without_demonstrations_is_refused(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"\n")
    with pytest.raises(DataError, match=message):
        load_demonstrations(tmp_path / name)


@pytest.mark.parametrize("content", [b'{"text": "a"}', b'\xef\xbb\xbf{"text": "a"}\r\n\r\n'])
def test_one_row_is_enough_and_byte_order_marks_and_crlf_are_fine(tmp_path, content):
    (tmp_path / "t.jsonl").write_bytes(content)
    assert [d.response for d in load_demonstrations(tmp_path / "t.jsonl")] == ["a"]
