"""`rlhf-env reward-eval`: how good a reward model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_env.cli import settings as cli
from rlhf_env.training.config import RewardEvalConfig

_DOC = cli.sentences(RewardEvalConfig)
_NAMES = (
    "reward",
    "comparisons",
    "gold",
    "suite",
    "policy",
    "prompts",
    "best_of",
    "num_envs",
    "seed",
    "device",
    "dtype",
)
_FLAGS = {name: name for name in _NAMES} | {name: f"env.{name}" for name in ("max_new_tokens", "chat_template")}
MORE_TO_REWARD_EVAL = cli.rest_of(_DOC, _FLAGS)


def reward_eval(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=cli.OVERRIDES)] = None,
    reward: Annotated[str | None, typer.Option(help=_DOC["reward"])] = None,
    comparisons: Annotated[str | None, typer.Option(help=_DOC["comparisons"])] = None,
    gold: Annotated[str | None, typer.Option(help=_DOC["gold"])] = None,
    suite: Annotated[str | None, typer.Option(help=_DOC["suite"])] = None,
    policy: Annotated[str | None, typer.Option(help=_DOC["policy"])] = None,
    prompts: Annotated[str | None, typer.Option(help=_DOC["prompts"])] = None,
    best_of: Annotated[str | None, typer.Option(metavar="N", help=_DOC["best_of"])] = None,
    max_new_tokens: Annotated[str | None, typer.Option(metavar="N", help=_DOC["env.max_new_tokens"])] = None,
    chat_template: Annotated[str | None, typer.Option(help=_DOC["env.chat_template"])] = None,
    num_envs: Annotated[str | None, typer.Option(metavar="N", help=_DOC["num_envs"])] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_DOC["seed"])] = None,
    device: Annotated[str | None, typer.Option(help=_DOC["device"])] = None,
    dtype: Annotated[str | None, typer.Option(help=_DOC["dtype"])] = None,
    config: Annotated[Path | None, typer.Option(help=cli.CONFIG)] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for summary.json, README.md and a figure.")] = None,
    threads: Annotated[int | None, typer.Option(help=cli.THREADS)] = None,
) -> None:
    """Measure any reward model: accuracy and its ceiling, calibration, length, probes, a suite, best-of-n."""
    given = locals()
    flags = {key: given[name] for name, key in _FLAGS.items()}
    settings = cli.settings_from(RewardEvalConfig, config, flags, overrides)
    cli.use_threads(threads)

    from rlhf_env.cli.show import metrics_table, response_progress
    from rlhf_env.records.safe_text import safe_text
    from rlhf_env.training.reward_card import defects, reward_tables
    from rlhf_env.training.reward_eval import run_reward_eval

    with response_progress() as show:
        summary = run_reward_eval(settings, out, progress=show)
    for table in reward_tables(summary):
        metrics_table({name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}, table.title)
    for sentence in defects(summary):
        print(safe_text(f"defect: {sentence}"))
