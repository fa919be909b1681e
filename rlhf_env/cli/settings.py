"""From flags, a config file and KEY=VALUE overrides to one config; the later of these wins."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_env.records.config import Layer, build, documented, dotted_layer, override_layer, read_layer
from rlhf_env.training.config import BUDGETS

T = TypeVar("T")

OVERRIDES = "Any setting by its dotted name, e.g. env.temperature=0.7; these win over flags, and flags over the file."
CONFIG = "A YAML file of settings, e.g. the config.yaml of an earlier run."
THREADS = "CPU threads of torch (default: OMP_NUM_THREADS, else 1; tiny models are faster on one)."


def settings_from(kind: type[T], file: Path | None, flags: Mapping[str, Any], overrides: Sequence[str] | None) -> T:
    """A config from all that the command line gives; `flags` maps dotted keys to values, None where not given."""
    layers = [] if file is None else [read_layer(file)]
    given = [(key, value) for key, value in flags.items() if value is not None and value is not False]
    typed = [dotted_layer("the command line", given), override_layer(overrides or [])]
    # A budget replaces the file's, whatever its unit.
    if any(unit in layer.values for unit in BUDGETS for layer in typed):
        layers = [Layer(one.source, _without_budget(one.values)) for one in layers]
    if any(unit in _section(layer, "train") for unit in BUDGETS for layer in typed):
        layers = [Layer(one.source, {**one.values, "train": _without_budget(_section(one, "train"))}) for one in layers]
    return build(kind, *layers, *typed)


def _section(layer: Layer, name: str) -> Mapping[str, Any]:
    section = layer.values.get(name)
    return section if isinstance(section, Mapping) else {}


def _without_budget(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in BUDGETS}


def sentences(kind: Any) -> dict[str, str]:
    """What each setting of a config means, by its dotted key."""
    return {key: f"{text[:1].upper()}{text[1:]}." for key, text in documented(kind).items()}


def rest_of(sentences: Mapping[str, str], flags: Mapping[str, str]) -> str:
    """The settings that have no flag of their own, for the end of a command's help."""
    lines = [f"  {key}: {sentence}" for key, sentence in sentences.items() if key not in flags.values()]
    return "\b\nMore settings, each given as KEY=VALUE:\n" + "\n".join(lines)


def use_threads(threads: int | None) -> None:
    """Give torch that many threads, before or after it was first imported."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
