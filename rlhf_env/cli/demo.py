"""`rlhf-env demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_env.cli import settings as cli
from rlhf_env.cli.pipeline import SEEDS, run_and_print


def demo(
    out: Annotated[Path, typer.Option(help="The folder to leave everything in.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of everything: models, comparisons, training.")] = 0,
    seeds: Annotated[str | None, typer.Option(metavar="N-M", help=SEEDS)] = None,
    threads: Annotated[int | None, typer.Option(help=cli.THREADS)] = None,
) -> None:
    """Run the whole pipeline on film reviews from nothing, in a few minutes.

    A small language model learns to write reviews, a simulated labeler (who likes happy ones) compares what it writes,
    a reward model learns from the comparisons, and PPO maximises it under a KL penalty. OUT/report.html shows it all.
    """
    cli.use_threads(threads)

    from rlhf_env.worlds.reviews import pipeline_config

    run_and_print(pipeline_config(seed), out, seeds)
