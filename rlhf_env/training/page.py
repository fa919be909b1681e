"""report.html of a run folder, whether of one training run or of a whole pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_env.errors import ConfigError
from rlhf_env.records.atomic import write_atomic
from rlhf_env.records.run import Run
from rlhf_env.report.content import Chart, Histogram, Point, Report, Response, Sample, Series, Table
from rlhf_env.report.page import render_report
from rlhf_env.training.report import axis, decimal, interval

_METRICS = ("score", "gold", "kl", "kl_bound", "win_rate", "length", "eos_rate", "distinct_1", "distinct_2")
_TITLES = {"score": "Score", "gold": "Gold", "kl": "KL to the reference"}


def write_report(folder: str | Path) -> Path:
    """Read what a finished run or pipeline left in `folder`, and write it as one self-contained page."""
    file = Path(folder) / "report.html"
    write_atomic(file, render_report(read_report(folder)).encode("utf-8"))
    return file


def read_report(folder: str | Path) -> Report:
    """What the page of a finished run (`rlhf-env train`) or pipeline shows, from the files in its folder."""
    run = Run.open(folder)
    if not run.finished:
        raise ConfigError(f"{folder} is not finished: it has no summary.json yet")
    is_pipeline = (run.path / "train").is_dir()
    stages = {name: Run(run.path / name) for name in ("sft", "prefer", "reward", "evaluate")} if is_pipeline else {}
    stages = {name: stage for name, stage in stages.items() if name in run.summary["seconds_by_stage"]}
    train = Run(run.path / "train") if is_pipeline else run
    evaluate, summary = stages.get("evaluate"), train.summary
    if "agent" not in summary:
        raise ConfigError(f"{folder} holds another stage: only a training run and a whole pipeline have a report")
    reward = stages["reward"].summary if "reward" in stages else {}
    best_of = [] if evaluate is None else evaluate.summary.get("best_of", [])
    charts = [
        *([_loss(stages["sft"])] if "sft" in stages else []),
        *([_calibration(reward)] if reward else []),
        _lengths(evaluate or train),
        *(_curve(train, summary, name) for name in ("score", "gold", "kl")),
        *(_path(train, summary, best_of, name) for name in ("score", "gold")),
    ]
    spent = f"{summary['tokens']:,} sampled tokens" if summary["tokens"] else f"{summary['updates']:,} updates"
    facts = f"{summary['agent']}, β = {summary['beta']:g}, seed {summary['seed']}, {spent}"
    gold = "gold_before" in summary
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return Report(
        title=f"{'Pipeline' if is_pipeline else 'Training run'} {run.path.resolve().name}",
        subtitle=f"{facts}; score is what was trained on" + (", gold the true reward" if gold else ""),
        tables=tuple([_results(evaluate, summary), *([_stages(run.path, stages)] if is_pipeline else [])]),
        charts=tuple(chart for chart in charts if chart is not None),
        samples=tuple(_samples((evaluate or train).tokens)),
        samples_note=(
            "Before: the reference. After: the trained policy, same prompt, same random numbers. KL is log π − log ref "
            "of the model that wrote the token, ratio how much likelier training made it, advantage the reward still "
            "to come less the value. The samples are the first ones, not chosen."
        ),
        footer=f"{summary['device_name']}, {summary['threads']} threads; {versions}",
    )


def _results(evaluate: Run | None, trained: Mapping[str, Any]) -> Table:
    if evaluate is None:
        title, of = f"{trained['eval_episodes']} responses to held-out prompts", trained
        if not trained["held_out"]:
            title = f"{trained['eval_episodes']} responses to the training prompts"
        rows = [
            (name, interval(of, f"{name}_before"), interval(of, f"{name}_after" if f"{name}_after" in of else name))
            for name in _METRICS
        ]
    else:
        of = evaluate.summary
        which = "held-out" if trained["held_out"] else "training"
        title = f"{of['episodes']} responses to {of['prompts']} {which} prompts"
        rows = [(name, interval(of, f"reference_{name}"), interval(of, name)) for name in _METRICS]
    shown = tuple(row for row in rows if row[1:] != ("–", "–"))
    return Table(title, ("", "before", "after"), shown, "With 95 % intervals; KL to the reference, nats per response.")


def _stages(folder: Path, stages: Mapping[str, Run]) -> Table:
    rows = []
    for name in ("sft", "prefer", "reward", "train", "evaluate"):
        if name == "train" or name in stages:
            summary = Run(folder / name).summary
            rows.append((name, f"{summary['seconds']:,.1f} s", stage_result(name, summary)))
    return Table("Stages", ("", "time", "result"), tuple(rows))


def stage_result(name: str, summary: Mapping[str, Any]) -> str:
    """What a finished stage came to, in a line."""
    if name == "sft":
        learned = f"{summary['demonstrations']:,} demonstrations, {summary['parameters']:,} parameters"
        learned += f", {summary['dropped']:,} dropped for their length" if summary["dropped"] else ""
        return f"{learned}; held out {summary['loss_before']:.3f} → {summary['loss_after']:.3f} nats per token"
    if name == "prefer":
        line = f"{summary['comparisons']:,} comparisons of {summary['responses']}"
        if summary.get("skipped"):
            line += f", {summary['skipped']:,} skipped"
        if "replies" in summary:
            line += f"; {summary['unparsed']:,} of {summary['replies']:,} replies hold no verdict"
        if "label_agreement" in summary:
            line += f"; labels agree with gold {interval(summary, 'label_agreement')}"
        return line
    if name == "revise":
        line = f"{summary['revisions']:,} revisions of {summary['responses']:,} responses"
        line += f" ({summary['blank']:,} blank, {summary['unchanged']:,} unchanged)"
        line += f"; {summary['comparisons']:,} comparisons"
        if "replies" in summary:
            line += f"; {summary['unparsed']:,} of {summary['replies']:,} replies hold no verdict"
        return line
    if name == "reward":
        noun = next(noun for noun in ("ratings", "solutions", "comparisons") if noun in summary)
        if noun == "ratings":
            return f"error on {summary['held_out']:,} held-out ratings {decimal(summary['rmse'])} (root mean square)"
        told = f"accuracy on {summary['held_out']:,} held-out {noun} {interval(summary, 'accuracy')}"
        also = {"own_accuracy": "by the score of whoever judged", "gold_accuracy": "with gold"}
        return told + "".join(f", {words} {interval(summary, name)}" for name, words in also.items() if name in summary)
    if name == "train":
        rate = f", {summary['tokens_per_second']:,.0f} tokens per second" if summary["tokens"] else ""
        return f"{summary['updates']:,} updates{rate}"
    return f"score {interval(summary, 'score')}, KL {interval(summary, 'kl')}"


def _loss(sft: Run) -> Chart:
    points = tuple(Point(row["step"], row["loss"]) for row in sft.metrics)
    return Chart("Fine-tuning", "step", "nats per token", (Series("loss of each batch", points),))


def _calibration(reward: Mapping[str, Any]) -> Chart:
    points = tuple(
        Point(row["predicted"], row["observed"], label=f"{row['count']:,} pairs")
        for row in reward["reliability"]
        if row["count"]
    )
    note = (
        f"{reward['held_out']:,} held-out comparisons; expected calibration error {reward['ece']:.3f}, "
        f"log-loss {reward['log_loss']:.3f} nats"
    )
    series = (Series("held-out pairs, both orders", points, "both"),)
    return Chart("Calibration of the reward model", "predicted preference", "observed", series, note, diagonal=True)


def _evaluations(train: Run, summary: Mapping[str, Any], name: str) -> list[tuple[float, float, Point]]:
    """(spent, KL, point) of every evaluation of a metric, from the one before training to the one after it."""
    spent, rows = axis(summary)[0], train.metrics

    def found(values: Mapping[str, Any], used: float, kl: float, before: str = "", after: str = "") -> Any:
        if (key := f"{before}{name}{after}") in values:
            low, high = (values.get(f"{key}{bound}") for bound in ("_low", "_high"))
            yield used, kl, Point(used, values[key], low, high)

    ends, last = "" if name == "kl" else "_after", rows[-1][spent]
    points = [*found(summary, 0, summary.get("kl_before", 0.0), after="_before")]
    for row in rows:
        points += found(row, row[spent], row.get("eval_kl", row.get("eval_kl_bound", 0.0)), before="eval_")
    if not points or points[-1][0] != last:
        points += found(summary, last, summary.get("kl", summary.get("kl_bound", 0.0)), after=ends)
    return points


def _curve(train: Run, summary: Mapping[str, Any], name: str) -> Chart | None:
    spent, called = axis(summary)
    batches = tuple(Point(row[spent], row[name]) for row in train.metrics if name in row)
    held_out = tuple(point for _, _, point in _evaluations(train, summary, name))
    series = [Series("training batches", batches)] if batches else []
    where = "held-out prompts" if summary["held_out"] else "evaluation"
    series += [Series(where, held_out, "both")] if held_out else []
    unit = "nats per response" if name == "kl" else ""
    return Chart(_TITLES[name], called, unit, tuple(series)) if series else None


def _path(train: Run, summary: Mapping[str, Any], best_of: Sequence[Mapping[str, Any]], name: str) -> Chart | None:
    unit = axis(summary)[1].removeprefix("sampled ")
    points = [
        Point(kl, point.y, point.low, point.high, f"{used:,} {unit}")
        for used, kl, point in _evaluations(train, summary, name)
    ]
    best = [
        Point(row["kl_bound"], row[name], row.get(f"{name}_low"), row.get(f"{name}_high"), f"best of {row['n']}")
        for row in best_of
        if name in row
    ]
    series = [Series(summary["agent"], tuple(points), "both")] if points else []
    series += [Series("best of n by score, at its largest possible KL", tuple(best), "both")] if best else []
    title = f"{_TITLES[name]} for KL"
    return Chart(title, "KL to the reference, nats", "", tuple(series)) if series else None


def _lengths(run: Run) -> Histogram:
    rows = run.samples
    groups = {
        shown: [row[name] for row in rows]
        for shown, name in (("before", "reference_length"), ("after", "length"))
        if name in rows[0]
    }
    return Histogram("Response length", "tokens, EOS included", groups)


def _samples(tokens: Iterable[Mapping[str, Any]]) -> list[Sample]:
    def response(row: Mapping[str, Any]) -> Response:
        return Response(tuple(row["pieces"]), row["numbers"], row["facts"])

    return [
        Sample(row["prompt"], response(row["reference"]) if "reference" in row else None, response(row["policy"]))
        for row in tokens
    ]
