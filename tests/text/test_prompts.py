import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.text.prompts import load_prompts, prompt_indices


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
        ("p.txt", b"a\n\xff\n", r"p\.txt:2: not valid UTF-8"),
        ("p.txt", b"\n\n", r"p\.txt: the file holds no prompts"),
        ("p.jsonl", b"", r"p\.jsonl"),
        ("p.csv", b"a", r"p\.csv: .*\.jsonl or \.txt"),
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
