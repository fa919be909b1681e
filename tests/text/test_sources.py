import sys
from datetime import date

import pytest

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.text.sources import read_lines, read_rows


def save(path, rows, **options):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows, **options)
    data.save_to_disk(path)
    return f"hf:{path}"


def save_splits(path, **splits):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.DatasetDict({k: datasets.Dataset.from_list(rows) for k, rows in splits.items()}).save_to_disk(path)
    return f"hf:{path}"


# --- files -----------------------------------------------------------------------------------------


def test_rows_of_a_file_stand_at_its_lines_blank_ones_counted(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\r\n{"a": 1}\r\n\r\n\r\n{"a": 2}')
    assert read_rows(file) == [(f"{file}:2", {"a": 1}), (f"{file}:5", {"a": 2})]
    assert read_rows(str(file), required={"a": int}) == read_rows(file)
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: 'a' must be a string, it is an integer"):
        read_rows(file, required={"a": str})


def test_lines_of_a_file_stand_at_their_numbers(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes("\ufeffone\r\n  naïve \u2028 😀\n\n \n".encode())
    assert read_lines(file) == [(f"{file}:1", "one"), (f"{file}:2", "  naïve \u2028 😀")]


def test_rows_of_an_array_are_counted_from_0(tmp_path):
    file = tmp_path / "export.json"
    file.write_text('\ufeff[{"a": 1},\n {"a": null}]', encoding="utf-8")
    assert read_rows(file) == [(f"{file} row 0", {"a": 1}), (f"{file} row 1", {"a": None})]
    with pytest.raises(DataError, match=r"export\.json row 1: 'a' must be an integer, it is null"):
        read_rows(file, required={"a": int})


@pytest.mark.parametrize("name", ["rows.csv", "rows", "rows.txt"])
def test_other_sources_are_refused_with_what_is_accepted(name):
    with pytest.raises(DataError, match=rf"^{name}: .*\.jsonl.*hf:NAME\[:SPLIT\]"):
        read_rows(name)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("name", "read"), [("e.jsonl", read_rows), ("e.txt", read_lines)])
def test_empty_and_missing_files_are_refused(tmp_path, name, read, content):
    with pytest.raises(DataError, match=rf"{name}: No such file"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: the file is empty"):
        read(tmp_path / name)


# --- data sets -------------------------------------------------------------------------------------


def test_rows_of_a_data_set_are_counted_from_0(tmp_path):
    source = save(tmp_path / "d", [{"text": "a", "n": [1, 2]}, {"text": "b", "n": []}])
    rows = [(f"{source}:train row 0", {"text": "a", "n": [1, 2]}), (f"{source}:train row 1", {"text": "b", "n": []})]
    assert read_rows(source) == rows
    assert read_rows(source, required={"text": str, "n": list}) == rows


def test_a_data_set_has_splits(tmp_path):
    source = save_splits(tmp_path / "d", train=[{"a": 1}], test=[{"a": 2}])
    assert read_rows(source) == [(f"{source}:train row 0", {"a": 1})]
    assert read_rows(f"{source}:test") == [(f"{source}:test row 0", {"a": 2})]
    with pytest.raises(DataError, match=f"^{source}: there is no split 'validation'; there are train, test$"):
        read_rows(f"{source}:validation")


def test_one_data_set_has_no_other_split(tmp_path):
    source = save(tmp_path / "one", [{"a": 1}])
    with pytest.raises(DataError, match="without splits, so leave out ':test'"):
        read_rows(f"{source}:test")
    named = save(tmp_path / "named", [{"a": 1}], split="test")
    assert read_rows(f"{named}:test") == [(f"{named}:test row 0", {"a": 1})]


def test_a_missing_value_is_a_missing_key(tmp_path):
    source = save(tmp_path / "d", [{"a": "x", "s": {"p": 1, "q": None}}, {"a": None, "s": {"p": None, "q": [2]}}])
    assert [row for _, row in read_rows(source)] == [{"a": "x", "s": {"p": 1}}, {"s": {"q": [2]}}]
    with pytest.raises(DataError, match="row 1: the key 'a' is missing; the row has 's'"):
        read_rows(source, required={"a": str})


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": float("-inf")}, {"x": [{"deep": float("inf")}]}], ids=str)
def test_numbers_of_a_data_set_must_be_finite(tmp_path, bad):
    source = save(tmp_path / "d", [bad])
    with pytest.raises(DataError, match=f"^{source}:train row 0: 'x' holds a number that is not finite"):
        read_rows(source)


def test_values_of_a_data_set_have_the_required_types(tmp_path):
    source = save(tmp_path / "d", [{"text": 3}])
    with pytest.raises(DataError, match=f"^{source}:train row 0: 'text' must be a string, it is an integer$"):
        read_rows(source, required={"text": str})


def test_values_that_json_does_not_have_are_refused_only_where_they_are_asked_for(tmp_path):
    source = save(tmp_path / "d", [{"text": "a", "day": date(2024, 1, 2)}])
    assert read_rows(source, required={"text": str})[0][1]["day"] == date(2024, 1, 2)
    with pytest.raises(DataError, match="row 0: 'day' must be a string, it is a date"):
        read_rows(source, required={"day": str})


def test_the_format_in_which_a_data_set_was_saved_does_not_matter(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"a": [1, 2], "b": "x"}]).with_format("numpy", columns=["a"]).save_to_disk(
        tmp_path / "d"
    )
    assert [row for _, row in read_rows(f"hf:{tmp_path / 'd'}")] == [{"a": [1, 2], "b": "x"}]


def test_what_is_no_data_set_is_refused_in_one_line(tmp_path):
    pytest.importorskip("datasets")
    empty, no_rows = save(tmp_path / "empty", []), save_splits(tmp_path / "splits", train=[])
    (tmp_path / "other").mkdir()
    for source, message in {
        empty: "the data set is empty",
        no_rows: "the data set is empty",
        f"hf:{tmp_path}/none": "there is no folder",
        f"hf:{tmp_path}/other": "cannot be read: .*neither a `Dataset` directory",
        "hf:nobody/nothing-at-all": "cannot be read: .*nobody/nothing-at-all",  # tests are offline
        "hf:": "a data set is named as hf:NAME",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            read_rows(source)
        assert str(caught.value).startswith(source) and "\n" not in str(caught.value)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-env\[hf\]'"):
        read_rows("hf:anything")
