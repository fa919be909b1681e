"""What a report page shows, as plain data: texts are shown as they are and numbers that are not finite are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_env.errors import DataError


@dataclass(frozen=True)
class Point:
    """A point of a series, with the interval of its y where one is known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""  #: what its tooltip says beside the numbers


@dataclass(frozen=True)
class Series:
    """Points joined in the order given; intervals are a band around a line, and bars where there are markers."""

    name: str
    points: tuple[Point, ...]
    style: Literal["line", "dots", "both"] = "line"  #: "both": a line with markers


@dataclass(frozen=True)
class Chart:
    """Series over common axes."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    note: str = ""
    diagonal: bool = False  #: draw y = x, dashed, as for calibration


@dataclass(frozen=True)
class Histogram:
    """Distributions over common bins, each as shares of its own group."""

    title: str
    x_label: str
    groups: Mapping[str, Sequence[float]]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text; a column of numbers is set to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Response:
    """One response of T tokens with what is known of each."""

    pieces: tuple[str, ...]  #: the tokens' texts [T]
    by_token: Mapping[str, Sequence[float]]  #: "reward", "kl", "value", "advantage", "ratio" … → [T]
    facts: Mapping[str, float | str]  #: of the whole response, such as score, gold, kl, length, stop

    def __post_init__(self) -> None:
        for name, values in self.by_token.items():
            if len(values) != len(self.pieces):
                raise DataError(f"a response of {len(self.pieces)} tokens has {len(values)} values of {name!r}")


@dataclass(frozen=True)
class Sample:
    """A prompt with the response after training, and the one before it where there was one."""

    prompt: str
    before: Response | None
    after: Response


@dataclass(frozen=True)
class Report:
    """The whole page, from top to bottom; what is empty is left out."""

    title: str
    subtitle: str = ""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart | Histogram, ...] = ()
    samples: tuple[Sample, ...] = ()
    samples_note: str = ""
    footer: str = ""
