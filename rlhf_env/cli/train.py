"""`rlhf-env train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_env import processes
from rlhf_env.cli import settings as cli
from rlhf_env.errors import ConfigError, RemoteError, RewardError
from rlhf_env.training.config import BUDGETS, TrainConfig
from rlhf_env.training.interruption import exit_code, postponed_signals

_DOC = cli.sentences(TrainConfig)
_FLAGS = {
    **{name: name for name in ("agent", "policy", "reference", "prompts", "eval_prompts", "reward", "gold", "data")},
    **{name: name for name in (*BUDGETS, "num_envs", "seed", "device", "dtype")},
    **{name: f"env.{name}" for name in ("beta", "target_kl", "max_new_tokens", "temperature", "chat_template")},
}
MORE_TO_TRAIN = cli.rest_of(_DOC, _FLAGS) + "\n\n`rlhf-env agents NAME` lists an agent's own settings."
_NOTHING_YET = "interrupted before there was anything to keep"
_SHOWN = ("score", "gold", "kl", "kl_bound", "win_rate", "length", "eos_rate", "distinct_1", "distinct_2")


def train(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=cli.OVERRIDES)] = None,
    policy: Annotated[str | None, typer.Option(help=_DOC["policy"])] = None,
    prompts: Annotated[str | None, typer.Option(help=_DOC["prompts"])] = None,
    reward: Annotated[str | None, typer.Option(help=_DOC["reward"])] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder, new or empty.")] = None,
    agent: Annotated[str | None, typer.Option(help=_DOC["agent"])] = None,
    data: Annotated[str | None, typer.Option(help=_DOC["data"])] = None,
    reference: Annotated[str | None, typer.Option(help=_DOC["reference"])] = None,
    eval_prompts: Annotated[str | None, typer.Option(help=_DOC["eval_prompts"])] = None,
    gold: Annotated[str | None, typer.Option(help=_DOC["gold"])] = None,
    beta: Annotated[str | None, typer.Option(metavar="FLOAT", help=_DOC["env.beta"])] = None,
    target_kl: Annotated[str | None, typer.Option(metavar="FLOAT", help=_DOC["env.target_kl"])] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help=_DOC["tokens"])] = None,
    episodes: Annotated[str | None, typer.Option(metavar="N", help=_DOC["episodes"])] = None,
    updates: Annotated[str | None, typer.Option(metavar="N", help=_DOC["updates"])] = None,
    queries: Annotated[str | None, typer.Option(metavar="N", help=_DOC["queries"])] = None,
    max_new_tokens: Annotated[str | None, typer.Option(metavar="N", help=_DOC["env.max_new_tokens"])] = None,
    temperature: Annotated[str | None, typer.Option(metavar="FLOAT", help=_DOC["env.temperature"])] = None,
    chat_template: Annotated[str | None, typer.Option(help=_DOC["env.chat_template"])] = None,
    num_envs: Annotated[str | None, typer.Option(metavar="N", help=_DOC["num_envs"])] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_DOC["seed"])] = None,
    device: Annotated[str | None, typer.Option(help=_DOC["device"])] = None,
    dtype: Annotated[str | None, typer.Option(help=_DOC["dtype"])] = None,
    config: Annotated[Path | None, typer.Option(help=cli.CONFIG)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    threads: Annotated[int | None, typer.Option(help=cli.THREADS)] = None,
) -> None:
    """Train a language model with reinforcement learning, and leave the run in a folder.

    The reward of an episode is the reward model's score minus beta times the KL to the reference. The run's folder
    holds its settings, metrics, checkpoints, samples, a figure, a card, and the trained model in model/.
    """
    given = locals()
    flags = {key: given[name] for name, key in _FLAGS.items()}
    if out is None:
        raise ConfigError("--out is missing: the folder to leave the run in, for example --out runs/first")
    stored = out / "config.yaml" if resume and config is None and (out / "config.yaml").is_file() else config
    if resume and stored is None:
        raise ConfigError(f"there is no run to resume in {out}: it has no config.yaml")
    settings = cli.settings_from(TrainConfig, stored, flags, overrides)
    cli.use_threads(threads)

    from rlhf_env.records.run import Run
    from rlhf_env.training.page import write_report
    from rlhf_env.training.run import run_training

    if beta is not None and settings.data is not None:
        print(
            f"note: {settings.agent} learns from data, and --beta only measures it; its own settings: "
            f"rlhf-env agents {settings.agent}",
            file=sys.stderr,
        )
    with processes.together(settings.device) as count:
        leads = processes.rank() == 0
        if leads and count > 1:
            print(f"{count} processes train one policy, each on its share of every batch", file=sys.stderr)
        try:
            with watch_training(settings) as on_update:
                summary = run_training(settings, out, resume=resume, on_update=on_update)
        except KeyboardInterrupt as error:
            if not Run(out).finished:
                if leads:
                    how = _how_to_go_on(settings, out, count)
                    print(f"interrupted; {how}" if how else _NOTHING_YET, file=sys.stderr)
                raise typer.Exit(exit_code(error)) from None
            summary = Run(out).summary  # the signal came too late to end anything
            write_report(out)
        except (RewardError, RemoteError) as error:
            how = _how_to_go_on(settings, out, count)
            raise type(error)(f"{error}; {how}" if how else str(error)) from error
    if leads:
        print_summary(summary, out)


def _how_to_go_on(config: TrainConfig, out: Path, count: int) -> str | None:
    """What continues the run in `out`; None where there is none yet."""
    from rlhf_env.training.agents import is_sb3

    if is_sb3(config.agent):
        return f"runs of {config.agent} cannot be resumed, only begun anew"
    if not (out / "config.yaml").is_file():
        return None
    start = "rlhf-env" if count == 1 else f"torchrun --nproc-per-node {count} -m rlhf_env"
    return f"to continue: {start} train --resume --out {shlex.quote(str(out))}"


@contextmanager
def watch_training(config: TrainConfig) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows each row of a run, and lets a signal that came meanwhile end the run after it.

    Where several processes work together, the first of them shows it.
    """
    from rlhf_env.cli.show import training_progress

    silent = nullcontext(lambda row: None)
    showing = training_progress(config.budget) if processes.rank() == 0 else silent
    with showing as show, postponed_signals() as raise_if_asked:

        def on_update(row: dict[str, Any]) -> None:
            show(row)
            raise_if_asked()

        yield on_update


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """Print a finished run: metrics before and after with their intervals, two samples, and where things are."""
    from rlhf_env.cli.show import metrics_table, samples_table
    from rlhf_env.records.run import Run
    from rlhf_env.training.report import cost, interval

    names = [name for name in _SHOWN if f"{name}_before" in summary or name in summary]
    after = [interval(summary, f"{n}_after" if n in ("score", "gold") else n) for n in names]
    before = [interval(summary, f"{n}_before") for n in names]
    kind = "held-out prompts" if summary["held_out"] else "the training prompts"
    metrics_table(
        {"metric": names, "before": before, "after": after}, f"{summary['eval_episodes']} responses to {kind}"
    )
    samples = Run.open(out).samples[:2]
    samples_table(samples, {"prompt": "prompt", "before": "before", "after": "after"})
    print(cost(summary))
    if "best_update" in summary:
        print(f"best:   {out / 'best' / 'model'} (update {summary['best_update']})")
    print(f"policy: {out / 'model'}\ncard:   {out / 'README.md'}")
