"""`rlhf-env evaluate` and `rlhf-env generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_env.cli import settings as cli
from rlhf_env.training.config import EvaluateConfig, GenerateConfig

_DOC, _GENERATE = cli.sentences(EvaluateConfig), cli.sentences(GenerateConfig)
_ENV_FLAGS = {name: f"env.{name}" for name in ("max_new_tokens", "temperature", "chat_template")}
_COMMON = {name: name for name in ("policy", "prompts", "greedy", "seed", "device", "dtype", "num_envs")} | _ENV_FLAGS
_EVALUATE_FLAGS = _COMMON | {name: name for name in ("reward", "reference", "gold", "text", "episodes")}
_GENERATE_FLAGS = _COMMON | {"prompt": "prompt"}
MORE_TO_EVALUATE = cli.rest_of(_DOC, _EVALUATE_FLAGS)
MORE_TO_GENERATE = cli.rest_of(_GENERATE, _GENERATE_FLAGS)


def evaluate(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=cli.OVERRIDES)] = None,
    policy: Annotated[str | None, typer.Option(help=_DOC["policy"])] = None,
    prompts: Annotated[str | None, typer.Option(help=_DOC["prompts"])] = None,
    reward: Annotated[str | None, typer.Option(help=_DOC["reward"])] = None,
    reference: Annotated[str | None, typer.Option(help=_DOC["reference"])] = None,
    gold: Annotated[str | None, typer.Option(help=_DOC["gold"])] = None,
    text: Annotated[str | None, typer.Option(help=_DOC["text"])] = None,
    episodes: Annotated[str | None, typer.Option(metavar="N", help=_DOC["episodes"])] = None,
    max_new_tokens: Annotated[str | None, typer.Option(metavar="N", help=_DOC["env.max_new_tokens"])] = None,
    temperature: Annotated[str | None, typer.Option(metavar="FLOAT", help=_DOC["env.temperature"])] = None,
    chat_template: Annotated[str | None, typer.Option(help=_DOC["env.chat_template"])] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help=_DOC["greedy"])] = False,
    num_envs: Annotated[str | None, typer.Option(metavar="N", help=_DOC["num_envs"])] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_DOC["seed"])] = None,
    device: Annotated[str | None, typer.Option(help=_DOC["device"])] = None,
    dtype: Annotated[str | None, typer.Option(help=_DOC["dtype"])] = None,
    config: Annotated[Path | None, typer.Option(help=cli.CONFIG)] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for summary.json and samples.jsonl.")] = None,
    threads: Annotated[int | None, typer.Option(help=cli.THREADS)] = None,
) -> None:
    """Measure a policy: score, length, diversity, and with --reference its KL and win rate, with 95 % intervals."""
    given = locals()
    flags = {key: given[name] for name, key in _EVALUATE_FLAGS.items()}
    settings = cli.settings_from(EvaluateConfig, config, flags, overrides)
    cli.use_threads(threads)

    from rlhf_env.cli.show import metrics_table, response_progress, samples_table
    from rlhf_env.training.inference import run_evaluation
    from rlhf_env.training.report import interval

    with response_progress() as show:
        found = run_evaluation(settings, out, progress=show)
    names = [name for name in found.metrics if not name.endswith(("_low", "_high"))]
    values = [interval(found.metrics, name) for name in names]
    metrics_table({"metric": names, "value": values}, f"{len(found.samples)} responses")
    if found.best_of:
        shown = [name for name in ("n", "kl_bound", "score", "gold") if name in found.best_of[0]]
        cells = {
            name: [interval(row, name) if name != "n" else f"{row[name]}" for row in found.best_of] for name in shown
        }
        metrics_table(cells, "best of n by the score, of the reference")
    columns = {"prompt": "prompt", "response": "response"}
    samples = [row | {"score_response": row["score"]} for row in found.samples[:2]]
    if "reference_response" in samples[0]:
        columns["reference"] = "reference_response"
        samples = [row | {"score_reference_response": row["reference_score"]} for row in samples]
    samples_table(samples, columns)


def generate(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=cli.OVERRIDES)] = None,
    policy: Annotated[str | None, typer.Option(help=_GENERATE["policy"])] = None,
    prompts: Annotated[str | None, typer.Option(help=_GENERATE["prompts"])] = None,
    prompt: Annotated[str | None, typer.Option(help=_GENERATE["prompt"])] = None,
    max_new_tokens: Annotated[str | None, typer.Option(metavar="N", help=_GENERATE["env.max_new_tokens"])] = None,
    temperature: Annotated[str | None, typer.Option(metavar="FLOAT", help=_GENERATE["env.temperature"])] = None,
    chat_template: Annotated[str | None, typer.Option(help=_GENERATE["env.chat_template"])] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help=_GENERATE["greedy"])] = False,
    num_envs: Annotated[str | None, typer.Option(metavar="N", help=_GENERATE["num_envs"])] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_GENERATE["seed"])] = None,
    device: Annotated[str | None, typer.Option(help=_GENERATE["device"])] = None,
    dtype: Annotated[str | None, typer.Option(help=_GENERATE["dtype"])] = None,
    config: Annotated[Path | None, typer.Option(help=cli.CONFIG)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write JSON Lines to this file instead of showing the texts.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help=cli.THREADS)] = None,
) -> None:
    """Write one response to each prompt, on the screen or, with --out, to a file of JSON Lines."""
    given = locals()
    flags = {key: given[name] for name, key in _GENERATE_FLAGS.items()}
    settings = cli.settings_from(GenerateConfig, config, flags, overrides)
    cli.use_threads(threads)

    from rich.console import Console
    from rich.text import Text

    from rlhf_env.cli.show import response_progress
    from rlhf_env.records.jsonl import write_jsonl
    from rlhf_env.records.safe_text import safe_text
    from rlhf_env.training.inference import generate as generate_rows

    with response_progress() as show:
        rows = generate_rows(settings, progress=show)
    if out is not None:
        write_jsonl(out, rows)
        return
    console = Console()
    for row in rows:
        console.print(Text(safe_text(row["prompt"]), style="dim") + Text(safe_text(row["response"])), soft_wrap=True)
