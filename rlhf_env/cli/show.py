"""Progress, tables and samples on a terminal, or as plain lines where there is none."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from rlhf_env.records.safe_text import safe_text
from rlhf_env.training.report import decimal

_SECONDS_BETWEEN_LINES = 10.0
_MEANS = ("epoch", "loss", "accuracy", "score", "kl", "eval_score")  # of a row, as far as its agent has them


@contextmanager
def training_progress(budget: Mapping[str, int]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows each row of a training run: in a bar on a terminal, in lines now and then elsewhere.

    Without a budget nobody but the agent knows when it ends.
    """
    ((unit, total),) = budget.items() or [("updates", None)]
    field = {"updates": "update"}.get(unit, unit)
    console = Console(stderr=True)
    done = seconds = 0.0
    before: float | None = None

    def facts(row: dict[str, Any]) -> str:
        nonlocal done, seconds, before
        used = row[field]
        if before is None:  # a resumed run's first row counts for one update, not for all of them
            before = used - used / row["update"]
        done, seconds, before = done + used - before, seconds + row["seconds"], used
        means = "".join(f"  {name} {decimal(row[name])}" for name in _MEANS if name in row)
        speed = f"  {row['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in row else ""
        left = "" if total is None else f"  {clock(max(total - used, 0) * seconds / done)} left"
        return f"update {row['update']}{means}{speed}{left}"

    if console.is_terminal:
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("measuring the start", total=total)
            yield lambda row: bar.update(task, completed=min(row[field], total or row[field]), description=facts(row))
        return

    printed = -_SECONDS_BETWEEN_LINES

    def line(row: dict[str, Any]) -> None:
        nonlocal printed
        text, now = facts(row), time.monotonic()
        if now - printed >= _SECONDS_BETWEEN_LINES or row[field] >= (total or math.inf):
            printed = now
            of = "" if total is None else f"/{total:,}"
            print(f"{unit} {row[field]:,}{of}  {text}", file=sys.stderr, flush=True)

    yield line


@contextmanager
def step_progress() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that shows each gradient step's row (`step` of `steps`, `loss`): a bar on a terminal, else lines."""
    console = Console(stderr=True)
    began = printed = time.monotonic()
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(row: Mapping[str, Any]) -> None:
            nonlocal printed
            step, steps, now = row["step"], row["steps"], time.monotonic()
            means = "".join(f"  {name} {decimal(row[name])}" for name in ("loss", "accuracy") if name in row)
            left = clock((now - began) / step * (steps - step))
            facts = f"{step:,}/{steps:,} steps{means}  {left} left"
            bar.update(task, completed=step, total=steps, description=facts)
            if not console.is_terminal and (now - printed >= _SECONDS_BETWEEN_LINES or step == steps):
                printed = now
                print(facts, file=sys.stderr, flush=True)

        yield show


@contextmanager
def response_progress() -> Iterator[Callable[[int, int], None]]:
    """A function that is told how many more responses are finished, of how many: a bar on a terminal, else lines."""
    console = Console(stderr=True)
    began = printed = time.monotonic()
    done = 0
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(more: int, total: int) -> None:
            nonlocal done, printed
            done, now = done + more, time.monotonic()
            rate = done / max(now - began, 1e-9)
            left = clock(max(total - done, 0) / rate)
            facts = f"{done:,}/{total:,} responses  {rate:,.1f} per second  {left} left"
            bar.update(task, completed=done, total=total, description=facts)
            if not console.is_terminal and now - printed >= _SECONDS_BETWEEN_LINES:
                printed = now
                print(facts, file=sys.stderr, flush=True)

        yield show


def metrics_table(columns: Mapping[str, Sequence[str]], title: str | None = None) -> None:
    """Print a table whose first column names the metrics and whose others are given as text."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(Text(safe_text(cell)) for cell in cells))
    _console().print(table)


def samples_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print texts side by side; `columns` maps headings to keys of `rows`, whose scores stand in "score_" + key."""
    table = Table(show_lines=True, title="samples", title_justify="left")
    for heading in columns:
        table.add_column(heading, overflow="fold")
    for row in rows:
        cells = []
        for key in columns.values():
            score = row.get(f"score_{key}")
            cells.append(Text(safe_text(row[key]) + ("" if score is None else f"  ({score:+.3f})")))
        table.add_row(*cells)
    _console().print(table)


def _console() -> Console:
    """As wide as the terminal, or wide enough for most tables where there is none."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def clock(seconds: float) -> str:
    """A duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
