import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.text.prompts import load_prompts, openings, prompt_indices, split_by_hash


def test_jsonl_gives_the_field_of_each_row(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a\\nb", "question": "q1"}\n{"prompt": " c", "question": "q2"}\n')
    assert load_prompts(file) == ["a\nb", " c"]
    assert load_prompts(str(file), field="question") == ["q1", "q2"]
    with pytest.raises(DataError, match=r"p\.jsonl:1.*'text'"):
        load_prompts(file, field="text")


def test_txt_gives_one_prompt_per_line_as_it_stands(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa film\r\n  naïve \u2028 😀\n\n \n".encode())
    assert load_prompts(file) == ["a film", "  naïve \u2028 😀"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"a\n\nb\n", r"p\.txt:2: blank line"),
        ("p.txt", b"a\n\xff\n", r"p\.txt:2: byte 1 is not UTF-8"),
        ("p.txt", b"\n\n", r"p\.txt: the file is empty"),
        ("p.jsonl", b"", r"p\.jsonl"),
        ("p.csv", b"a", r"p\.csv: .*\.jsonl files.*\.txt files"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(DataError, match=name):
        load_prompts(tmp_path / name)


def test_a_data_set_gives_its_prompts(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": ["a", " b\n"], "n": [1, 2]}).save_to_disk(tmp_path / "d")
    assert load_prompts(f"hf:{tmp_path / 'd'}") == ["a", " b\n"]
    with pytest.raises(DataError, match="row 0: 'n' must be a string"):
        load_prompts(f"hf:{tmp_path / 'd'}", field="n")


def test_openings_are_the_distinct_first_words_of_longer_texts():
    texts = [
        "the film is good",
        "a  film\tis",
        " the film",
        "the film is bad",
        "the film",
        "one two \n",
        "naïve 日本 😀",
    ]
    assert openings(texts, 2) == ["the film", "a  film", "naïve 日本"]
    assert openings(texts, 1) == ["the", "a", " the", "one", "naïve"]
    with pytest.raises(DataError, match="none of the 7 texts has more than 4 words"):
        openings(texts, 4)
    with pytest.raises(ConfigError, match="at least 1 word"):
        openings(texts, 0)


@given(st.lists(st.text(st.sampled_from("ab \n\u3000\x1c")), min_size=1), st.integers(1, 3))
def test_an_opening_begins_a_text_at_the_end_of_a_word(texts, words):
    longer = [text for text in texts if len(text.split()) > words]
    if not longer:
        with pytest.raises(DataError):
            openings(texts, words)
        return
    found = openings(texts, words)
    assert [o.split() for o in dict.fromkeys(found)] == [o.split() for o in found]
    for text in longer:
        (own,) = {o for o in found if text.startswith(o) and text[len(o)].isspace() and len(o.split()) == words}
        assert own.split() == text.split()[:words] and own == own.rstrip()


def test_each_epoch_is_a_permutation_and_epochs_differ():
    epochs = prompt_indices(7, 0, 300, 100).reshape(3, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs.tolist())
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[0] != prompt_indices(8, 0, 100, 100)).any()


@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_a_resumed_run_sees_the_same_sequence(seed, start, count, size):
    whole = prompt_indices(seed, 0, start + count, size)
    np.testing.assert_array_equal(prompt_indices(seed, start, count, size), whole[start:])
    assert whole.shape == (start + count,)


def test_positions_of_no_prompts_are_refused():
    with pytest.raises(ConfigError, match="size"):
        prompt_indices(0, 0, 1, 0)
    with pytest.raises(ConfigError, match="start"):
        prompt_indices(0, -1, 1, 5)


# --- the two sides of a split -----------------------------------------------------------------------


def test_a_split_by_hand():
    """The side is that of the first 64 bits of SHA-256 of the salt, a zero byte and the text, below share · 2^64."""
    texts = [f"prompt {i}" for i in range(40)]
    first, second = split_by_hash(texts, 0.25)
    expected = [t for t in texts if int(hashlib.sha256(b"\0" + t.encode()).hexdigest()[:16], 16) < 2**62]
    assert second == expected and first == [t for t in texts if t not in expected]
    assert 3 <= len(second) <= 18
    assert split_by_hash(texts, 0.25, salt="other")[1] != second


@given(st.lists(st.text(max_size=3), max_size=30), st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_the_sides_are_apart_complete_and_stable(texts, share, random):
    first, second = split_by_hash(texts, share)
    assert sorted(first + second) == sorted(texts)
    assert not set(first) & set(second), "equal texts are on one side"
    order = [t for t in dict.fromkeys(texts)]
    assert first == [t for t in texts if t in set(first)], "in the order they had"
    random.shuffle(order)
    others = ["something new", *order[: len(order) // 2]]
    moved = split_by_hash(others, share)
    for side, now in zip((first, second), moved, strict=True):
        assert set(now) - {"something new"} == set(side) & set(others), "where it was, whoever came or went"


def test_a_larger_share_only_adds():
    texts = [str(i) for i in range(200)]
    shares = [set(split_by_hash(texts, share)[1]) for share in (0.1, 0.3, 0.9)]
    assert shares[0] < shares[1] < shares[2]


def test_a_lone_surrogate_has_a_side_too():
    assert sum(map(len, split_by_hash(["\ud800"], 0.5))) == 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_leaves_a_side_empty_is_refused(share):
    with pytest.raises(ConfigError, match="share of a split must be between 0 and 1"):
        split_by_hash(["a"], share)
