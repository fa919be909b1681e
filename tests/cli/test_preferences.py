"""`rlhf-env preferences stats | convert | split`: files of comparisons, looked at, written anew and split."""

from __future__ import annotations

import json

import pytest

from rlhf_env.cli.preferences import Form
from rlhf_env.preferences.comparisons import FORMATS, read_comparisons
from rlhf_env.preferences.splits import normalised
from rlhf_env.preferences.statistics import describe
from tests.tiny_files import write_rows


@pytest.fixture
def ranked(tmp_path) -> str:
    """Three rankings: one without ties, one with a tie for the first place, one of identical responses."""
    return write_rows(
        tmp_path / "ranked.jsonl",
        {"prompt": "p", "responses": ["bad", "good", "fair"], "ranks": [2, 0, 1], "labeler": "ann"},
        {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [0, 0, 1]},
        {"prompt": "r", "responses": ["same", "same"], "ranks": [0, 1]},
    )


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_command_names_the_forms_there_are():
    assert list(Form) == list(FORMATS)


# --- convert ---------------------------------------------------------------------------------------


def test_every_pair_that_is_no_tie_becomes_a_row_for_trl_and_the_rest_is_counted(command, ranked, tmp_path):
    out = tmp_path / "pairs.jsonl"
    code, shown, err = command("preferences", "convert", ranked, out, "--to", "trl")
    assert code == 0
    assert shown.splitlines() == [f"read 3 comparisons (ranks) from {ranked}", f"wrote 5 rows (trl) to {out}"]
    assert err.splitlines() == [
        "not written: 2 rankings of more than two (written as their pairs)",
        "not written: 1 ties",
        "not written: 1 pairs of identical responses",
        "not written: 3 labelers",
    ]
    pairs = {(row["prompt"], row["chosen"], row["rejected"]) for row in rows_of(out)}
    assert pairs == {
        ("p", "good", "bad"),
        ("p", "fair", "bad"),
        ("p", "good", "fair"),
        ("q", "x", "z"),
        ("q", "y", "z"),
    }


