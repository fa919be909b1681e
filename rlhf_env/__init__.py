"""rlhf-env: text generation as a token-level Gymnasium environment, and the RLHF laboratory around it.

Importing this package registers the environment ids and nothing more; everything heavy is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium as _gym

if TYPE_CHECKING:
    from rlhf_env.envs.beta import AdaptiveBeta as AdaptiveBeta
    from rlhf_env.envs.beta import ScheduledBeta as ScheduledBeta
    from rlhf_env.envs.binding import bind_policy as bind_policy
    from rlhf_env.envs.binding import push_logprobs as push_logprobs
    from rlhf_env.envs.checker import check_token_env as check_token_env
    from rlhf_env.envs.single import TextGenerationEnv as TextGenerationEnv
    from rlhf_env.envs.vector import TextGenerationVectorEnv as TextGenerationVectorEnv
    from rlhf_env.errors import ContractError as ContractError
    from rlhf_env.errors import MissingLogProbError as MissingLogProbError
    from rlhf_env.errors import RLHFEnvError as RLHFEnvError
    from rlhf_env.errors import UnboundPolicyWarning as UnboundPolicyWarning
    from rlhf_env.models.causal_lm import CausalLM as CausalLM
    from rlhf_env.training.collect import collect as collect
    from rlhf_env.training.evaluate import evaluate as evaluate
    from rlhf_env.training.loop import train as train
    from rlhf_env.types import Rollout as Rollout
    from rlhf_env.types import SamplingLaw as SamplingLaw

__version__ = "0.1.0"

_PUBLIC = {
    "AdaptiveBeta": "envs.beta",
    "CausalLM": "models.causal_lm",
    "ContractError": "errors",
    "MissingLogProbError": "errors",
    "RLHFEnvError": "errors",
    "Rollout": "types",
    "SamplingLaw": "types",
    "ScheduledBeta": "envs.beta",
    "TextGenerationEnv": "envs.single",
    "TextGenerationVectorEnv": "envs.vector",
    "UnboundPolicyWarning": "errors",
    "bind_policy": "envs.binding",
    "check_token_env": "envs.checker",
    "collect": "training.collect",
    "evaluate": "training.evaluate",
    "push_logprobs": "envs.binding",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"rlhf_env.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'rlhf_env' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


# A changed reward or law is a new version number.
for _id, _module in {
    "rlhf_env/TextGeneration-v0": "rlhf_env.worlds.text_generation",
    "rlhf_env/Enumerable-v0": "rlhf_env.worlds.enumerable",
    "rlhf_env/Keywords-v0": "rlhf_env.worlds.keywords",
    "rlhf_env/Reviews-v0": "rlhf_env.worlds.reviews",
}.items():
    _gym.register(_id, entry_point=f"{_module}:make_env", vector_entry_point=f"{_module}:make_vector_env")
