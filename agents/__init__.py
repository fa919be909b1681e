"""Algorithms, one per file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_env.agents.ppo import PPO, PPOConfig

__all__ = ["PPO", "PPOConfig"]

_MODULES = {"PPO": "ppo", "PPOConfig": "ppo"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rlhf_env.agents.{_MODULES[name]}"), name)
