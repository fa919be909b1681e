"""SB3 models as folders of safetensors and JSON: nothing is pickled, and reading one runs no code from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor

from rlhf_env.agents.sb3.policy import LMActorCriticPolicy
from rlhf_env.agents.sb3.vec_env import SB3VecEnv
from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.errors import ConfigError, DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.checkpoint import (
    Checkpoint,
    flatten_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unflatten_state,
)

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

_COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls")
_CLASSES = ("rlhf_env.agents.sb3", "torch.optim", "torch.nn")  # modules whose classes a folder may name
_NOT_SETTINGS = {"self", "policy", "env", "device", "seed", "policy_kwargs", "_init_setup_model"}


def save_sb3(model: BaseAlgorithm, folder: str | Path) -> Path:
    """Write `model` to a checkpoint in `folder`, in place of the one before, and return its path.

    A language model becomes a Hugging Face folder with its value head, another policy one file of weights; beside it
    are the optimizer's state, the settings and counters, the state of torch's and NumPy's global generators, and which
    prompts come next in environments of ours, with what the controller of β knows. Not kept: running episodes, the
    replay buffer, the statistics of a `VecNormalize`, and what JSON cannot say (schedules, classes of your own), for
    which `load_sb3` asks by name.
    """
    policy: Any = model.policy
    settings, by_hand = _settings(model)
    state: dict[str, Any] = {
        "algorithm": type(model).__name__,
        "settings": settings,
        "by_hand": by_hand,
        "counters": {name: getattr(model, name) for name in _COUNTERS if hasattr(model, name)},
    }
    tensors, state["optimizer"] = flatten_state(policy.optimizer.state_dict())
    groups: dict[str, Any] = {"optimizer": tensors}
    groups["random"], state["random"] = _random_state(model)
    state["environments"] = [env.state_dict() for env in _stateful(model.get_env())]
    if isinstance(policy, LMActorCriticPolicy):
        if policy.lm.has_adapters:
            raise ConfigError(
                "adapters would be merged into the weights, and training could not go on from them: use SB3's own "
                "model.save(file), or policy.lm.save_pretrained(folder) for the merged model alone"
            )
        inner: Any = policy.lm.model
        state["language_model"] = {
            "dtype": str(inner.dtype).removeprefix("torch."),
            "attention": inner.config._attn_implementation,
            "frozen": [name for name, p in policy.lm.named_parameters() if not p.requires_grad],
        }
        write = policy.lm.save_pretrained
    else:
        groups["policy"], write = policy.state_dict(), None
    return save_checkpoint(Path(folder), model.num_timesteps, tensors=groups, state=state, write_model=write, keep=1)


def load_sb3(
    algorithm: type[Algorithm], folder: str | Path, env: Any, *, device: str = "auto", **settings: Any
) -> Algorithm:
    """The model of class `algorithm` that `save_sb3` wrote to `folder`, ready to be attached to `env` and go on.

    `settings` replace those that were saved, and give those that could not be. Unless there is a `seed` among them,
    torch's and NumPy's global generators are set to what they were, and an environment that is alike, with as many
    environments, takes up its prompts and a controlled β where they stood; a fixed β is its own.

    Running episodes are not kept, so learning goes on with a reset. From there `learn(…, reset_num_timesteps=False)`
    of an on-policy model without `VecNormalize` goes bit for bit as the saved one would have gone after
    `model.set_env(model.get_env())`, which resets too, on the same machine with as many threads. An off-policy model
    begins with an empty replay buffer.
    """
    path = latest_checkpoint(Path(folder))
    if path is None:
        raise ConfigError(f"there is no complete checkpoint in {folder}: save one with save_sb3(model, folder)")
    saved = load_checkpoint(path)
    if (name := saved.state["algorithm"]) != algorithm.__name__:
        raise ConfigError(f"{path} holds a model of {name}, not of {algorithm.__name__}")
    if missing := [name for name in saved.state["by_hand"] if name not in settings]:
        raise ConfigError(
            f"{path} could not hold {', '.join(missing)}: give load_sb3 the same as when the model was made, e.g. "
            f"{missing[0]}=…"
        )
    goes_on = "seed" not in settings
    settings = {**{name: _decoded(value, path) for name, value in saved.state["settings"].items()}, **settings}
    if "language_model" in saved.state:
        kwargs = {**settings.get("policy_kwargs", {}), "model": _loader(saved, device)}
        settings["policy_kwargs"] = kwargs
    model = algorithm(env=env, device=device, **settings)
    policy: Any = model.policy
    if "policy" in saved.tensors:
        policy.load_state_dict(saved.tensors["policy"])
    policy.optimizer.load_state_dict(unflatten_state(saved.tensors["optimizer"], saved.state["optimizer"]))
    for name, count in saved.state["counters"].items():
        setattr(model, name, count)
    if goes_on:
        _restore_environments(model.get_env(), saved.state["environments"])
        _restore_random_state(model, saved)
    return model


def _stateful(env: VecEnv | None) -> list[Any]:
    """The environments of ours inside `env`: one that is a batch, or single ones."""
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    if isinstance(env, SB3VecEnv):
        return [env.venv_]
    inside = [each.unwrapped for each in getattr(env, "envs", ())]
    return inside if all(isinstance(each, TextGenerationEnv) for each in inside) else []


def _restore_environments(env: VecEnv | None, states: Sequence[dict[str, Any]]) -> None:
    """Let the environments go on from these states, if they are of as many."""
    ours = _stateful(env)
    sizes = [[len(state["prompts"]) for state in side] for side in (states, (each.state_dict() for each in ours))]
    if env is None or sizes[0] != sizes[1]:
        return
    for each, state in zip(ours, states, strict=True):
        beta = state["beta"] if "controller" in state["beta"] else each.core.beta_state()
        each.load_state_dict({**state, "beta": beta})
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    env._reset_seeds()  # with which SB3's constructor would begin their generators anew at the first reset


def _random_state(model: BaseAlgorithm) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Where the global generators that SB3 draws from stand, as tensors and JSON values."""
    _, keys, *rest = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    if model.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(model.device)
    return tensors, {"numpy": rest}


