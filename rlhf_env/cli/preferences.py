"""`rlhf-env preferences`: what can be done with a file of comparisons."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_env.errors import ConfigError
from rlhf_env.records.safe_text import safe_text

preferences = typer.Typer(name="preferences", help="Work with files of comparisons.", no_args_is_help=True)


class Form(StrEnum):
    """What a file of comparisons may look like: the names of `rlhf_env.preferences.comparisons.FORMATS`."""

    ranks = "ranks"
    trl = "trl"
    hh = "hh"
    pandalm = "pandalm"
    graded = "graded"
    argilla = "argilla"
    labelstudio = "labelstudio"


_SOURCE = "Comparisons in any form: FILE.jsonl, FILE.json (one array) or hf:NAME[:SPLIT]."
_FROM = "The form of the source (default: what the keys of its rows say)."


@preferences.command()
def stats(
    source: Annotated[str, typer.Argument(metavar="FILE", help=_SOURCE)],
    form: Annotated[Form | None, typer.Option("--from", help=_FROM)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what comparisons hold: counts, length and position bias, duplicates, contradictions, labelers, agreement."""
    from rlhf_env.preferences.comparisons import load_comparisons
    from rlhf_env.preferences.judged import agreement_report, judged_items
    from rlhf_env.preferences.statistics import describe

    reading = load_comparisons(source, form)
    found = {"source": source, "form": reading.form, "not_read": dict(reading.lost), **describe(reading.comparisons)}
    if any(len(item.ranks) > 1 for item in judged_items(reading.comparisons)):
        found["agreement"] = agreement_report(reading.comparisons)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_lost("not read", reading.lost)
        _print_statistics(found)


@preferences.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help=_SOURCE)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, .jsonl; one that is there is replaced.")],
    to: Annotated[Form, typer.Option(help="The form to write; argilla and labelstudio are only read.")],
    form: Annotated[Form | None, typer.Option("--from", help=_FROM)] = None,
) -> None:
    """Write comparisons in another form, and count what it cannot hold.

    ranks, a ranking of K responses per row, holds everything; trl and hh a chosen and a rejected response; pandalm
    pairs with the verdicts of several annotators; graded pairs with how much better one is.
    """
    from rlhf_env.preferences.comparisons import load_comparisons, write_comparisons

    reading = load_comparisons(source, form)
    print(safe_text(f"read {len(reading.comparisons)} comparisons ({reading.form}) from {source}"))
    _print_lost("not read", reading.lost)
    rows, lost = write_comparisons(out, reading.comparisons, to)
    print(safe_text(f"wrote {rows} rows ({to}) to {out}"))
    _print_lost("not written", lost)


