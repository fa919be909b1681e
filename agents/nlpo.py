"""NLPO, natural language policy optimization: PPO on a policy that may only write what a slower copy finds likely.

Ramamurthy et al. 2022 (RL4LMs), arXiv 2210.01241, algorithm 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_env.agents.ppo import PPO, PPOConfig
from rlhf_env.errors import ConfigError
from rlhf_env.functional import entropy, gather_logp, restrict
from rlhf_env.models.truncation import TruncatedDecoder
from rlhf_env.settings import require
from rlhf_env.types import Decoder, Rollout, SamplingLaw

# By how much probability a cached and a teacher-forced mask may differ.
_SLACK = {torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class NLPOConfig(PPOConfig):
    """Settings of NLPO: those of PPO, and the mask."""

    mask_top_p: float = 0.9  #: the mask leaves the likeliest tokens that together reach this probability
    mask_every: int = 10  #: updates after which the mask follows the policy

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, mask_every=(1, None))
        if not 0 < self.mask_top_p <= 1:
            raise ConfigError(f"NLPO needs mask_top_p above 0 and at most 1, it is {self.mask_top_p}")
        if self.ptx is not None:
            raise ConfigError("NLPO has no ptx: demonstrations may hold tokens that its mask forbids")


class NLPO:
    """PPO whose policy writes only what a slower copy of itself has in its nucleus (top-p)."""

    def __init__(self, policy: Any, config: NLPOConfig = NLPOConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config, self.batch_size = MaskedPolicy(policy, config.mask_top_p), config, config.batch_size
        self.ppo = PPO(self.policy, config, seed=seed)

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """PPO's update of the masked policy; every `mask_every` updates the mask becomes the policy of then."""
        metrics = self.ppo.update(rollout, progress)
        if self.ppo.descent.updates % self.config.mask_every == 0:
            self.policy.mask.load_state_dict(self.policy.own.state_dict())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """PPO's state, and the weights of the mask."""
        return {"ppo": self.ppo.state_dict(), "mask": self.policy.mask.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.ppo.load_state_dict(state["ppo"])
        self.policy.mask.load_state_dict(state["mask"])


class MaskedPolicy(nn.Module):
    """`own`, restricted in every state to the nucleus of `mask`, which starts as a frozen copy of it.

    It is a policy like any other: what it says of a token is what it draws it with, so its KL to a reference is real.
    """

    def __init__(self, own: Any, top_p: float) -> None:
        super().__init__()
        self.own, self.top_p = own, top_p
        self.mask = copy.deepcopy(own).requires_grad_(False)
        self.tokenizer, self.context_length = own.tokenizer, getattr(own, "context_length", None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.own.device

    def decoder(self, num_rows: int, law: SamplingLaw) -> Decoder:
        """A decoder of `num_rows` rows, which the mask's decoder runs beside."""
        own, mask = self.own.decoder(num_rows, law), self.mask.decoder(num_rows, law)
        return TruncatedDecoder(own, mask, self._nucleus(law, self.top_p))

    def response_log_probs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probabilities [B, T, V] and values [B, T], before each token."""
        log_probs, values = self.own.response_log_probs(rollout)
        return restrict(log_probs, self._allowed(rollout, self.top_p)), values

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, value and entropy at every response token, each [B, T], with gradient."""
        log_probs, values = self.own.response_log_probs(rollout)
        allowed, tokens = self._allowed(rollout, self.top_p), rollout.response_ids.unsqueeze(-1)
        slack = _SLACK.get(next(self.mask.parameters()).dtype, 1e-5)
        # A token at the border was sampled by what the cache computed: rounding must not forbid it now.
        nearly = (self._allowed(rollout, min(self.top_p + slack, 1.0)) == tokens).any(-1, keepdim=True)
        log_probs = restrict(log_probs, torch.cat([allowed, torch.where(nearly, tokens, -1)], dim=-1))
        return gather_logp(log_probs, rollout.response_ids), values, entropy(log_probs)

    @torch.no_grad()
    def _allowed(self, rollout: Rollout, top_p: float) -> Tensor:
        """The tokens in the mask's nucleus, int64 [B, T, V], −1 = none."""
        return self._nucleus(rollout.law, top_p).candidates(self.mask.response_log_probs(rollout)[0])

    def _nucleus(self, law: SamplingLaw, top_p: float) -> SamplingLaw:
        if law.truncates:
            raise ConfigError("NLPO's mask is a top-p of its own: leave out the environment's top_k and top_p")
        return replace(law, top_p=top_p)