def _restore_random_state(model: BaseAlgorithm, saved: Checkpoint) -> None:
    tensors = saved.tensors["random"]
    torch.set_rng_state(tensors["torch"])
    np.random.set_state(("MT19937", tensors["numpy"].numpy(), *saved.state["random"]["numpy"]))
    if model.device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], model.device)


def _settings(model: BaseAlgorithm) -> tuple[dict[str, Any], list[str]]:
    """The constructor's arguments as JSON values, and the names of those that are none."""
    names = [name for name in inspect.signature(type(model)).parameters if name not in _NOT_SETTINGS]
    values = {name: getattr(model, name, getattr(model, f"_{name}", None)) for name in names}
    aliases = {kind: name for name, kind in model.policy_aliases.items()}
    values["policy"] = aliases.get(type(model.policy), type(model.policy))
    values["policy_kwargs"] = {name: value for name, value in model.policy_kwargs.items() if name != "model"}
    values["seed"] = model.seed
    settings, by_hand = {}, []
    for name, value in values.items():
        if name.endswith("_class") and inspect.isclass(value) and value.__module__.startswith(("stable_b", "sb3_c")):
            continue  # what the algorithm chooses by itself
        try:
            settings[name] = _encoded(value)
        except DataError:
            by_hand.append(name)
    return settings, by_hand


def _encoded(value: Any) -> Any:
    """A setting as a JSON value; `DataError` where it is none."""
    if isinstance(value, FloatSchedule) and isinstance(value.value_schedule, ConstantSchedule):
        return value.value_schedule.val
    if isinstance(value, Enum):
        return _encoded(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encoded(item) for key, item in value.items()}}
    if inspect.isclass(value):
        for module in _CLASSES:
            if getattr(import_module(module), value.__name__, None) is value:
                return {"class": [module, value.__name__]}
    raise DataError(f"{value!r} cannot be stored as JSON")


def _decoded(value: Any, path: Path) -> Any:
    """What `_encoded` was given."""
    if isinstance(value, list):
        return [_decoded(item, path) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decoded(item, path) for item in content)
    if kind == "dict":
        return {key: _decoded(item, path) for key, item in content.items()}
    module, name = content
    found = getattr(import_module(module), name, None) if module in _CLASSES else None
    if not inspect.isclass(found):
        raise DataError(f"{path / 'state.json'}: {module}.{name} is no class that a saved model may name")
    return found


def _loader(saved: Checkpoint, device: str) -> Any:
    """A function that makes the saved language model."""
    about, folder = saved.state["language_model"], saved.path / "model"

    def load() -> CausalLM:
        lm = CausalLM.from_pretrained(
            folder, device="cpu" if device == "auto" else device, dtype=about["dtype"], attention=about["attention"]
        )
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(name not in about["frozen"])
            parameter.data = parameter.data.clone()  # read from a file they may lie unaligned, which rounds otherwise
        return lm

    return load
