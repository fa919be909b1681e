"""Reward models: one kind per file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_env.reward_models.classifier import ClassifierReward
    from rlhf_env.reward_models.load import load_reward
    from rlhf_env.reward_models.vader import VaderReward

__all__ = ["ClassifierReward", "VaderReward", "load_reward"]

_MODULES = {"ClassifierReward": "classifier", "VaderReward": "vader", "load_reward": "load"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rlhf_env.reward_models.{_MODULES[name]}"), name)
