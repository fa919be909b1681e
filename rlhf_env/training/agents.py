"""Agents by name: ours, those of Stable-Baselines3, and any class of yours."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from rlhf_env.errors import ConfigError
from rlhf_env.records.config import Layer, build, documented

#: Names for `--agent`. A new agent is one line here.
AGENTS = {
    "ppo": "rlhf_env.agents.ppo:PPO",
}

_SB3_EXAMPLES = ("sb3:PPO", "sb3:A2C", "sb3:TRPO")


def agent_class(name: str) -> type:
    """The class that `name` means: one of `AGENTS`, or "package.module:Class" (the current folder is importable)."""
    module_name, colon, class_name = AGENTS.get(name, name).partition(":")
    if not colon:
        close = get_close_matches(name.lower(), AGENTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join([*AGENTS, *_SB3_EXAMPLES])}"
        raise ConfigError(f"unknown agent {name!r}; {hint}. Your own class is written 'package.module:Class'")
    sys.path.insert(0, here := str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module raises while it is imported
        raise ConfigError(f"agent {name!r}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        close = get_close_matches(class_name, [n for n, v in vars(module).items() if inspect.isclass(v)], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"agent {name!r}: {module_name!r} has no class of that name{hint}")
    if lacking := [method for method in ("update", "state_dict", "load_state_dict") if not hasattr(found, method)]:
        raise ConfigError(f"agent {name!r} is no agent: it lacks {', '.join(lacking)} (see rlhf_env.types.Agent)")
    return found


def agent_config(cls: type, settings: Mapping[str, Any]) -> Any:
    """The config of an agent, from plain `settings`."""
    return build(_config_class(cls), Layer(f"{cls.__name__}'s settings", settings), prefix="settings.")


def agent_settings(cls: type) -> dict[str, str]:
    """An agent's settings as "settings.name=default", each with its sentence."""
    kind = _config_class(cls)
    defaults = {field.name: field.default for field in fields(kind)}
    return {f"settings.{name}={defaults[name]}": sentence for name, sentence in documented(kind).items()}


def describe_agents() -> dict[str, str]:
    """Each agent's name and the first sentence of its class, read without importing it."""
    described = {name: first_sentence(*target.split(":")) for name, target in AGENTS.items()}
    return described | {name: "Stable-Baselines3's algorithm of that name, unmodified" for name in _SB3_EXAMPLES}


def first_sentence(module: str, name: str | None = None) -> str:
    """The first line of the docstring of a module, or of one of its classes, without importing the module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return f"cannot be found: {module}"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None) if name else tree
    return ((ast.get_docstring(node) if node else None) or "").partition("\n")[0]


def _config_class(cls: type) -> Any:
    """What the constructor's argument `config` is annotated with."""
    try:
        kind = get_type_hints(cls.__init__).get("config")
    except NameError as error:
        raise ConfigError(f"the annotations of {cls.__name__}.__init__ cannot be read: {error}") from error
    if not is_dataclass(kind):
        raise ConfigError(
            f"{cls.__name__} must be made as {cls.__name__}(policy, config, *, seed), config annotated with a dataclass"
        )
    return kind
