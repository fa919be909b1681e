"""Bugs that RLHF code really ships, put in one at a time: the tests must fail for each.

A mutation that survives is a missing test. Every row of `mutations.py` edits one place of a copy of the package and
runs the narrowest tests that should notice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.bug)
def test_the_table_is_up_to_date(mutation: Mutation) -> None:
    """The place to edit is there, once, and so is the test that shall notice."""
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    file, *test = mutation.caught_by.split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not test or f"def {test[0].partition('[')[0]}(" in text


def copy_package(folder: Path) -> None:
    for name in ("rlhf_env", "agents", "reward_models", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, *files: str, seconds: int = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--hypothesis-seed=0", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)


@pytest.mark.slow
def test_without_a_bug_they_all_pass(tmp_path: Path) -> None:
    copy_package(tmp_path)
    code = "import rlhf_env.agents.ppo as ppo, rlhf_env.types as types; print(types.__file__, ppo.__file__, sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    imported = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert all(Path(line).is_relative_to(tmp_path) for line in imported.split()), "the copy is what is tested"
    result = run_tests(tmp_path, *dict.fromkeys(m.caught_by for m in MUTATIONS), seconds=900)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.bug)
def test_the_bug_is_caught(tmp_path: Path, mutation: Mutation) -> None:
    copy_package(tmp_path)
    file = tmp_path / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, "the place to edit is gone or no longer unique: bring this table up to date"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    result = run_tests(tmp_path, mutation.caught_by)
    # 1: tests ran and some failed; a mutation that breaks the import or the collection is no proof (2).
    assert result.returncode == 1, f"exit code {result.returncode} (0: the bug survived):\n{result.stdout[-3000:]}"
