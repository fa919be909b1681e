"""What a run says of itself: summary, samples side by side, card and figure."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rlhf_env import processes
from rlhf_env.records.config import flat, to_dict
from rlhf_env.records.safe_text import safe_text
from rlhf_env.training.assemble import Parts
from rlhf_env.training.config import TrainConfig

_PACKAGES = ("rlhf-env", "torch", "transformers", "tokenizers", "numpy", "gymnasium", "stable-baselines3")
_BOUNDS = ("_low", "_high")


def summarize(
    config: TrainConfig,
    parts: Parts,
    rows: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    best: Mapping[str, float],
    beside: float,
) -> dict[str, Any]:
    """A run in one flat mapping: `score` and `gold` before and after, the rest as it is after, and what it cost.

    `best` is what the best of its evaluations measured (empty: there was none), `beside` the seconds that were spent on
    other things than updates.

    The start's other metrics have names that end in `_before`. A mean's 95 % interval is beside it, `_low` to `_high`.
    """
    last = rows[-1]
    seconds = sum(row["seconds"] for row in rows)
    return {
        **_tagged({k: v for k, v in before.items() if not k.startswith("reference_")}, "before"),
        **_tagged({k: v for k, v in after.items() if _base(k) in ("score", "gold")}, "after"),
        **{k: v for k, v in after.items() if _base(k) not in ("score", "gold")},
        "agent": config.agent,
        "policy": config.policy,
        "reward": config.reward,
        "updates": last["update"],
        "episodes": last["episodes"],
        "tokens": last["tokens"],
        "queries": last["queries"],
        "seconds": seconds + beside,
        **({"tokens_per_second": last["tokens"] / seconds} if last["tokens"] else {}),
        **({"best_update": best["update"], "best_score": best["eval_score"]} if best else {}),
        "beta": parts.envs.beta,
        "train_prompts": len(parts.envs.task.prompts),
        "eval_prompts": len(parts.eval_envs.task.prompts),
        "eval_episodes": config.eval_episodes,
        "held_out": parts.held_out,
        "seed": config.seed,
        **surroundings(config.device),
    }


def surroundings(device: str) -> dict[str, Any]:
    """What a result depends on beside its settings: versions, processes, threads of each, and the device."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()
    working = {"processes": processes.count(), "threads": torch.get_num_threads()}
    return {**working, "device": device, "device_name": name, "versions": versions}


