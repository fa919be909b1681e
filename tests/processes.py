"""Real processes that begin with everything imported, so that many can be started, and killed, in a short test."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")  # which has one thread, so that no lock is held when it forks
_CONTEXT.set_forkserver_preload(
    ["rlhf_env.training.run", "transformers.models.gpt2.modeling_gpt2", "matplotlib.figure", "tests.builders"]
)


def start(function: Callable[..., Any], *args: Any, err: Path | None = None) -> BaseProcess:
    """`function`, of a module, in a process of its own, whose standard error goes to the file `err`."""
    process = _CONTEXT.Process(target=_run, args=(function, args, err))
    process.start()
    return process


def command(*words: object) -> None:
    """`rlhf-env` with these words."""
    from rlhf_env.cli import main

    sys.argv = ["rlhf-env", *map(str, words)]
    main()


def slow_command(place: tuple[str, str, int], seconds: float, marker: Path, *words: object) -> None:
    """The same, where one call takes so many `seconds` longer and first says that it has begun, with the file `marker`.

    `place` is a module, a name in it, and which of the calls of that it is, from 1.
    """
    module, dotted, at = place
    owner: Any = import_module(module)
    *outer, name = dotted.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0

    @wraps(function)
    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            marker.touch()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.05)
        return function(*args, **kwargs)

    setattr(owner, name, slow)
    command(*words)


def signalled(process: BaseProcess, marker: Path, err: Path, *signals: int) -> tuple[int, float, str]:
    """Exit code, seconds from the first signal on, and standard error of a process that gets `signals` at `marker`."""
    while not marker.exists():
        assert process.is_alive(), err.read_text()
        time.sleep(0.01)
    began = time.monotonic()
    assert process.pid is not None
    for signum in signals:
        os.kill(process.pid, signum)
        time.sleep(0.1)
    process.join()
    assert process.exitcode is not None
    return process.exitcode, time.monotonic() - began, err.read_text()


def _run(function: Callable[..., Any], args: Any, err: Path | None) -> None:
    for number, target in ((1, os.devnull), (2, os.devnull if err is None else err)):
        with open(target, "ab", buffering=0) as file:
            os.dup2(file.fileno(), number)
    function(*args)


def start_together(count: int, function: Callable[..., Any], *args: Any, err: Path | None = None) -> list[BaseProcess]:
    """`function` in `count` processes, as `torchrun` would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(_as_rank, rank, count, port, function, *args, err=err) for rank in range(count)]


def run_together(count: int, function: Callable[..., Any], *args: Any, err: Path | None = None) -> None:
    """The same, until all have ended well."""
    processes = start_together(count, function, *args, err=err)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count, "" if err is None else err.read_text()


def _as_rank(rank: int, count: int, port: int, function: Callable[..., Any], *args: Any) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in {**place, **where}.items()})
    function(*args)
