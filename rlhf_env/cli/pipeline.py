"""`rlhf-env pipeline` and `rlhf-env inspect`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_env.cli import settings as cli
from rlhf_env.cli.train import watch_training
from rlhf_env.errors import ConfigError, RemoteError, RewardError
from rlhf_env.training.config import FineTuneConfig, PipelineConfig, RewardConfig, TrainConfig, parse_seeds
from rlhf_env.training.interruption import exit_code

_DOC = cli.sentences(PipelineConfig)
MORE_TO_PIPELINE = cli.rest_of(_DOC, {})
_OVER_SEEDS = {
    **{f"{name} {when}": f"{name}_{when}" for name in ("gold", "proxy") for when in ("before", "after")},
    "KL": "kl",
    "EOS rate": "eos_rate",
    "RM accuracy": "reward_model_accuracy",
    "… on gold": "reward_model_gold_accuracy",
}
SEEDS = "Several seeds, as 0-4 or 0,1,2: one whole pipeline for each, in OUT/seed-0 and so on, and a table of them."


def pipeline(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The pipeline's settings.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=cli.OVERRIDES)] = None,
    out: Annotated[
        Path | None, typer.Option(help="The pipeline's folder: new, empty, or one in which it was interrupted.")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_DOC["seed"])] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N-M", help=SEEDS)] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after sft, prefer, reward or train.")] = None,
    threads: Annotated[int | None, typer.Option(help=cli.THREADS)] = None,
) -> None:
    """Run the whole pipeline from one file: fine-tuning, comparisons, reward model, training, evaluation.

    Every stage leaves its own folder, and the same command continues an interrupted pipeline at its first unfinished
    stage. OUT/report.html shows what came out.
    """
    if out is None:
        raise ConfigError("--out is missing: the folder to leave the pipeline in, for example --out runs/first")
    if seed is not None and seeds is not None:
        raise ConfigError("--seed is one pipeline, --seeds several: give one of them")
    settings = cli.settings_from(PipelineConfig, config, {"seed": seed}, overrides)
    cli.use_threads(threads)
    run_and_print(settings, out, seeds, until)


def inspect(run: Annotated[Path, typer.Argument(help="The folder of a finished training run or pipeline.")]) -> None:
    """Write RUN/report.html anew: curves, reward for KL, calibration, samples with each token's numbers."""
    from rlhf_env.training.page import write_report

    print(write_report(run))


def run_and_print(config: PipelineConfig, out: Path, seeds: str | None = None, until: str | None = None) -> None:
    """Run one pipeline, or one for each of `seeds`, and print what came out."""
    if seeds is not None and until is not None:
        raise ConfigError("--until stops a single pipeline: leave --seeds out, or let the pipelines finish")
    try:
        _run(config, out, seeds, until)
    except KeyboardInterrupt as error:
        print("interrupted; the same command continues it", file=sys.stderr)
        raise typer.Exit(exit_code(error)) from None
    except (RewardError, RemoteError) as error:
        raise type(error)(f"{error}; the same command continues it") from error


def _run(config: PipelineConfig, out: Path, seeds: str | None, until: str | None) -> None:
    from rlhf_env.training.page import stage_result
    from rlhf_env.training.pipeline import run_pipeline

    if seeds is None:
        summary = run_pipeline(config, out, watch=watch, until=until)
        if until in (None, "evaluate"):
            print_pipeline(summary, out)
        else:
            print(f"{stage_result(until, summary)}\nin {out / until}; the same command without --until goes on")
        return
    summaries = {}
    for seed in parse_seeds(seeds):
        print(f"seed {seed}", file=sys.stderr)
        summaries[seed] = run_pipeline(replace(config, seed=seed), out / f"seed-{seed}", watch=watch)
    print_seeds(summaries)
    print(f"everything is in {out}; each seed has its report.html")


def print_pipeline(summary: Mapping[str, Any], out: Path) -> None:
    """Print a finished pipeline: what each stage came to, the policy before and after, two samples."""
    from rlhf_env.cli.show import metrics_table, samples_table
    from rlhf_env.records.run import Run
    from rlhf_env.training.page import stage_result
    from rlhf_env.training.report import interval

    stages = summary["seconds_by_stage"]
    results = [stage_result(name, Run(out / name).summary) for name in stages]
    metrics_table({"stage": list(stages), "seconds": [f"{s:.1f}" for s in stages.values()], "result": results})
    evaluation = Run(out / "evaluate")
    found = evaluation.summary
    names = [name for name in ("score", "gold", "kl", "win_rate", "length", "eos_rate", "distinct_2") if name in found]
    before = [interval(found, f"reference_{name}") for name in names]
    which = "held-out" if Run(out / "train").summary["held_out"] else "training"
    metrics_table(
        {"metric": names, "before": before, "after": [interval(found, name) for name in names]},
        f"{found['episodes']} responses to {found['prompts']} {which} prompts; score: the reward trained on",
    )
    samples = [row | {"score_response": row["score"]} for row in evaluation.samples[:2]]
    samples = [row | {"score_reference_response": row["reference_score"]} for row in samples]
    samples_table(samples, {"prompt": "prompt", "before": "reference_response", "after": "response"})
    print(f"{summary['seconds']:.0f} seconds\npolicy: {out / 'train' / 'model'}\nreport: {out / 'report.html'}")


def print_seeds(summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """Print one column per seed, and the mean over seeds with its 95 % interval."""
    from rlhf_env.cli.show import metrics_table
    from rlhf_env.intervals import mean_interval
    from rlhf_env.training.report import decimal, interval

    names = {name: key for name, key in _OVER_SEEDS.items() if all(key in s for s in summaries.values())}
    columns: dict[str, Sequence[str]] = {"seed": list(names)}
    columns |= {str(seed): [decimal(summary[key]) for key in names.values()] for seed, summary in summaries.items()}
    means = [mean_interval("mean", [summary[key] for summary in summaries.values()]) for key in names.values()]
    columns["mean [95 %]"] = [interval(mean, "mean") for mean in means]
    metrics_table(columns, "one pipeline per seed; interval: Student's t over seeds")


@contextmanager
def watch(name: str, config: Any) -> Iterator[Callable[..., None]]:
    """Show how a stage goes on."""
    from rlhf_env.cli.show import response_progress, step_progress

    print(f"{name} …", file=sys.stderr)
    if isinstance(config, TrainConfig):
        with watch_training(config) as show:
            yield show
    elif isinstance(config, FineTuneConfig | RewardConfig):
        with step_progress() as show:
            yield show
    else:
        with response_progress() as show:
            yield show
