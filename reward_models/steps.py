"""Responses that are written in steps, and what people said of each step.

A step ends where a separator or the response does. Its token is the one that its last character is in: there a causal
model has read the step and nothing after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_env.errors import DataError
from rlhf_env.records.jsonl import require_keys
from rlhf_env.text.sources import read_rows


@dataclass(frozen=True)
class Solution:
    """A response in steps, each of them judged or not."""

    prompt: str
    steps: tuple[str, ...]  #: at least one, none blank
    labels: tuple[float | None, ...]  #: P(the step is right), 1 or 0 where somebody is sure; none: not judged

    def __post_init__(self) -> None:
        if not self.steps or not all(step.strip() for step in self.steps):
            raise DataError("a solution has at least one step, and none of them is blank")
        if len(self.labels) != len(self.steps):
            raise DataError(f"{len(self.steps)} steps have a label each, null where not judged; got {len(self.labels)}")
        if wrong := [label for label in self.labels if label is not None and not 0 <= label <= 1]:
            raise DataError(f"a step's label is 1, 0, a probability between, or null; got {wrong[0]}")


def read_solutions(source: str | Path, separator: str = "\n") -> list[Solution]:
    """The solutions of a `.jsonl` or `.json` file or of the data set `hf:NAME`: keys "prompt", "steps" and "labels".

    "labels" are numbers from 0 to 1, true, false, or null for a step that nobody judged (as those after the first
    mistake: Lightman et al. 2023). TRL calls the steps "completions". Steps may end in the `separator` that joins
    them, but hold none. Other keys are ignored. `DataError` names file, line and reason.
    """
    solutions = []
    for where, row in read_rows(source):
        key = "completions" if "completions" in row and "steps" not in row else "steps"
        require_keys(row, {"prompt": str, key: list, "labels": list}, where)
        if not all(isinstance(step, str) for step in row[key]):
            raise DataError(f"{where}: {key!r} must be a list of strings")
        if not all(label is None or isinstance(label, bool | int | float) for label in row["labels"]):
            raise DataError(f"{where}: 'labels' must be a list of numbers, true, false or null")
        steps = tuple(step.removesuffix(separator) for step in row[key])
        if inside := [step for step in steps if separator in step]:
            raise DataError(f"{where}: the step {inside[0][:40]!r} holds the separator {separator!r}: split it there")
        labels = tuple(None if label is None else float(label) for label in row["labels"])
        try:
            solutions.append(Solution(row["prompt"], steps, labels))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if not any(label is not None for solution in solutions for label in solution.labels):
        raise DataError(f"{source}: no step is judged")
    return solutions


def step_ends(response: str, separator: str) -> list[int]:
    """Where each step of a response ends, in characters [S]: behind its last one that is no white space.

    Blank steps are none; a response that is nothing else is one step, which ends with it.
    """
    ends, start = [], 0
    for step in response.split(separator):
        if step.strip():
            ends.append(start + len(step.rstrip()))
        start += len(step) + len(separator)
    return ends or [len(response)]


def token_before(end: int, offsets: Sequence[tuple[int, int]]) -> int | None:
    """The number of the token that holds the character before `end`, from each token's (start, stop) in characters.

    The last of several, where a character takes several; tokens of no character are none. None where it was cut off.
    """
    return next((i for i in range(len(offsets) - 1, -1, -1) if offsets[i][0] < min(end, offsets[i][1])), None)
