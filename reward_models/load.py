"""A reward model from the one word that a command line or a config file gives."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from rlhf_env.errors import ConfigError
from rlhf_env.http import is_url
from rlhf_env.records.jsonl import read_json
from rlhf_env.types import RewardModel

SUFFIXES = (".yaml", ".yml", ".json")  # of recipes

_BUILT_IN = ("vader",)


def load_reward(spec: str, *, device: torch.device | str = "cpu") -> RewardModel | Callable[..., Any]:
    """The reward model that `spec` names.

    "vader"; "package.module:name" of a function, an object with `score`, or a class made without arguments (the
    current directory is importable); the folder of a Hugging Face sequence classifier, "folder:label" where it has
    several labels, or for one group of a model of groups; the URL of a reward server; a recipe, FILE.yaml, of several
    of these; or several with commas between them, the mean ensemble. `device` is where classifiers run.
    """
    return _load(spec, device, ())


def _load(spec: str, device: torch.device | str, inside: tuple[Path, ...]) -> Any:
    """The reward of `spec`, a text in the recipes `inside`."""
    if spec.endswith(SUFFIXES) and Path(spec).is_file():
        from rlhf_env.reward_models.recipe import load_recipe

        if (file := Path(spec).resolve()) in inside:
            raise ConfigError(f"the recipe {spec!r} contains itself")
        return load_recipe(spec, lambda member: _load(member, device, (*inside, file)))
    if "," in spec and not Path(spec).exists():
        from rlhf_env.reward_models.ensemble import Ensemble

        return Ensemble([_load(member.strip(), device, inside) for member in spec.split(",")])
    if is_url(spec):
        from rlhf_env.reward_models.remote import RemoteReward

        return RemoteReward(spec)
    if spec == "vader":
        from rlhf_env.reward_models.vader import VaderReward

        return VaderReward()
    head, _, tail = spec.rpartition(":")
    cuts = [(spec[:i], spec[i + 1 :]) for i, mark in enumerate(spec) if mark == ":"]  # a label may have one, too
    for folder, label in ((spec, None), *cuts):
        if folder and (Path(folder) / "config.json").is_file():
            return _saved(folder, label, device)
    if spec.endswith(SUFFIXES):
        raise ConfigError(f"there is no file {spec!r}, by its name a recipe of a reward")
    if spec and Path(spec).is_dir():
        raise ConfigError(f"the folder {spec!r} holds no config.json, so it is not a saved sequence classifier")
    if head and tail:
        return _imported(head, tail)
    close = get_close_matches(spec.lower(), _BUILT_IN, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"unknown reward model {spec!r}.{hint} Known are {', '.join(map(repr, _BUILT_IN))}, 'module:function', "
        "'module:Class', the folder of a sequence classifier, the URL of a reward server, a recipe FILE.yaml, and "
        "several of them with commas between"
    )


def _saved(folder: str, label: str | None, device: torch.device | str) -> RewardModel:
    """The reward model in a folder, of the `reward_kind` that its config.json says; of none, a plain classifier."""
    if read_json(Path(folder) / "config.json").get("reward_kind") == "linear":
        from rlhf_env.reward_models.linear import LinearReward

        if label is not None:
            raise ConfigError(f"the linear reward model {folder} has no labels: leave out {label!r}")
        return LinearReward.load(folder)
    from rlhf_env.reward_models.classifier import ClassifierReward

    return ClassifierReward(folder, label=label, device=device)


def _imported(module_name: str, name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module raises while it is imported
        raise ConfigError(
            f"reward model '{module_name}:{name}': cannot import {module_name!r} (from {here} or the installed "
            f"packages): {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    found = getattr(module, name, None)
    if inspect.isclass(found):
        try:
            found = found()
        except TypeError as error:
            raise ConfigError(
                f"reward model '{module_name}:{name}': the class cannot be made without arguments ({error}); name a "
                "function that makes the scores, or an object, instead"
            ) from error
    if not callable(found) and not callable(getattr(found, "score", None)):
        close = get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        problem = "has no such name" if not hasattr(module, name) else "has it, but it is no function and has no score"
        raise ConfigError(f"reward model '{module_name}:{name}': the module {problem}{hint}")
    return found
