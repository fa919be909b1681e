"""Reward models: one kind per file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_env.reward_models.averaged import average_weights
    from rlhf_env.reward_models.bradley_terry import fit_comparisons, measure_comparisons, new_reward_model, usable
    from rlhf_env.reward_models.cache import cached
    from rlhf_env.reward_models.classifier import ClassifierReward
    from rlhf_env.reward_models.ensemble import Ensemble, quantile, worst_case
    from rlhf_env.reward_models.load import load_reward
    from rlhf_env.reward_models.normalise import Normalised, normalised
    from rlhf_env.reward_models.remote import RemoteConfig, RemoteReward
    from rlhf_env.reward_models.rules import Rule, RuleReward, matches
    from rlhf_env.reward_models.safety_first import SafetyFirst
    from rlhf_env.reward_models.vader import VaderReward
    from rlhf_env.reward_models.weighted_sum import WeightedSum

__all__ = [
    "ClassifierReward",
    "Ensemble",
    "Normalised",
    "RemoteConfig",
    "RemoteReward",
    "Rule",
    "RuleReward",
    "SafetyFirst",
    "VaderReward",
    "WeightedSum",
    "average_weights",
    "cached",
    "fit_comparisons",
    "load_reward",
    "matches",
    "measure_comparisons",
    "new_reward_model",
    "normalised",
    "quantile",
    "usable",
    "worst_case",
]

_MODULES = {
    "ClassifierReward": "classifier",
    "Ensemble": "ensemble",
    "Normalised": "normalise",
    "RemoteConfig": "remote",
    "RemoteReward": "remote",
    "Rule": "rules",
    "RuleReward": "rules",
    "SafetyFirst": "safety_first",
    "VaderReward": "vader",
    "WeightedSum": "weighted_sum",
    "average_weights": "averaged",
    "cached": "cache",
    "fit_comparisons": "bradley_terry",
    "load_reward": "load",
    "matches": "rules",
    "measure_comparisons": "bradley_terry",
    "new_reward_model": "bradley_terry",
    "normalised": "normalise",
    "quantile": "ensemble",
    "usable": "bradley_terry",
    "worst_case": "ensemble",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rlhf_env.reward_models.{_MODULES[name]}"), name)
