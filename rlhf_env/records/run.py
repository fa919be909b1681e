"""A run folder: everything that a run leaves behind, readable while it goes on and after it was killed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.atomic import is_partial, write_atomic
from rlhf_env.records.jsonl import append_jsonl, parse_jsonl, read_json, read_jsonl, write_json, write_jsonl


@dataclass(frozen=True)
class Run:
    """One run's folder: config.yaml, metrics.jsonl, summary.json, samples.jsonl, README.md, checkpoints/, best/, …"""

    path: Path

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], *, again: bool = False) -> Run:
        """Begin a run in a new or empty folder, or `again` in any, and write the `config` that replays it."""
        path = Path(path)
        if not again:
            require_free(path)
        try:
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise ConfigError(f"the config of {path} holds something that is no plain YAML value: {error}") from error
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / "config.yaml", text.encode("utf-8"))
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run, to resume or to read."""
        if not (Path(path) / "config.yaml").is_file():
            raise ConfigError(f"{path} holds no run: there is no config.yaml in it")
        return cls(Path(path))

    @property
    def config(self) -> dict[str, Any]:
        """What config.yaml says."""
        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path / 'config.yaml'}: {error}") from error
        if not isinstance(config, dict):
            raise DataError(f"{self.path / 'config.yaml'}: a mapping of settings was expected")
        return config

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return read_jsonl(self.path / "metrics.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says."""
        return read_json(self.path / "summary.json")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What samples.jsonl holds."""
        return read_jsonl(self.path / "samples.jsonl")

    @property
    def tokens(self) -> list[dict[str, Any]]:
        """What tokens.jsonl holds."""
        return read_jsonl(self.path / "tokens.jsonl")

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: summary.json is written last."""
        return (self.path / "summary.json").is_file()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Where the best model so far goes, beside the metrics.json that says how good it is."""
        return self.path / "best"

    @property
    def plots(self) -> Path:
        """Where figures go."""
        return self.path / "plots"

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl, at once; numbers that are not finite are left out, as missing keys."""
        append_jsonl(self.path / "metrics.jsonl", _finite(metrics))

    def truncate_metrics(self, update: int) -> None:
        """Forget the rows after `update` (their key "update" is larger), and a last row that a kill cut short."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            complete = file.read_bytes().rpartition(b"\n")[0]
            rows = parse_jsonl(complete, str(file), {"update": int})
            write_jsonl(file, [row for row in rows if row["update"] <= update])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; numbers that are not finite are left out, as missing keys."""
        write_json(self.path / "summary.json", _finite(summary))

    def write_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write samples.jsonl: prompts, responses and scores, as plain text for whoever shows them to make safe."""
        write_jsonl(self.path / "samples.jsonl", rows)

    def write_tokens(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write tokens.jsonl: of some responses every token's text and numbers, which the report colours."""
        write_jsonl(self.path / "tokens.jsonl", rows)

    def write_card(self, markdown: str) -> None:
        """Write README.md: what was trained, on what, and how it did."""
        write_atomic(self.path / "README.md", markdown.encode("utf-8"))


def require_free(path: str | Path) -> None:
    """Refuse a folder for a new run that holds anything already, but for what a killed `write_atomic` left."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(not is_partial(file) for file in path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty folder: choose another one, or resume the run in it")


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not (_is_number(value) and not math.isfinite(value))}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
