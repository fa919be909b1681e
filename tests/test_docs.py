"""What the documentation shows, runs: its Python always, its commands among the slow tests."""

import re
import shlex
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

from rlhf_env.cli import main
from tests.tiny_files import write_tiny_files

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.rst"))


def blocks(page: Path, language: str) -> list[tuple[str | None, str]]:
    """The page's code blocks in a language, each with its caption."""
    pattern = rf"^\.\. code-block:: {language}\n(?:   :caption: (.+)\n)?\n((?:   .*\n|\n)+)"
    found = re.findall(pattern, page.read_text(encoding="utf-8") + "\n", re.MULTILINE)
    return [(caption or None, textwrap.dedent(code)) for caption, code in found]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with what `make demo` would have left there, only smaller."""
    (tmp_path / "runs/demo").mkdir(parents=True)
    write_tiny_files(tmp_path / "runs/demo")
    (tmp_path / "runs/demo/policy").rename(tmp_path / "runs/demo/reference")
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
    for caption, code in blocks(page, "python"):
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
