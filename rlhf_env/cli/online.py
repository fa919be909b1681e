"""`rlhf-env online`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_env.cli import settings as cli
from rlhf_env.cli.pipeline import watch
from rlhf_env.errors import ConfigError, RemoteError, RewardError
from rlhf_env.training.config import OnlineConfig
from rlhf_env.training.interruption import exit_code

_DOC = cli.sentences(OnlineConfig)
MORE_TO_ONLINE = cli.rest_of(_DOC, {})


def online(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The loop's settings.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=cli.OVERRIDES)] = None,
    out: Annotated[
        Path | None, typer.Option(help="The loop's folder: new, empty, or one in which it was interrupted.")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_DOC["seed"])] = None,
    threads: Annotated[int | None, typer.Option(help=cli.THREADS)] = None,
) -> None:
    """Several rounds of sampling, asking about chosen pairs, learning rewards anew, and training on.

    Every step leaves its own folder, OUT/round-0/pool and so on, and the same command continues an interrupted loop.
    OUT/rounds.jsonl has a row for each round, OUT/README.md a table of them.
    """
    if out is None:
        raise ConfigError("--out is missing: the folder to leave the loop in, for example --out runs/online")
    settings = cli.settings_from(OnlineConfig, config, {"seed": seed}, overrides)
    cli.use_threads(threads)

    from rlhf_env.training.online import run_online

    try:
        summary = run_online(settings, out, watch=watch)
    except KeyboardInterrupt as error:
        print("interrupted; the same command continues it", file=sys.stderr)
        raise typer.Exit(exit_code(error)) from None
    except (RewardError, RemoteError) as error:
        raise type(error)(f"{error}; the same command continues it") from error
    print_online(summary, out)


def print_online(summary: Mapping[str, Any], out: Path) -> None:
    """Print a finished loop: a column for each round."""
    from rlhf_env.cli.show import metrics_table
    from rlhf_env.records.jsonl import read_jsonl
    from rlhf_env.training.online import round_cells

    (name, numbers), *others = round_cells(read_jsonl(out / "rounds.jsonl")).items()
    columns = {number: [cells[i] for _, cells in others] for i, number in enumerate(numbers)}
    title = f"{summary['kept']:,} labels, pairs chosen by {summary['rule']}; score: that of the round's own ensemble"
    metrics_table({name: [title for title, _ in others], **columns}, title)
    print(f"{summary['seconds']:.0f} seconds\npolicy: {out / summary['policy']}\nrounds: {out / 'rounds.jsonl'}")
