"""What an evaluation of a reward model says of itself: tables, defects in plain words, card and figure."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_env.preferences.probes import is_defect
from rlhf_env.records.config import flat, to_dict
from rlhf_env.records.safe_text import safe_text
from rlhf_env.report.content import Table
from rlhf_env.training.config import RewardEvalConfig
from rlhf_env.training.report import decimal, interval

_MEASURES = {
    "accuracy": "accuracy on the labels",
    "label_agreement": "… of gold itself: the ceiling",
    "expected_agreement": "… of gold itself, expected of such labelers",
    "annotator_ceiling": "… of the majority of the other labelers: the ceiling",
    "gold_accuracy": "accuracy against gold",
    "kendall_tau": "Kendall's τ-b of rankings",
    "log_loss": "log-loss, nats per pair (knowing nothing: 0.693)",
    "ece": "calibration error",
    "scale": "scale, preference logits per unit",
    "scaled_log_loss": "log-loss once scaled",
    "scaled_ece": "calibration error once scaled",
}
_LENGTH = {
    "pearson": "correlation with log length, within prompts",
    "spearman": "… of ranks",
    "longer_higher": "longer response scored higher",
    "longer_preferred": "longer response preferred",
    "accuracy_longer": "accuracy where the longer was preferred",
    "accuracy_shorter": "accuracy where the shorter was preferred",
}
_FEWEST = 20  # comparisons of a group that is called one of the worst
_SUSPICIOUS = 1.5  # how much more members disagree about a policy's responses than about those compared


def reward_tables(summary: Mapping[str, Any]) -> list[Table]:
    """What was measured, as text: names of labelers and subsets are as in the files, for whoever shows them."""
    title = f"{summary['comparisons']:,} comparisons, {summary['pairs']:,} pairs, {summary['ties']:,} of them ties"
    tables = [Table(title, ("measure", "value"), tuple(_values(summary, _MEASURES)))]
    if rows := tuple(_values(summary["length"], _LENGTH)):
        tables.append(Table("length of responses, in characters", ("measure", "value"), rows))
    if worst := worst_groups(summary):
        rows = tuple((kind, name, f"{n:,}", value) for kind, name, n, value in worst)
        tables.append(Table("worst groups", ("kind", "name", "comparisons", "accuracy"), rows))
    if probes := summary.get("probes"):
        rows = tuple(
            (
                row["probe"],
                interval(row, "change"),
                *(f"{row[share]:.0%}" if share in row else "–" for share in ("raised", "lowered")),
                "no score" if "error" in row else "defect" if is_defect(row) else "",
            )
            for row in probes
        )
        columns = ("change of the response", "score, in its deviations", "raised", "lowered", "")
        tables.append(Table("what should not raise the score", columns, rows))
    if suite := summary.get("suite"):
        rows = tuple(
            (row["section"], row["subset"], f"{row['prompts']:,}", row["length"], interval(row, "accuracy"))
            for row in suite["subsets"]
        )
        rows += tuple((row["section"], "all", "", "", decimal(row["score"])) for row in suite["sections"])
        rows += (("mean of sections", "", "", "", decimal(suite["score"])),) if "score" in suite else ()
        tables.append(Table("suite", ("section", "subset", "prompts", "length helps", "accuracy"), rows))
    if policy := summary.get("policy"):
        tables += [_policy(policy), _best_of(policy["best_of"])]
    return tables


def defects(summary: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a reward model beyond chance, a sentence each; `summary` is that of `run_reward_eval`."""
    origin, length = summary.get("origin", {}), summary["length"]
    if origin.get("same_file"):
        yield "It has learned from most of these comparisons, so all that is measured on them flatters it."
    if summary.get("accuracy_high", 1.0) < 0.5:
        yield "It is worse than chance: people prefer what it scores lower."
    elif summary.get("accuracy_low", 1.0) <= 0.5:
        yield "It cannot be told from chance on these comparisons."
    if "log_loss" in summary and summary.get("scale_high", 1.0) < 1:
        yield f"Its logits are too sure of themselves: they should be multiplied by {interval(summary, 'scale')}."
    if "log_loss" in summary and summary.get("scale_low", 1.0) > 1:
        yield f"Its logits are not sure enough: they should be multiplied by {interval(summary, 'scale')}."
    if {"longer_higher", "longer_preferred"} <= length.keys():
        ours, theirs = (interval(length, name) for name in ("longer_higher", "longer_preferred"))
        shares = f"the longer response scores higher in {ours} of pairs, and is preferred in {theirs}"
        if length["longer_higher_low"] > length["longer_preferred_high"]:
            yield f"It likes length: {shares}."
        if length["longer_higher_high"] < length["longer_preferred_low"]:
            yield f"It likes brevity: {shares}."
    for row in summary.get("probes", []):
        if "error" in row:
            yield f"It gives no score where {row['sentence']}: {row['error']}"
        elif is_defect(row):
            change = "rises" if row["change"] > 0 else "falls"
            amount = decimal(abs(row["change"]))
            yield f"Its score {change} by {amount} standard deviations where {row['sentence']}."
    for row in summary.get("suite", {}).get("subsets", []):
        if row.get("accuracy_high", 1.0) < 0.5:
            yield f"It chooses wrongly more often than not in {row['subset']}: accuracy {interval(row, 'accuracy')}."
    policy = summary.get("policy", {})
    if policy.get("flat_prompts", 0) > 0:
        yield f"It scores all of the policy's responses alike on {policy['flat_prompts']:.0%} of the prompts."
    if policy.get("deviation_ratio", 0) > _SUSPICIOUS:
        ratio = decimal(policy["deviation_ratio"])
        yield f"Its members disagree {ratio} times as much about the policy's responses as about those compared."
    rows = [row for row in policy.get("best_of", []) if "gold_low" in row]
    if rows and rows[-1]["gold_high"] < (best := max(rows, key=lambda row: row["gold"]))["gold_low"]:
        yield f"Choosing by it harms: the best of {rows[-1]['n']} is worse by gold than the best of {best['n']}."


