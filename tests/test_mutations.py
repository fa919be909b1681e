"""Bugs that RLHF code really ships, put in one at a time: the tests must fail for each.

A mutation that survives is a missing test. Every row of `mutations.py` edits one place of a copy of the package and
runs the narrowest tests that should notice: `mutants.py` does, for one row or for all.
"""

from __future__ import annotations

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


def test_every_bug_has_a_name_of_its_own() -> None:
    assert len({m.bug for m in MUTATIONS}) == len(MUTATIONS)
    assert 40 <= sum(m.classic for m in MUTATIONS) <= 60  # of which a minute or two is enough


@pytest.mark.slow
def test_every_bug_is_killed() -> None:
    command = [sys.executable, "-m", "tests.mutants", "--all"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    said = [line for line in result.stdout.splitlines() if ": killed by " not in line]
    assert result.returncode == 0, "\n".join(said)[-5000:] + result.stderr[-2000:]
    assert result.stdout.count(": killed by ") == len(MUTATIONS)


NOT_KILLED = """
import sys
from pathlib import Path
from tests.mutants import kill
from tests.mutations import FUNCTIONAL, Mutation

def bug(new, test="test_last_token"):
    return Mutation(new, "rlhf_env/functional.py", "return mask & ~following", new, f"{FUNCTIONAL}::{test}")

killed, none = bug("return mask"), bug("return mask & ~following  # as before")
broken = bug("return mask &", "test_gae_by_hand")  # nothing can be imported, so no test says anything
print(len(kill([killed, none, broken], Path(sys.argv[1]))))
try:
    kill([bug("return mask", "test_that_is_not_there")], Path(sys.argv[2]))
except AssertionError as error:
    print(error)
"""


@pytest.mark.slow
def test_what_survives_is_counted_and_what_breaks_is_no_proof(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NOT_KILLED, tmp_path / "first", tmp_path / "second"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "return mask: killed by" in result.stdout
    assert "# as before: SURVIVES" in result.stdout
    assert "return mask &: ENDS WITH" in result.stdout
    assert "\n2\n" in result.stdout
    assert "without a bug the tests should pass" in result.stdout
