"""Models of Stable-Baselines3 over the letters of `tests.builders`, and reading their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO

from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, attach_sb3
from rlhf_env.models.causal_lm import CausalLM
from tests.builders import random_model


def make_model(
    env: Any, algorithm: Any = PPO, *, attach: bool = True, policy: Any = LMActorCriticPolicy, **kwargs: Any
) -> Any:
    """A PPO with the random model as its policy, in minibatches of whole episodes, attached."""
    defaults: dict[str, Any] = {"gamma": 1.0, "n_steps": 8, "seed": 0, "device": "cpu"}
    if algorithm.__name__ != "A2C":
        defaults["batch_size"] = 16
    if "PPO" in algorithm.__name__:
        defaults["n_epochs"] = 2
    if not isinstance(policy, str):
        defaults |= {"policy_kwargs": {"model": eager_model}, "rollout_buffer_class": EpisodeRolloutBuffer}
    model = algorithm(policy, env, **(defaults | kwargs))
    if attach:
        attach_sb3(model)
    return model


def eager_model(**kwargs: Any) -> CausalLM:
    """The random model, with attention that TRPO can differentiate twice."""
    model: Any = random_model(**({"seed": 1} | kwargs))
    model.model.set_attn_implementation("eager")
    return model


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.policy.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def furthest(a: Any, b: Any) -> float:
    """The largest difference between two models' weights, or those kept of them."""
    a, b = (kept if isinstance(kept, list) else weights(kept) for kept in (a, b))
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def tensors(observation: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in observation.items()}


def finished(env: Any, act: Callable[[Any], Any], steps: int) -> list[dict[str, Any]]:
    """Last infos of the episodes that end within `steps` steps of a VecEnv."""
    infos, obs = [], env.reset()
    for _ in range(steps):
        obs, _, dones, told = env.step(act(obs))
        infos += [info for info, done in zip(told, dones, strict=True) if done]
    return infos
