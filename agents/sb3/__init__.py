"""Stable-Baselines3, unmodified, on the token MDP: the VecEnv view, a language-model policy, a buffer of episodes.

envs = SB3VecEnv(gym.make_vec("rlhf_env/TextGeneration-v0", num_envs=32))
model = PPO(LMActorCriticPolicy, envs, gamma=1.0, n_steps=32, policy_kwargs={"model": "folder"},
            rollout_buffer_class=EpisodeRolloutBuffer)
attach_sb3(model)  # from here the environment's KL is this policy's

Algorithms with policies of their own take `MultiInputPolicy`, with `GRUExtractor` to read the tokens. MaskablePPO takes
`MaskableLMActorCriticPolicy` and `MaskableEpisodeRolloutBuffer`, which need sb3-contrib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_env.agents.sb3.attach import attach_sb3
from rlhf_env.agents.sb3.buffer import EpisodeRolloutBuffer
from rlhf_env.agents.sb3.callbacks import RLHFMetrics, TokenView
from rlhf_env.agents.sb3.extractor import GRUExtractor
from rlhf_env.agents.sb3.policy import LMActorCriticPolicy
from rlhf_env.agents.sb3.saving import load_sb3, save_sb3
from rlhf_env.agents.sb3.vec_env import SB3VecEnv

if TYPE_CHECKING:
    from rlhf_env.agents.sb3.contrib import MaskableEpisodeRolloutBuffer, MaskableLMActorCriticPolicy

__all__ = [
    "EpisodeRolloutBuffer",
    "GRUExtractor",
    "LMActorCriticPolicy",
    "MaskableEpisodeRolloutBuffer",
    "MaskableLMActorCriticPolicy",
    "RLHFMetrics",
    "SB3VecEnv",
    "TokenView",
    "attach_sb3",
    "load_sb3",
    "save_sb3",
]


def __getattr__(name: str) -> Any:
    if name not in ("MaskableEpisodeRolloutBuffer", "MaskableLMActorCriticPolicy"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf_env.agents.sb3 import contrib  # needs sb3-contrib, which is not always there

    return getattr(contrib, name)
