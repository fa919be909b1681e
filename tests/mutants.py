"""Kill bugs quickly: each one-line bug of `mutations.py` in a copy of the package, in a fork that has torch already.

python -m tests.mutants            the classic bugs
python -m tests.mutants --all      every bug of the table
python -m tests.mutants GAE KL     those with one of these words in their name

A line says which tests killed a bug, and in how many seconds. Exits with 1 where one survives.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # no thread may be there when it forks
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
_PACKAGES = ("rlhf_env", "agents", "reward_models", "tests")
_HEAVY = (  # what takes long to import and is not ours
    "hypothesis.strategies",
    "stable_baselines3",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "typer",
)
_FORK = multiprocessing.get_context("fork")


def kill(mutations: Sequence[Mutation], folder: Path) -> list[Mutation]:
    """Run each bug's tests against it, below `folder`; returns those that survive, whatever else went wrong included.

    Raises `AssertionError` where the tests fail without a bug.
    """
    for name in _HEAVY:
        import_module(name)
    clean = folder / "clean"
    copy_package(clean)
    began = time.perf_counter()
    code = run_tests(clean, dict.fromkeys(m.caught_by for m in mutations), seconds=1800)
    assert code == 0, f"without a bug the tests should pass, not end with {code}:\n{_said(clean)}"
    print(f"{time.perf_counter() - began:6.1f} s  without a bug: all pass", flush=True)
    survivors = []
    for mutation in mutations:
        began, mutant = time.perf_counter(), folder / "mutant"
        shutil.copytree(clean, mutant, symlinks=True, copy_function=os.link)
        put_in(mutation, mutant)
        code = run_tests(mutant, [mutation.caught_by])
        # 1: tests ran and some failed; a bug that breaks the import or the collection is no proof (2).
        verdict = "killed by" if code == 1 else "SURVIVES" if code == 0 else f"ENDS WITH {code} in"
        print(f"{time.perf_counter() - began:6.1f} s  {mutation.bug}: {verdict} {mutation.caught_by}", flush=True)
        if code != 1:
            survivors.append(mutation)
            print(_said(mutant), flush=True)
        shutil.rmtree(mutant)
    return survivors


def copy_package(folder: Path) -> None:
    """What the tests need, below `folder`."""
    for name in _PACKAGES:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def put_in(mutation: Mutation, folder: Path) -> None:
    """The bug, in place of what is there once."""
    file = folder / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, "the place to edit is gone or no longer unique: bring the table up to date"
    file.unlink()  # it may be linked to the clean one
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    Path(cache_from_source(str(file))).unlink(missing_ok=True)  # which may be of the same size and second


def run_tests(folder: Path, tests: Iterable[str], seconds: float = 300) -> int | None:
    """pytest's exit code for these tests of a copy, in a process that has imported nothing of ours."""
    process = _FORK.Process(target=_pytest, args=(folder, list(tests)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def _pytest(folder: Path, tests: list[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.chdir(folder)
    with (folder / "said.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    options = ["-x", "-q", "--hypothesis-seed=0", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = int(pytest.main([*options, *tests]))
    assert Path(sys.modules["rlhf_env"].__file__ or "").is_relative_to(folder), "the copy is what is tested"
    sys.exit(code)


def _said(folder: Path) -> str:
    return (folder / "said.txt").read_text(encoding="utf-8", errors="replace")[-3000:]


def main(words: Sequence[str]) -> int:
    """Kill what the command line names: exit code 0, or 1 where a bug survives."""
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    everything = list(words) == ["--all"]
    named = [m for m in MUTATIONS if everything or (any(w in m.bug for w in words) if words else m.classic)]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        survivors = kill(named, Path(folder))
    print(f"{time.perf_counter() - began:6.1f} s  {len(named) - len(survivors)} of {len(named)} bugs killed")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
