"""Finding the token MDP inside wrappers, to tell it whose log-probabilities to charge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_env.envs.core import TokenMDP
from rlhf_env.envs.policy_logp import Observation
from rlhf_env.envs.view import refuse_time_limit
from rlhf_env.errors import ConfigError
from rlhf_env.models.observation import as_array


def find_cores(env: Any) -> list[TokenMDP]:
    """The state machines inside an environment, a vector of environments, or wrappers of either.

    One for a batched environment, one per environment for `SyncVectorEnv` and `DummyVecEnv`. Raises `ConfigError`
    where they live in other processes or are not ours.
    """
    if hasattr(env, "venv"):  # a Stable-Baselines3 wrapper
        return find_cores(env.venv)
    inner = getattr(env, "unwrapped", env)
    if isinstance(core := getattr(inner, "core", None), TokenMDP):
        _refuse_time_limits(env)
        return [core]
    if type(inner).__name__ in ("AsyncVectorEnv", "SubprocVecEnv"):
        raise ConfigError(
            f"{type(inner).__name__} keeps its environments in other processes, where no policy can be reached: use "
            "gym.make_vec(id, num_envs=n), which batches in this process and is faster, or kl_mode='off'"
        )
    if envs := getattr(inner, "envs", None):
        return [core for each in envs for core in find_cores(each)]
    raise ConfigError(f"there is no text-generation environment inside {type(env).__name__}")


def _refuse_time_limits(env: Any) -> None:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.wrappers.TimeLimit):
            refuse_time_limit()
        env = env.env


def bind_policy(env: Any, policy: Callable[[Observation, NDArray[np.int64]], Any] | Any) -> None:
    """Charge `env` the KL of this policy from here on.

    `policy` is a function (observation, actions) → log π of the actions, [N]: the observation is the batched one
    (arrays [N, L]), the actions those just given to `step`. A `CausalLM` may be given itself. `env` may be wrapped.
    """
    if isinstance(policy, torch.nn.Module) and policy.training:
        if found := [name for name, m in policy.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]:
            raise ConfigError(
                f"dropout is on in {found[0] or type(policy).__name__}, so the policy that is asked is not the one "
                "that sampled: set dropout to 0, or call policy.eval()"
            )
    for core in find_cores(env):
        if hasattr(policy, "action_log_probs"):
            core.log_pi.bind(functools.partial(_action_log_probs, core, policy))  # unlike a lambda it can be pickled
        else:
            core.log_pi.bind(policy)


def _action_log_probs(core: TokenMDP, policy: Any, observation: Observation, actions: NDArray[np.int64]) -> Any:
    return policy.action_log_probs(observation, core.token_ids(actions), core.task.law)


def push_logprobs(env: Any, logp: Any, actions: Any) -> None:
    """Tell `env`, which may be wrapped, log π of the actions that its next `step` will be given, [N] each."""
    push_to(find_cores(env), logp, actions)


def push_to(cores: Sequence[TokenMDP], logp: Any, actions: Any) -> None:
    """`push_logprobs` for state machines already found: each gets its own part."""
    borders = np.cumsum([core.num_slots for core in cores])[:-1]
    for core, p, a in zip(
        cores,
        np.split(as_array(logp).reshape(-1), borders),
        np.split(as_array(actions).reshape(-1), borders),
        strict=True,
    ):
        core.log_pi.push(p, a)
