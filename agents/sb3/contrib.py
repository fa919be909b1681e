"""The language model under sb3-contrib's MaskablePPO, which insists on classes of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlhf_env.agents.sb3.buffer import EpisodeRolloutBuffer
from rlhf_env.agents.sb3.policy import LMActorCriticPolicy, Masks
from rlhf_env.errors import ConfigError

try:
    from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
except ImportError as error:
    raise ConfigError("MaskablePPO is part of sb3-contrib, which is not installed: pip install sb3-contrib") from error


# Registered, not derived: MaskablePPO only asks isinstance, and the constructors of the two lines do not fit together.
@MaskableActorCriticPolicy.register
class MaskableLMActorCriticPolicy(LMActorCriticPolicy):
    """`LMActorCriticPolicy` for MaskablePPO: what may be written is what both the law and the action masks allow."""

    def predict(  # type: ignore[override]
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Masks = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions [N] for observations [N, …], or one action for one observation."""
        self.set_training_mode(False)
        tensors, batched = self.obs_to_tensor(observation)
        with torch.no_grad():
            distribution = self.get_distribution(tensors, action_masks)  # type: ignore[arg-type]
        actions = distribution.get_actions(deterministic=deterministic).cpu().numpy()
        return (actions if batched else actions.squeeze(0)), state


class MaskableEpisodeRolloutBuffer(EpisodeRolloutBuffer, MaskableDictRolloutBuffer):
    """`EpisodeRolloutBuffer` that keeps the action masks, as MaskablePPO wants."""

    _by_transition = (*EpisodeRolloutBuffer._by_transition, "action_masks")
