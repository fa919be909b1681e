"""`rlhf-env preferences`: what can be done with a file of comparisons."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

preferences = typer.Typer(name="preferences", help="Work with files of comparisons.", no_args_is_help=True)


class Form(StrEnum):
    """What a file of comparisons may look like."""

    ranks = "ranks"
    trl = "trl"


@preferences.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Comparisons in any form: FILE.jsonl or hf:NAME[:SPLIT].")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; one that is there is replaced.")],
    to: Annotated[Form, typer.Option(help="ranks: one ranking of K responses per row; trl: one chosen/rejected pair.")],
) -> None:
    """Write comparisons in another form, leaving out those of identical responses and, for trl, ties."""
    from rlhf_env.preferences.comparisons import distinct, read_comparisons, write_comparisons, write_trl

    comparisons = read_comparisons(source)
    kept, identical = distinct(comparisons)
    print(f"read {len(comparisons)} comparisons from {source}")
    if to is Form.ranks:
        write_comparisons(out, kept)
        print(f"wrote {len(kept)} comparisons to {out}")
    else:
        written = write_trl(out, kept)
        print(f"wrote {written} pairs to {out}; left out {sum(len(c.pairs) for c in kept) - written} tied pairs")
    print(f"left out {identical} comparisons of identical responses")