def worst_groups(summary: Mapping[str, Any], most: int = 3) -> list[tuple[str, str, int, str]]:
    """The groups of least accuracy: kind, name, comparisons, accuracy; those of at least 20, where one has siblings."""
    kinds = {"labeler": summary["by_labeler"], "policies": summary["by_policies"]}
    found = [
        (row["accuracy"], kind, row[kind], row["comparisons"], interval(row, "accuracy"))
        for kind, rows in kinds.items()
        if len(rows) > 1
        for row in rows
        if row["comparisons"] >= _FEWEST
    ]
    return [(kind, name, n, shown) for _, kind, name, n, shown in sorted(found)[:most]]


def reward_card(config: RewardEvalConfig, summary: Mapping[str, Any], *, figure: bool) -> str:
    """README.md of an evaluation. Names out of files are escaped, so that they stay text."""
    found = list(defects(summary))
    scaled = "" if "reliability" in summary else " of the scores once scaled"
    names = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    paragraphs = [
        f"# Reward model {_plain(config.reward)}",
        _origin(summary.get("origin", {})),
        f"Measured on the comparisons of {_plain(config.comparisons)}, with 95 % intervals"
        + (f"; the true reward is {_plain(summary['gold'])}" if "gold" in summary else "")
        + (f"; the policy is {_plain(config.policy)}" if config.policy else "")
        + ".",
        "## Defects",
        "\n".join(f"- {_plain(sentence)}" for sentence in found)
        if found
        else "None beyond chance in what was measured.",
        *(f"## {_plain(_title(table.title))}\n\n{_markdown(table)}" for table in reward_tables(summary)),
        *([f"## Reliability{scaled}\n\n![reliability](plots/reliability.png)"] if figure else []),
        "## The same again",
        "    " + _command(config),
        f"With {names}.",
    ]
    return "\n\n".join(part for part in paragraphs if part) + "\n"


def plot_reliability(bins: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Draw how often preferences came true over how likely they were called. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="0.6")
    axes.plot([bin["predicted"] for bin in bins], [bin["observed"] for bin in bins], "o-", color="C0")
    axes.set(xlabel="predicted preference", ylabel="observed", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return True


def _values(metrics: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(sentence, interval(metrics, name)) for name, sentence in names.items() if name in metrics]


def _policy(policy: Mapping[str, Any]) -> Table:
    names = {
        "score": "mean score",
        "variance": "variance of the score among draws of a prompt",
        "variance_share": "… as a share of all variance",
        "flat_prompts": "share of prompts whose draws all score the same",
        "accuracy": "accuracy against gold, on pairs of draws",
        "correlation": "correlation with gold",
        "deviation_compared": "deviation between members, on the responses compared",
        "deviation_drawn": "… on the policy's",
        "deviation_ratio": "… the ratio of the two",
    }
    title = f"{policy['draws']:,} draws of the policy to each of {policy['prompts']:,} prompts"
    return Table(title, ("measure", "value"), tuple(_values(policy, names)))


def _best_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = [name for name in ("kl_bound", "score", "gold") if name in rows[0]]
    cells = tuple((f"{row['n']}", *(interval(row, name) for name in shown)) for row in rows)
    return Table("best of n by the score", ("n", *shown), cells)


def _origin(origin: Mapping[str, Any]) -> str:
    if not origin:
        return ""
    held_out = f" (accuracy {decimal(origin['accuracy'])} on those it held out)" if "accuracy" in origin else ""
    return f"It has learned from the comparisons of {_plain(origin['learned_from'])}{held_out}."


def _command(config: RewardEvalConfig) -> str:
    ours, default = flat(to_dict(config)), flat(to_dict(RewardEvalConfig("", "")))
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in ours.items()
        if key not in default or default[key] != value
    ]
    return "rlhf-env reward-eval --out NEW_FOLDER " + " ".join(shlex.quote(safe_text(word)) for word in words)


def _markdown(table: Table) -> str:
    lines = [table.columns, ("---",) * len(table.columns), *(tuple(map(_plain, row)) for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """A text that Markdown shows as it is: no markup, no formula, no link (nor a bare address), no table of its own."""
    return re.sub(r"\[(?!-?\d)|[\\`*_~$<|&@]|(?<=\])\(|:(?=//)|(?<=www)\.", r"\\\g<0>", safe_text(text), flags=re.I)


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]
