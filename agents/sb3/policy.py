"""A language model as the policy of SB3's actor-critic algorithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from rlhf_env.agents.sb3.buffer import EpisodeStates
from rlhf_env.agents.sb3.contexts import SeenContexts
from rlhf_env.agents.sb3.spaces import require_token_space
from rlhf_env.errors import ConfigError, TokenizerError
from rlhf_env.functional import gather_logp, inverse_cdf_sample, restrict, token_statistics
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.observation import require_observation
from rlhf_env.models.reading import left_padded
from rlhf_env.text.codec import Codec
from rlhf_env.types import SamplingLaw

# Distributions of torch multiply probability 0 by its logarithm, and −∞ would make NaN of that: in TRPO's gradient too.
_NEVER = -1e8

Masks = Tensor | np.ndarray | None


class LMActorCriticPolicy(ActorCriticPolicy):
    """A `CausalLM` as actor and critic of PPO, A2C, TRPO and their kin.

    `model` is a Hugging Face folder or hub name, or a function that makes a `CausalLM`; never a module, which SB3
    would pickle into its checkpoint. The policy starts as that model exactly, and dropout stays off. What may be
    written is the law of the environment's observation space. While SB3 collects, contexts that grow by a token cost
    one column of the model (`SeenContexts`).
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        *,
        model: str | Callable[[], CausalLM],
        ortho_init: bool = False,
        **kwargs: Any,
    ) -> None:
        if ortho_init:
            raise ConfigError("ortho_init=True would overwrite the pretrained weights: leave it off")
        if isinstance(model, nn.Module):
            raise ConfigError(
                "policy_kwargs['model'] is a module, which SB3 would pickle into every checkpoint: give the name of "
                "its folder, or a function that makes it"
            )
        law = require_token_space(observation_space)
        if law is None:
            raise ConfigError(
                "the observation space does not say under which law tokens are sampled (it has no attribute law): a "
                "wrapper rebuilt it; leave the wrapper out, or give its observation space the law of the inner one"
            )
        if int(action_space.n) != law.vocab_size:
            raise ConfigError(
                f"a language model writes tokens, but this environment has {action_space.n} actions for "
                f"{law.vocab_size} tokens: make it with action='token', where top_k limits the choice just the same"
            )
        self._model = model
        #: The environment's sampling law, also after `PPO.load`.
        self.law: SamplingLaw = law
        super().__init__(observation_space, action_space, lr_schedule, ortho_init=False, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.lm = self._model() if callable(self._model) else CausalLM.from_pretrained(self._model)
        if (own := Codec.of(self.lm.tokenizer).vocab_size) != self.law.vocab_size:
            raise TokenizerError(
                f"the environment's vocabulary has {self.law.vocab_size} tokens but this model's tokenizer {own}: "
                "the policy must use the tokenizer that the environment was made with"
            )
        self._seen = SeenContexts(self.law.vocab_size)
        trainable = [p for p in self.lm.parameters() if p.requires_grad]
        known = self.optimizer_class in (torch.optim.Adam, torch.optim.AdamW)  # whose step is one operation if asked
        kwargs = {"fused": True, **self.optimizer_kwargs} if known else self.optimizer_kwargs
        self.optimizer = self.optimizer_class(trainable, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def forward(  # type: ignore[override]
        self, obs: dict[str, Tensor], deterministic: bool = False, action_masks: Masks = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample one token for each row: actions [N], values [N, 1], log-probabilities [N]."""
        logits, values = self._read(obs, action_masks)
        log_probs = logits.log_softmax(-1)
        if deterministic:
            actions = log_probs.argmax(-1)
        else:
            actions = inverse_cdf_sample(log_probs, torch.rand(len(log_probs), device=log_probs.device))
        return actions, values.unsqueeze(1), gather_logp(log_probs, actions)

    def evaluate_actions(  # type: ignore[override]
        self, obs: dict[str, Tensor], actions: Tensor, action_masks: Masks = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values [n, 1], log-probabilities [n] and entropies [n] of actions in states.

        States are rows of observations, or the `EpisodeStates` of an `EpisodeRolloutBuffer`, where one pass of the
        model serves a whole episode.
        """
        logits, values = self._read(obs, action_masks)
        logp, entropy = token_statistics(logits, actions.long().flatten())
        return values.unsqueeze(1), logp, entropy

    def get_distribution(self, obs: dict[str, Tensor], action_masks: Masks = None) -> Distribution:  # type: ignore[override]
        """The next-token distribution of each state."""
        log_probs = self._read(obs, action_masks)[0].log_softmax(-1)
        return CategoricalDistribution(log_probs.shape[-1]).proba_distribution(log_probs.clamp(min=_NEVER))

    def predict_values(self, obs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        """The value of each state, [n, 1]."""
        return self._logits(obs)[1].unsqueeze(1)

    def train(self, mode: bool = True) -> Self:
        """SB3 is about to change the weights: what was read with these is of no more use."""
        if mode and hasattr(self, "_seen"):
            self.forget_contexts()
        return super().train(mode)

    def forget_contexts(self) -> None:
        """Read every context anew: to be called after weights were changed through `.data`, which may leave no trace.

        Optimizers, `load_state_dict` and in-place operations on parameters are noticed without it.
        """
        self._seen.forget()

    def _read(self, obs: dict[str, Tensor], action_masks: Masks) -> tuple[Tensor, Tensor]:
        """Logits [n, V] of the next token under the law and the masks, −∞ where it cannot be, and values [n]."""
        logits, values = self._logits(obs)
        logits = self.law.logits(logits, obs["response_mask"].long().sum(1))
        if self.law.truncates:
            logits = restrict(logits, obs["candidates"].long())
        if action_masks is not None:
            allowed = torch.as_tensor(action_masks, device=logits.device).bool().reshape(logits.shape)
            logits = _masked(logits, allowed)
        return logits, values

    def _logits(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [n, ≥ V] and values [n] in states that end rows, or that lie inside the episodes of `obs`."""
        if isinstance(obs, EpisodeStates):
            return self._inside(obs)
        if self.training or torch.is_grad_enabled():
            return self._at_the_end(obs)
        require_observation(obs)
        return self._seen.read(self.lm, obs["input_ids"].long(), obs["attention_mask"].bool())

    def _at_the_end(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask = left_padded(obs["input_ids"].long(), obs["attention_mask"].bool())
        logits, values = self.lm(ids, mask, keep=1)
        return logits[:, -1], values[:, -1]

    def _inside(self, states: EpisodeStates) -> tuple[Tensor, Tensor]:
        ids, mask = states.last["input_ids"].long(), states.last["attention_mask"].bool()
        if (body := self.lm.body) is not None:  # rows are right-padded, as it reads them
            length = mask.sum(1)
            column = length[states.row] - 1 - states.before_end
            return self.lm.heads(body(ids[:, : int(length.max())], lambda x: x[states.row, column]))
        ids, mask = left_padded(ids, mask)
        keep = int(states.before_end.max()) + 1
        logits, values = self.lm(ids, mask, keep=keep)
        column = keep - 1 - states.before_end
        return logits[states.row, column], values[states.row, column]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return {**data, "model": self._model}


def _masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits [n, V] of the allowed tokens, −∞ for others; where nothing possible is forbidden, bit for bit as is."""
    possible = logits > -torch.inf
    if not (possible & allowed).any(1).all():
        row = int((~(possible & allowed).any(1)).nonzero()[0])
        raise ConfigError(
            f"the action mask of row {row} leaves no token that the environment's law allows: combine masks with "
            "the environment's action_masks()"
        )
    return logits.masked_fill(~allowed, -torch.inf)