@preferences.command()
def split(
    source: Annotated[str, typer.Argument(metavar="FILE", help=_SOURCE)],
    shares: Annotated[
        list[str],
        typer.Argument(metavar="NAME=SHARE...", help="Sides beside train, e.g. test=0.1 validation=0.1; and seed=0."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for train.jsonl, test.jsonl, …")],
    form: Annotated[Form | None, typer.Option("--from", help=_FROM)] = None,
) -> None:
    """Split comparisons by prompt, so that no prompt, however it is spaced or capitalised, is on two sides.

    A hash of prompt and seed decides, so a prompt keeps its side when comparisons are added; shares hold on average.
    """
    from rlhf_env.preferences.comparisons import load_comparisons, write_comparisons
    from rlhf_env.preferences.splits import split_by_shares
    from rlhf_env.records.run import require_free

    wanted, seed = _shares(shares)
    require_free(out)
    reading = load_comparisons(source, form)
    sides = split_by_shares(reading.comparisons, wanted, seed)
    _print_lost("not read", reading.lost)
    out.mkdir(parents=True, exist_ok=True)
    for name, side in sides.items():
        write_comparisons(out / f"{name}.jsonl", side)
        print(safe_text(f"{len(side)} comparisons of {len({c.prompt for c in side})} prompts to {out / name}.jsonl"))


def _shares(words: Sequence[str]) -> tuple[dict[str, float], int]:
    values: dict[str, float] = {}
    seed = 0
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in values:
            raise ConfigError(f"{word!r}: give each side once, as NAME=SHARE, for example test=0.1")
        try:
            if name == "seed":
                seed = int(text)
            else:
                values[name] = float(text)
        except ValueError as error:
            raise ConfigError(f"{word!r}: {text!r} is no number") from error
    if not values:
        raise ConfigError("give at least one side beside train, for example test=0.1")
    return values, seed


def _print_lost(what: str, lost: Counter[str]) -> None:
    for name, count in lost.items():
        print(safe_text(f"{what}: {count:,} {name}"), file=sys.stderr)


_LABELERS_SHOWN = 20
_COUNTS = {
    "comparisons": "comparisons",
    "prompts": "prompts",
    "near_duplicate_prompts": "… alike but for case or space",
    "labelers": "labelers",
    "policies": "policies",
    "pairs": "pairs of different responses",
    "ties": "… tied",
    "soft_labels": "with a soft label",
    "strengths": "with a strength",
    "orders": "with an order of presentation",
    "times": "with a time",
    "identical": "of identical responses",
    "repeated": "repeated comparisons",
    "judged_again": "pairs judged again by the same labeler",
    "contradictions": "… both ways",
    "cycles": "prompts with a circle in a labeler's preferences",
    "cycles_of_all": "… in all labelers' together",
}
_COEFFICIENTS = {
    "percent_agreement": "two labelers agree",
    "fleiss_kappa": "Fleiss's κ",
    "krippendorff_nominal": "Krippendorff's α",
    "krippendorff_ordinal": "… a tie being between the two",
    "kendall_w": "Kendall's W, of rankings",
}


def _print_statistics(found: Mapping[str, Any]) -> None:
    from rlhf_env.cli.show import metrics_table
    from rlhf_env.training.report import interval

    rows = {sentence: f"{found[key]:,}" for key, sentence in _COUNTS.items()}
    rows["responses compared"] = ", ".join(f"{n:,} of {k}" for k, n in found["responses"].items())
    for unit, bias in found["length"].items():
        rows[f"longer preferred, in {unit}"] = _rate("longer_preferred", bias)
        if "slope" in bias:
            rows[f"… logit per log length ratio, in {unit}"] = (
                f"{bias['slope']:.3f} ({bias['slope_low']:.3f} to {bias['slope_high']:.3f})"
            )
    rows["first shown preferred"] = _rate("first_shown_preferred", found["position"])
    rows["first stored preferred"] = _rate("first_stored_preferred", found)
    agreement = found.get("agreement", {})
    rows |= {sentence: interval(agreement, key) for key, sentence in _COEFFICIENTS.items() if key in agreement}
    if "pairs" in agreement:
        verdicts = ("majority_first", "majority_second", "majority_tie", "no_majority")
        counts = "/".join(f"{agreement[name]:,}" for name in verdicts)
        rows["majority: first/second/tie/none"] = f"{counts} of {agreement['pairs']:,} pairs that several judged"
    metrics_table({found["source"]: list(rows), found["form"]: list(rows.values())})
    if between := agreement.get("between", [])[:_LABELERS_SHOWN]:
        metrics_table(
            {
                "labelers": [" and ".join(row["labelers"]) for row in between],
                "pairs": [f"{row['pairs']:,}" for row in between],
                "Cohen's κ": [interval(row, "cohen_kappa") if "cohen_kappa" in row else "–" for row in between],
            }
        )
    if labelers := found["by_labeler"][:_LABELERS_SHOWN]:
        each = {row["labeler"]: row for row in agreement.get("each", [])}
        others = [each.get(row["labeler"], {}) for row in labelers]
        metrics_table(
            {
                "labeler": [row["labeler"] for row in labelers],
                "comparisons": [f"{row['comparisons']:,}" for row in labelers],
                "ties": [f"{row['ties']:.1%}" if "ties" in row else "–" for row in labelers],
                "longer preferred (characters)": [_rate("longer_preferred", row) for row in labelers],
                "first shown preferred": [_rate("first_shown_preferred", row) for row in labelers],
                "first stored preferred": [_rate("first_stored_preferred", row) for row in labelers],
                "agrees with others": [interval(row, "agrees_with_others") for row in others],
            }
        )
    if more := len(found["by_labeler"]) - len(labelers):
        print(f"… and {more:,} more labelers; --json has all")


def _rate(name: str, found: Mapping[str, Any]) -> str:
    if name not in found:
        return "–"
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return f"{found[name]:.1%} ({low:.1%} to {high:.1%}) of {found[f'{name}_pairs']:,}"