def paired_samples(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The responses to each prompt side by side: what the policy wrote before training, and after."""
    rows = []
    for start, end in zip(before, after, strict=True):
        row = {"prompt": start["prompt"], "before": start["response"], "after": end["response"]}
        for name in ("score", "gold"):
            if name in start:
                row |= {f"{name}_before": start[name], f"{name}_after": end[name]}
        rows.append(row | {name: end[name] for name in ("kl", "length") if name in end})
    return rows


def command(config: TrainConfig, out: str) -> str:
    """The command line that repeats a run in another folder: every setting that is not the default."""
    ours, default = flat(to_dict(config)), flat(to_dict(TrainConfig(policy="", prompts="", reward="")))
    words = [f"{key}={_word(key, value)}" for key, value in ours.items() if key not in default or default[key] != value]
    return f"rlhf-env train --out {shlex.quote(out)} " + " ".join(map(shlex.quote, words))


def training_card(
    config: TrainConfig, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], *, figure: bool
) -> str:
    """The run's README.md. Texts of models and people stand in it as indented code, which no text can leave."""
    names = [n for n in ("score", "gold") if f"{n}_after" in summary]
    table = [f"| {n} | {interval(summary, f'{n}_before')} | {interval(summary, f'{n}_after')} |" for n in names]
    for name in ("kl", "kl_bound", "win_rate", "length", "eos_rate", "distinct_1", "distinct_2"):
        if name in summary:
            table.append(f"| {name} | {interval(summary, f'{name}_before')} | {interval(summary, name)} |")
    prompts = (
        "prompts that training never saw"
        if summary["held_out"]
        else "prompts that training used too, so this says nothing about new ones"
    )
    shown = [
        f"    prompt  {safe_text(row['prompt'])}\n"
        f"    before  {safe_text(row['before'])}  ({row['score_before']:.3f})\n"
        f"    after   {safe_text(row['after'])}  ({row['score_after']:.3f})\n"
        for row in samples[:5]
    ]
    what = (
        f"the prompts of {_code(config.prompts)} for the reward {_code(config.reward)}"
        if config.data is None
        else f"the data of {_code(config.data)}"
    )
    paragraphs = [
        f"# {_code(config.agent)} on {_code(config.policy)}",
        f"Trained on {what}: {cost(summary)} on {summary['device_name']} ({config.device}, {summary['processes']} "
        f"process{'es' * (summary['processes'] > 1)} of {summary['threads']} thread{'s' * (summary['threads'] > 1)}).",
        f"Measured on {summary['eval_episodes']} responses to {summary['eval_prompts']} {prompts}, with 95 % "
        "intervals. KL is in nats per response, to the reference; the win rate is against the reference, by the score.",
        "\n".join(["| | before | after |", "|---|---|---|", *table]),
        *(["![training](plots/training.png)"] if figure else []),
        "## The same run again",
        "    " + command(config, "NEW_FOLDER"),
        "With the same versions and number of threads it gives the same bits: "
        + ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
        + ". `model/` is the trained policy; it can be the `--policy` of the next command.",
        "## Samples",
        "\n".join(shown),
    ]
    return "\n\n".join(paragraphs) + "\n"


def cost(summary: Mapping[str, Any]) -> str:
    """What a training run took, in words: updates, what was sampled for them, seconds."""
    if not summary["tokens"]:
        return f"{summary['updates']:,} updates in {summary['seconds']:,.1f} s"
    return (
        f"{summary['updates']:,} updates, {summary['episodes']:,} episodes, {summary['queries']:,} reward queries, "
        f"{summary['tokens']:,} sampled tokens in {summary['seconds']:,.1f} s "
        f"({summary['tokens_per_second']:,.0f} tokens per second)"
    )


def axis(summary: Mapping[str, Any]) -> tuple[str, str]:
    """What of a row curves are drawn over, and what that is called: an agent that learns from data samples nothing."""
    return ("tokens", "sampled tokens") if summary["tokens"] else ("update", "updates")


def interval(metrics: Mapping[str, Any], name: str) -> str:
    """A metric with its 95 % interval, as text; a dash where it was not measured."""
    if name not in metrics:
        return "–"
    low, high = (f"{name}{bound}" for bound in _BOUNDS)
    bounds = f" [{decimal(metrics[low])}, {decimal(metrics[high])}]" if low in metrics else ""
    return f"{decimal(metrics[name])}{bounds}"


def decimal(value: float) -> str:
    """A number with three decimals."""
    return f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no minus before a zero


def plot_training(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], file: Path) -> bool:
    """Draw score and KL over sampled tokens (updates, where none are sampled), with the evaluations before and after.

    False without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    spent, called = axis(summary)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, name, unit in zip(figure.subplots(1, 2), ("score", "kl"), ("", ", nats per response"), strict=True):
        points = [(row[spent], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), color="C0", label="training") if points else None
        ends = [(0, f"{name}_before"), (rows[-1][spent], "score_after" if name == "score" else name)]
        shown = [(used, summary[key]) for used, key in ends if key in summary]
        axes.plot(*zip(*shown, strict=True), "o", color="C1", label="evaluation") if shown else None
        axes.set(xlabel=called, ylabel=f"{name}{unit}")
        axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return True


def _tagged(metrics: Mapping[str, float], when: str) -> dict[str, float]:
    """`score` and `score_low` become `score_before` and `score_before_low`."""
    return {f"{_base(name)}_{when}{name.removeprefix(_base(name))}": value for name, value in metrics.items()}


def _base(name: str) -> str:
    return name.removesuffix("_low").removesuffix("_high")


def _word(key: str, value: Any) -> str:
    # The agent's settings have no declared types, so there a text is told from a number by its quotes.
    plain = isinstance(value, str) and not key.startswith("settings.")
    return value if plain else json.dumps(value, ensure_ascii=False)


def _code(text: str) -> str:
    return f"`{safe_text(text).replace('`', '')}`"
