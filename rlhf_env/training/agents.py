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
from rlhf_env.training.config import TrainConfig

#: Names for `--agent`. A new agent is one line here.
AGENTS = {
    "ppo": "rlhf_env.agents.ppo:PPO",
    "a2c": "rlhf_env.agents.a2c:A2C",
    "reinforce": "rlhf_env.agents.reinforce:Reinforce",
    "rloo": "rlhf_env.agents.rloo:RLOO",
    "grpo": "rlhf_env.agents.grpo:GRPO",
    "remax": "rlhf_env.agents.remax:ReMax",
    "nlpo": "rlhf_env.agents.nlpo:NLPO",
    "best_of_n": "rlhf_env.agents.best_of_n:BestOfN",
    "rejection_sampling": "rlhf_env.agents.rejection_sampling:RejectionSampling",
    "bon_distillation": "rlhf_env.agents.bon_distillation:BonDistillation",
    "dpo": "rlhf_env.agents.dpo:DPO",
    "ipo": "rlhf_env.agents.ipo:IPO",
    "kto": "rlhf_env.agents.kto:KTO",
    "online_dpo": "rlhf_env.agents.online_dpo:OnlineDPO",
    "ilql": "rlhf_env.agents.ilql:ILQL",
    "soft_q": "rlhf_env.agents.soft_q:SoftQ",
}

#: What `learns_from` may be, in words.
_SOURCES = {"pairs": "a file of comparisons", "log": "a file of logged responses"}

_SB3 = ("sb3:", "sb3-contrib:")
_SB3_EXAMPLES = ("sb3:PPO", "sb3:A2C", "sb3-contrib:TRPO")


def is_sb3(name: str) -> bool:
    """Whether `name` means an algorithm of Stable-Baselines3 or sb3-contrib."""
    return name.startswith(_SB3)


def check_agent(config: TrainConfig) -> None:
    """Refuse an agent that is none, and what makes no sense to it: settings, data or its lack, a budget, a moving β."""
    if is_sb3(config.agent):
        from rlhf_env.training.sb3 import sb3_class  # a second of imports that ours do not need

        sb3_class(config.agent, config.settings)
        source = None
    else:
        cls = agent_class(config.agent)
        agent_config(cls, config.settings)
        source = getattr(cls, "learns_from", None)
    if source is None and config.data is not None:
        raise ConfigError(f"{config.agent} learns from what it samples itself: leave data out")
    if source is not None and config.data is None:
        raise ConfigError(f"{config.agent} samples nothing: it needs data, {_SOURCES[source]}, for example --data FILE")
    if source is not None and (sampled := config.budget.keys() - {"updates"}):
        raise ConfigError(
            f"{config.agent} samples nothing, so {sampled.pop()} cannot be its budget: give updates (gradient steps), "
            "or none, for as many as its own settings say"
        )
    steered = [name for name in ("target_kl", "final_beta") if getattr(config.env, name) is not None]
    if source is not None and steered:
        raise ConfigError(
            f"{config.agent} samples nothing, so env.{steered[0]} has no β to change: leave it out, and see its own "
            f"settings with rlhf-env agents {config.agent}"
        )


def agent_class(name: str) -> type:
    """The class that `name` means: one of `AGENTS`, or "package.module:Class" (the current folder is importable).

    It is an `Agent`, with `update`, or an `OfflineAgent`, with `learns_from` and `fit` (`rlhf_env.types`).
    """
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
    offline = hasattr(found, "learns_from") or (hasattr(found, "fit") and not hasattr(found, "update"))
    needed = ("learns_from", "fit") if offline else ("update",)
    if lacking := [each for each in (*needed, "state_dict", "load_state_dict") if not hasattr(found, each)]:
        kind = "OfflineAgent" if offline else "Agent"
        raise ConfigError(f"agent {name!r} is no agent: it lacks {', '.join(lacking)} (see rlhf_env.types.{kind})")
    if offline and (source := getattr(found, "learns_from", None)) not in _SOURCES:
        raise ConfigError(f"agent {name!r} learns from {source!r}; learns_from must be one of {', '.join(_SOURCES)}")
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
    return described | {
        name: f"{'sb3-contrib' if 'contrib' in name else 'Stable-Baselines3'}'s algorithm of that name, unmodified"
        for name in _SB3_EXAMPLES
    }


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
