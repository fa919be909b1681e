"""`rlhf-env grid`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_env.cli import settings as cli
from rlhf_env.errors import ConfigError
from rlhf_env.lab.grid import GridConfig, cells, run_here, run_on_ray, write_results
from rlhf_env.lab.worlds import WorldConfig
from rlhf_env.records.safe_text import safe_text

_RAY = 'Run on the Ray cluster at this address ("auto", "ray://host:10001"; "local": one of its own), not here.'
MORE_TO_GRID = (
    cli.rest_of(cli.sentences(GridConfig), {})
    + "\n\nA world is either settings of `rlhf-env train`, or a built-in one:\n\n"
    + cli.rest_of(cli.sentences(WorldConfig), {}).partition("\n")[2]
)


def grid(
    config: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Agents, worlds, seeds and what varies.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=cli.OVERRIDES)] = None,
    out: Annotated[Path | None, typer.Option(help="The grid's folder; the same command goes on where it was.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, one core each.")] = 1,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help=_RAY)] = None,
) -> None:
    """Run every agent in every world with every seed and setting, and make one table of it.

    Each run has a folder of its own, OUT/WORLD/AGENT/…/seed-N. OUT/results.csv has a row for each finished run,
    OUT/table.md means over seeds. What is finished is not run again; a run that fails is named, and the others go on.
    """
    if out is None:
        raise ConfigError("--out is missing: the folder to leave the runs in, for example --out runs/grid")
    runs = cells(cli.settings_from(GridConfig, config, {}, overrides))
    failed = 0
    try:
        going = run_here(runs, out, jobs) if ray is None else run_on_ray(runs, out, ray)
        for number, (cell, found) in enumerate(going, start=1):
            failed += isinstance(found, Exception)
            said = f"failed: {found}" if isinstance(found, Exception) else _result(found)
            print(safe_text(f"{number}/{len(runs)} {cell}: {said}"), file=sys.stderr, flush=True)
            write_results(runs, out)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise
    print((out / "table.md").read_text(encoding="utf-8"), end="")
    if failed:
        raise ConfigError(f"{failed} of {len(runs)} runs failed; the same command tries them again")


def _result(summary: dict[str, object]) -> str:
    names = [name for name in ("gain", "gold_after", "score_after", "kl") if name in summary]
    return ", ".join(f"{name} {summary[name]:.3f}" for name in names) + f" ({summary['seconds']:.0f} s)"
