"""Agents × worlds × seeds × settings: one run folder each, and one table of them all."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_env.errors import ConfigError
from rlhf_env.intervals import mean_interval
from rlhf_env.lab.worlds import WorldConfig
from rlhf_env.records.atomic import write_atomic
from rlhf_env.records.config import Layer, build, dotted_layer, to_dict
from rlhf_env.records.run import Run
from rlhf_env.training.config import BUDGETS, TrainConfig, parse_seeds

#: What a row of the results has of a run's summary, where the run has it.
MEASURED = (
    *("gain", "gold_before", "gold_after", "score_before", "score_after", "kl", "kl_bound", "length", "distinct_2"),
    *("updates", "episodes", "tokens", "queries", "seconds"),
)
_IN_TABLE = ("gain", "gold_after", "score_after", "kl", "kl_bound", "length", "tokens", "seconds")


@dataclass(frozen=True)
class GridConfig:
    """Many runs: every agent in every world, with every seed and every combination of what varies."""

    agents: dict[str, dict[str, Any]]  #: name of a row: its agent's settings; `agent` says which, if not the name
    worlds: dict[str, dict[str, Any]]  #: name: a built-in one, {world: keywords}, or settings of `rlhf-env train`
    seeds: str = "0-4"  #: one run for each; in built-in worlds also the number of the world
    run: dict[str, Any] = field(default_factory=dict)  #: settings of every run, e.g. tokens, eval_episodes, settings
    vary: dict[str, Any] = field(default_factory=dict)  #: dotted settings and the list of values of each

    def __post_init__(self) -> None:
        if not self.agents or not self.worlds:
            raise ConfigError("a grid needs agents and worlds, at least one of each")
        for kind, names in (("agent", self.agents), ("world", self.worlds)):
            for name in names:
                _require_name(kind, name)
        for key, values in self.vary.items():
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError(f"vary.{key} must be a list of values, it is {values!r}")


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    world: str
    agent: str
    varied: dict[str, Any]  # dotted setting: value
    seed: int
    config: TrainConfig | WorldConfig
    folder: Path  # below that of the grid

    @property
    def row(self) -> tuple[str, ...]:
        """What it shares with the runs that differ in the seed only."""
        return (self.world, self.agent, *map(_shown, self.varied.values()))

    def __str__(self) -> str:
        varied = "".join(f", {key}={_shown(value)}" for key, value in self.varied.items())
        return f"{self.agent} in {self.world}{varied}, seed {self.seed}"


def cells(grid: GridConfig) -> list[Cell]:
    """The runs of a grid in the order of its file, seeds fastest. Raises `ConfigError` naming the first wrong one."""
    found, seeds = [], parse_seeds(grid.seeds)
    for (world, task), (agent, own) in itertools.product(grid.worlds.items(), grid.agents.items()):
        settings = {name: value for name, value in own.items() if name != "agent"}
        for values in itertools.product(*grid.vary.values()):
            varied = dict(zip(grid.vary, values, strict=True))
            kind = WorldConfig if "world" in task else TrainConfig
            named = {"agent": own.get("agent", agent), "settings": settings}
            layers = [Layer("run", grid.run), Layer(f"worlds.{world}", task), Layer(f"agents.{agent}", named)]
            layers.append(dotted_layer("vary", varied.items()))
            parts = [world, agent, *(f"{key}={_shown(value)}" for key, value in varied.items())]
            for seed in seeds:
                folder = Path(*(re.sub(r"[^\w.=,+ -]", "_", part) for part in parts), f"seed-{seed}")
                config = build(kind, *_one_budget(layers), Layer("seeds", {"seed": seed}))
                found.append(Cell(world, agent, varied, seed, config, folder))
    for one, others in itertools.groupby(sorted(cell.folder for cell in found)):
        if len(list(others)) > 1:
            raise ConfigError(f"two runs of the grid would be in {one}: give them names that differ in their letters")
    return found


def run_cell(cell: Cell, out: Path) -> dict[str, Any]:
    """Run one cell below `out`, or go on with it, or find that it is finished; returns its summary.

    Raises `ConfigError` where the folder holds a run of other settings.
    """
    from rlhf_env.lab.worlds import run_in_world
    from rlhf_env.training.agents import is_sb3
    from rlhf_env.training.run import changed_settings, run_training

    folder = out / cell.folder
    begun = (folder / "config.yaml").is_file()
    budget: dict[str, Any] = cell.config.budget  # which a training run writes down, also where it is the default
    settings = replace(cell.config, **budget) if isinstance(cell.config, TrainConfig) else cell.config
    if begun and (changed := changed_settings(settings, folder)):
        raise ConfigError(f"{folder} holds a run with another {', '.join(changed)}: give the grid another --out")
    if Run(folder).finished:
        return Run(folder).summary
    if isinstance(cell.config, WorldConfig):
        shutil.rmtree(folder, ignore_errors=True)  # a short run, begun anew
        return run_in_world(cell.config, folder)
    if begun and is_sb3(cell.config.agent):  # which cannot be resumed
        shutil.rmtree(folder)
        begun = False
    return run_training(cell.config, folder, resume=begun)


def results(grid: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """One row for each finished run of the grid in `out`, in its order: what it was, and what it measured."""
    rows = []
    for cell in grid:
        if not Run(out / cell.folder).finished:
            continue
        summary = Run(out / cell.folder).summary
        what = {"world": cell.world, "agent": cell.agent, **cell.varied, "seed": cell.seed}
        rows.append(what | {name: summary[name] for name in MEASURED if name in summary})
    return rows


def write_results(grid: Sequence[Cell], out: Path) -> Path:
    """Write results.csv, made from the run folders alone, and table.md, its means over seeds; returns the table."""
    import csv
    import io

    rows, text = results(grid, out), io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows({name: _shown(value) for name, value in row.items()} for row in rows)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.csv", text.getvalue().encode("utf-8"))
    write_atomic(out / "table.md", table(grid, rows).encode("utf-8"))
    return out / "table.md"


def table(grid: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of means over seeds with 95 % intervals (Student's t), one row for each agent and setting."""
    varied = list(grid[0].varied)
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["world"], row["agent"], *(_shown(row[name]) for name in varied))
        groups.setdefault(key, []).append(row)
    columns = [name for name in _IN_TABLE if any(name in row for row in rows)]
    lines = ["| " + " | ".join(["world", "agent", *varied, "seeds", *columns]) + " |"]
    lines.append("|---" * (3 + len(varied) + len(columns)) + "|")
    for key, found in groups.items():
        cells = [_mean([row[name] for row in found if name in row]) for name in columns]
        lines.append("| " + " | ".join([*key, str(len(found)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def run_here(grid: Sequence[Cell], out: Path, jobs: int) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    """Run all cells in `jobs` processes of this machine, of one thread each, yielding each as it ends, well or not.

    Interrupted, it ends when the runs that are going on have ended.
    """
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(jobs, get_context("spawn"), _one_thread) as pool:
        running = {pool.submit(run_cell, cell, out): cell for cell in grid}
        try:
            for done in as_completed(running):
                error = done.exception()
                yield running[done], done.result() if error is None else _plain(error)
        finally:  # interrupted: what has not begun does not begin
            for future in running:
                future.cancel()


def run_on_ray(grid: Sequence[Cell], out: Path, address: str) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    """The same on a Ray cluster, one core for each run; `out` must be a folder that all of its machines share."""
    try:
        import ray  # type: ignore[import-not-found]
        from ray.exceptions import RayTaskError  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError("--ray needs Ray, which is not installed: pip install 'rlhf-env[ray]'") from error
    ray.init(address=None if address == "local" else address, log_to_driver=False, configure_logging=False)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(_run_alone)
        running = {remote.remote(cell, out.resolve()): cell for cell in grid}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(done)
            try:
                yield cell, ray.get(done)
            except RayTaskError as error:
                yield cell, _plain(error.cause if isinstance(error.cause, Exception) else error)
    finally:
        ray.shutdown()


def _run_alone(cell: Cell, out: Path) -> dict[str, Any]:
    _one_thread()
    return run_cell(cell, out)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _plain(error: BaseException) -> Exception:
    if not isinstance(error, Exception):
        raise error
    return error


def _one_budget(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, the budget of the last one that has any taken out of those before it."""
    budgeted = [i for i, layer in enumerate(layers) if any(unit in layer.values for unit in BUDGETS)]
    last = budgeted[-1] if budgeted else 0
    return [
        layer if i >= last else Layer(layer.source, {k: v for k, v in layer.values.items() if k not in BUDGETS})
        for i, layer in enumerate(layers)
    ]


def _require_name(kind: str, name: str) -> None:
    if not re.search(r"\w", name) or len(name) > 100:
        raise ConfigError(f"{name!r} is no name for an {kind}: it names folders, so give it a letter and at most 100")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(to_dict(value))


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    m = mean_interval("x", values)
    digits = 0 if abs(m["x"]) >= 1000 else 3
    certain = m.get("x_low", 0.0) >= m.get("x_high", 0.0)
    return f"{m['x']:,.{digits}f}" + ("" if certain else f" [{m['x_low']:,.{digits}f}, {m['x_high']:,.{digits}f}]")
