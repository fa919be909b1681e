"""Reward models: one kind per file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_env.reward_models.bradley_terry import fit_comparisons, measure_comparisons, new_reward_model, usable
    from rlhf_env.reward_models.classifier import ClassifierReward
    from rlhf_env.reward_models.ensemble import Ensemble
    from rlhf_env.reward_models.load import load_reward
    from rlhf_env.reward_models.vader import VaderReward

__all__ = [
    "ClassifierReward",
    "Ensemble",
    "VaderReward",
    "fit_comparisons",
    "load_reward",
    "measure_comparisons",
    "new_reward_model",
    "usable",
]

_MODULES = {
    "ClassifierReward": "classifier",
    "Ensemble": "ensemble",
    "VaderReward": "vader",
    "fit_comparisons": "bradley_terry",
    "load_reward": "load",
    "measure_comparisons": "bradley_terry",
    "new_reward_model": "bradley_terry",
    "usable": "bradley_terry",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rlhf_env.reward_models.{_MODULES[name]}"), name)
