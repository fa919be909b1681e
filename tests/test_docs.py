"""What the documentation shows, runs: its Python always, its commands among the slow tests."""

import re
import shlex
import shutil
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

from rlhf_env.cli import main
from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import read_comparisons, write_comparisons
from rlhf_env.records.jsonl import write_jsonl
from rlhf_env.text.corpus import film_reviews, review_openings
from rlhf_env.text.demonstrations import load_demonstrations
from rlhf_env.types import Comparison
from rlhf_env.worlds.reviews import ASSETS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.rst"))


def blocks(page: Path, language: str) -> list[tuple[str | None, str]]:
    """The page's code blocks in a language, each with its caption."""
    pattern = rf"^\.\. code-block:: {language}\n(?:   :caption: (.+)\n)?\n((?:   .*\n|\n)+)"
    found = re.findall(pattern, page.read_text(encoding="utf-8") + "\n", re.MULTILINE)
    return [(caption or None, textwrap.dedent(code)) for caption, code in found]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with what the pages use of what `make demo` leaves, and with files of one's own."""
    demo, texts, openings = tmp_path / "runs/demo", film_reviews()[:200], review_openings()
    for name, stage in (("reference", "sft"), ("proxy", "reward")):
        shutil.copytree(ASSETS / name, demo / stage / "model")
    (demo / "prompts").mkdir()
    (demo / "prefer").mkdir()
    write_jsonl(demo / "prompts/train.jsonl", [{"prompt": prompt} for prompt in openings[:-7]])
    write_jsonl(demo / "prompts/eval.jsonl", [{"prompt": prompt} for prompt in openings[-7:]])
    ends = [" ".join(["", *text.split()[3:]]) for text in texts]
    judged = [Comparison(prompt, pair, (0, 1)) for prompt, *pair in zip(openings, ends, ends[100:], strict=False)]
    write_comparisons(demo / "prefer/comparisons.jsonl", judged)
    write_comparisons(tmp_path / "pairs.jsonl", judged)
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(page: Path) -> list[list[str]]:
    """The page's commands that can run here; there is no interrupted run to resume."""
    code = "".join(code for _, code in blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in code.splitlines()]
    return [words for words in lines if words[:1] == ["rlhf-env"] and "--resume" not in words]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_of_a_page_runs_from_top_to_bottom(page, folder):
    names = {"__name__": page.stem}
    for _, code in blocks(page, "python"):
        exec(compile(code, str(page), "exec", dont_inherit=True), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_commands_of_a_page_run(page, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for caption, code in blocks(page, "python") + blocks(page, "yaml") + blocks(page, "text"):
        if caption:
            (folder / caption).write_text(code, encoding="utf-8")
    for words in commands(page):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code, words


def names_in(page: Path) -> list[str]:
    """What the page's roles, such as :func:`rlhf_env.evaluate`, refer to."""
    return re.findall(r":(?:func|class|mod):`(?:[^`<]*<)?([\w.]+)>?`", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [p for p in PAGES if names_in(p)], ids=lambda p: p.stem)
def test_names_that_a_page_refers_to_exist(page):
    for target in names_in(page):  # one that resolves to nothing would be plain text, without a warning
        module, _, name = target.rpartition(".")
        assert hasattr(import_module(module), name), target


def named_tests(page: Path) -> list[str]:
    """The tests that a page names, as pytest does."""
    return re.findall(r"``(tests/[\w/]+\.py(?:::\w+)?)``", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [p for p in PAGES if named_tests(p)], ids=lambda p: p.stem)
def test_tests_that_a_page_names_exist(page):
    for test in named_tests(page):
        file, _, name = test.partition("::")
        assert f"def {name}" in (DOCS.parent / file).read_text(encoding="utf-8"), test


def test_every_detail_that_matters_has_a_test_or_a_reason():
    rows = (DOCS / "agents/details.rst").read_text(encoding="utf-8").split("\n   * - ")[1:]
    rows = [row for row in rows if not row.startswith("detail\n")]
    assert len(rows) > 40
    assert [row.partition("\n")[0] for row in rows if not re.search(r"``tests/.+::test_\w+``", row)] == []


def refused_rows(title: str) -> list[tuple[str, str]]:
    """What a table of the data page says is refused, and with which message."""
    page = (DOCS / "data.rst").read_text(encoding="utf-8")
    table = page.partition(f".. list-table:: {title}\n")[2].partition(".. list-table::")[0]
    rows = re.findall(r"^   \* - (.+)\n     - (.+)$", table, re.MULTILINE)
    return [(row.strip("`"), message.strip("`")) for row, message in rows if row != "rows"]


@pytest.mark.parametrize(
    ("read", "file", "row", "message"),
    [
        pytest.param(read, file, *case, id=f"{title} {number}")
        for title, read, file in (
            ("demonstrations", load_demonstrations, "rows.jsonl"),
            ("comparisons", read_comparisons, "rows.jsonl"),
            ("texts", load_demonstrations, "rows.txt"),
        )
        for number, case in enumerate(refused_rows(title), start=1)
    ],
)
def test_bad_rows_are_refused_as_the_data_page_says(read, file, row, message, tmp_path):
    text = "" if row == "(an empty file)" else row.replace(" ⏎ ", "\n") + "\n"
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read(tmp_path / file)
    assert str(caught.value).replace(str(tmp_path / file), "FILE") == f"FILE{message}"


def test_the_data_page_has_bad_rows_of_each_kind():
    assert [len(refused_rows(title)) > 1 for title in ("demonstrations", "comparisons", "texts")] == [True] * 3