def test_pairs_become_rankings_of_two(command, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", {"prompt": "p", "chosen": "good", "rejected": "bad"})
    code, shown, err = command("preferences", "convert", pairs, tmp_path / "out.jsonl", "--to", "ranks")
    assert (code, err) == (0, "") and f"wrote 1 rows (ranks) to {tmp_path / 'out.jsonl'}" in shown
    assert rows_of(tmp_path / "out.jsonl") == [{"prompt": "p", "responses": ["good", "bad"], "ranks": [0, 1]}]


def test_rankings_stay_what_they_were(command, ranked, tmp_path):
    code, _, err = command("preferences", "convert", ranked, tmp_path / "out.jsonl", "--to", "ranks")
    assert (code, err) == (0, "")
    assert rows_of(tmp_path / "out.jsonl") == rows_of(tmp_path / "ranked.jsonl")


def test_what_is_not_read_is_counted_and_made_safe(command, tmp_path):
    answers = [{"value": ["r1", "r2"], "user_id": f"u{i}", "status": status} for i, status in enumerate("ab")]
    answers[0]["status"], answers[1]["status"] = "submitted", "\x1b[2Jdraft"
    record = {"fields": {"prompt": "p", "r1": "a", "r2": "b"}, "responses": {"ranking": answers}}
    source = write_rows(tmp_path / "a.jsonl", record)
    code, _, err = command("preferences", "convert", source, tmp_path / "out.jsonl", "--to", "graded")
    assert code == 0
    assert err.splitlines() == [
        "not read: 1 answers that are ‹U+001B›[2Jdraft",
        "not written: 1 strengths that were not known (now 1)",
    ]


def test_a_form_can_be_named(command, tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "responses": ["x", "y"], "ranks": [1, 0]}
    source, out = write_rows(tmp_path / "in.jsonl", row), tmp_path / "out.jsonl"
    code, _, err = command("preferences", "convert", source, out, "--to", "ranks")
    assert code == 1 and "--from` ranks or trl" in err and not out.exists()
    assert command("preferences", "convert", source, out, "--to", "ranks", "--from", "trl")[0] == 0
    assert rows_of(out)[0]["responses"] == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "to", "message"),
    [
        (['{"prompt": "p"'], "trl", "malformed JSON"),
        (
            [{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 0]}],
            "trl",
            "no comparisons to write; left out: 1 ties",
        ),
        (
            [{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}],
            "argilla",
            "not written as 'argilla': choose one",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(command, rows, to, message, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", *rows)
    code, _, err = command("preferences", "convert", source, tmp_path / "out.jsonl", "--to", to)
    assert (code, err.count("\n")) == (1, 1) and err.startswith("error: ") and message in err
    assert not (tmp_path / "out.jsonl").exists()


def test_an_unknown_form_is_refused_with_those_there_are(command, ranked, tmp_path):
    code, _, err = command("preferences", "convert", ranked, tmp_path / "out.jsonl", "--to", "csv")
    assert code == 2 and all(form in err for form in ("ranks", "trl", "hh", "pandalm", "graded"))
    assert command("preferences", "convert", ranked, tmp_path / "out.jsonl")[0] == 2  # --to has no default


# --- stats -----------------------------------------------------------------------------------------


def test_statistics_as_json_are_those_of_describe(command, ranked):
    code, shown, err = command("preferences", "stats", ranked, "--json")
    assert (code, err) == (0, "")
    found = describe(read_comparisons(ranked))
    assert json.loads(shown) == {"source": ranked, "form": "ranks", "not_read": {}, **found}


def cells(shown):
    """The rows of all tables as lists of cells."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]


def test_statistics_as_a_table_by_hand(command, ranked):
    code, shown, err = command("preferences", "stats", ranked)
    assert (code, err) == (0, "")
    table = dict(row for row in cells(shown) if len(row) == 2)
    expected = {
        "comparisons": "3",
        "pairs of different responses": "6",
        "… tied": "1",
        "of identical responses": "1",
        "responses compared": "1 of 2, 2 of 3",
        "longer preferred, in words": "–",
        # good and fair over bad; Wilson's interval of 1 of 1, since one ranking says both
        "longer preferred, in characters": "100.0% (20.7% to 100.0%) of 2",
    }
    assert {key: table[key] for key in expected} == expected
    assert [row[:3] for row in cells(shown) if len(row) == 7] == [["ann", "1", "0.0%"]]


def test_how_far_labelers_agree_by_hand(command, tmp_path):
    """Ann and Bob on four pairs: they agree on three, and by chance on half: κ = (3/4 − 1/2)/(1/2) = ½."""
    rows = [
        {"prompt": str(i), "responses": ["x", "y"], "ranks": ranks, "labeler": name}
        for name, answers in (("ann", "1100"), ("bob", "1000"))
        for i, ranks in enumerate([0, 1] if answer == "1" else [1, 0] for answer in answers)
    ]
    file = write_rows(tmp_path / "both.jsonl", *rows)
    _, shown, _ = command("preferences", "stats", file)
    between = next(line for line in shown.splitlines() if "ann and bob" in line)
    assert [cell.strip() for cell in between.split("│")][1:-1] == ["ann and bob", "4", "0.500"]
    assert "1/2/0/1 of 4 pairs that several judged" in shown
    ann = next(row for row in cells(shown) if row[0] == "ann")
    assert ann[-2:] == ["50.0% (15.0% to 85.0%) of 4", "0.750 [0.301, 0.954]"]  # Wilson's, of 2 and 3 of 4
    found = json.loads(command("preferences", "stats", file, "--json")[1])
    assert found["agreement"]["percent_agreement"] == 0.75


def test_hostile_names_are_made_safe_and_many_labelers_are_cut_short(command, tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "labeler": f"\x1b]0;[red]{i:02d}"} for i in range(23)
    ]
    code, shown, _ = command("preferences", "stats", write_rows(tmp_path / "in.jsonl", *rows))
    assert code == 0 and "\x1b" not in shown and "‹U+001B›]0;[red]00" in shown
    assert "… and 3 more labelers; --json has all" in shown
    _, shown, _ = command("preferences", "stats", tmp_path / "in.jsonl", "--json")
    assert "\x1b" not in shown and len(json.loads(shown)["by_labeler"]) == 23


def test_a_file_that_cannot_be_read_is_one_line(command, tmp_path):
    code, _, err = command("preferences", "stats", write_rows(tmp_path / "in.jsonl", {"text": "\x1b"}))
    assert (code, err.count("\n")) == (1, 1) and ":1: this row is no comparison in a known form" in err


def test_the_number_printed_for_hh(command, shared_data):
    code, shown, err = command("preferences", "stats", shared_data / "preferences" / "hh_harmless_base.jsonl")
    assert (code, err) == (0, "")
    table = dict(row for row in cells(shown) if len(row) == 2)
    assert table["comparisons"] == "1,807"
    assert table["longer preferred, in characters"].startswith("45.2% (")


# --- split -----------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """200 prompts, each in two spellings."""
    rows = [{"prompt": f"{p} {i}", "chosen": "a", "rejected": "b"} for i in range(200) for p in ("Prompt", " prompt ")]
    return write_rows(tmp_path / "many.jsonl", *rows)


def test_sides_are_files_without_a_common_prompt(command, many, tmp_path):
    out = tmp_path / "sides"
    code, shown, err = command("preferences", "split", many, "test=0.2", "validation=0.1", "seed=3", "--out", out)
    assert (code, err) == (0, "")
    sides = {name: read_comparisons(out / f"{name}.jsonl") for name in ("test", "validation", "train")}
    assert sorted(file.stem for file in out.iterdir()) == sorted(sides)
    assert sum(map(len, sides.values())) == 400
    prompts = {name: {normalised(c.prompt) for c in side} for name, side in sides.items()}
    assert len(set().union(*prompts.values())) == sum(map(len, prompts.values())) == 200
    expected = [f"{len(side)} comparisons of {len(side)} prompts to {out / name}.jsonl" for name, side in sides.items()]
    assert shown.splitlines() == expected


def test_the_seed_decides(command, many, tmp_path):
    for name, seed in (("a", "seed=1"), ("b", "seed=1"), ("c", "seed=2")):
        assert command("preferences", "split", many, "test=0.2", seed, "--out", tmp_path / name)[0] == 0
    a, b, c = ((tmp_path / name / "test.jsonl").read_text() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test"], "'test': give each side once, as NAME=SHARE"),
        (["test=0.1", "test=0.2"], "'test=0.2': give each side once"),
        (["../test=0.1"], "'../test=0.1': give each side once"),
        (["test=many"], "'test=many': 'many' is no number"),
        (["test=0.1", "seed=x"], "'seed=x': 'x' is no number"),
        (["seed=1"], "give at least one side beside train"),
        (["test=1.5"], "shares must be between 0 and 1"),
        (["train=0.5"], "train is what the other sides leave"),
    ],
)
def test_shares_that_make_no_sense_are_one_line(command, many, words, message, tmp_path):
    code, _, err = command("preferences", "split", many, *words, "--out", tmp_path / "sides")
    assert (code, err.count("\n")) == (1, 1) and message in err
    assert not (tmp_path / "sides").exists()


def test_a_folder_that_holds_something_is_not_written_into(command, many, tmp_path):
    code, _, err = command("preferences", "split", many, "test=0.1", "--out", tmp_path)
    assert code == 1 and "exists and is not an empty folder" in err
