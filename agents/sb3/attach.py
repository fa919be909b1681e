"""Telling the environment whose KL to charge, and refusing what would make that KL wrong."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_wrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from rlhf_env.agents.sb3.buffer import EpisodeRolloutBuffer, charges_late
from rlhf_env.agents.sb3.policy import LMActorCriticPolicy
from rlhf_env.envs.binding import find_cores, push_to
from rlhf_env.envs.core import TokenMDP
from rlhf_env.errors import ConfigError, TokenizerError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.text.codec import Codec


class Attachment:
    """The tie between an SB3 model and its environments that `attach_sb3` makes."""

    def __init__(self, hook: RemovableHandle, buffer: Any) -> None:
        self._hook: RemovableHandle | None = hook
        self._buffer = weakref.ref(buffer)

    def remove(self) -> None:
        """Tell the environments nothing more, and leave the KL of a deferred reference where they charge it.

        They go on waiting to be told: until another policy is attached, bound or pushed, their steps raise
        `MissingLogProbError`. A tie that another has replaced stays as it is.
        """
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if isinstance(buffer := self._buffer(), EpisodeRolloutBuffer):
            buffer.relabel(())


_ATTACHMENTS: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()  # by policy


def attach_sb3(model: Any) -> Attachment:
    """Charge the KL of an SB3 model's own policy from here on.

    A forward hook on `model.policy` pushes the log-probability of every action it samples: exactly the stepped ones,
    for PPO, A2C, TRPO, MaskablePPO and RecurrentPPO alike. Where the reference is deferred, the model's
    `EpisodeRolloutBuffer` is told to put the KL on its tokens. To be called again after `model.set_env`: the new tie
    replaces the old one, and without it the policy refuses to act. Returns an object whose `remove()` detaches. Raises
    `ConfigError` where the environment, the algorithm or a setting would make KL or policy another than meant.
    """
    env, policy = model.get_env(), model.policy
    if env is None:
        raise ConfigError("the model has no environment: pass one to its constructor or set_env before attach_sb3")
    normalizer = unwrap_vec_wrapper(env, VecNormalize)
    if normalizer is not None and normalizer.norm_obs:
        raise ConfigError("VecNormalize would turn token ids into small floats: use norm_obs=False")
    if not hasattr(policy, "evaluate_actions"):  # as all actor-critic policies have, MaskablePPO's included
        raise ConfigError(
            f"{type(model).__name__}'s policy does not give log-probabilities of its actions: make the environment "
            "with kl_mode='reference' (exact for deterministic policies), to which nothing needs to be attached"
        )
    cores = find_cores(env)
    _refuse_unfit_modules(model)
    if isinstance(policy, LMActorCriticPolicy):
        _give_law(policy, cores)
    task = cores[0].task
    if model.gamma != 1 and task.kl_placement == "terminal" and task.kl_mode == "reward":
        warnings.warn(
            f"gamma={model.gamma} discounts the KL, which is charged at the last token (kl_placement='terminal'): "
            "the first tokens of a response are charged less than the last; use gamma=1.0, or kl_placement='token'",
            stacklevel=2,
        )
    late = any(charges_late(core) for core in cores)
    if late:
        _require_relabelling(model, normalizer)
    if policy in _ATTACHMENTS:
        _ATTACHMENTS[policy].remove()
    if late:
        model.rollout_buffer.relabel(cores)
    for core in cores:
        core.log_pi.expect_push()

    def push(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        if len(output[0]) != env.num_envs:  # somebody asks the policy about other states
            return
        if model.get_env() is not env:
            raise ConfigError(
                "the model has been given another environment since attach_sb3, which would not be told this policy's "
                "log-probabilities: call attach_sb3(model) again after set_env"
            )
        push_to(cores, output[2], output[0])

    _ATTACHMENTS[policy] = Attachment(policy.register_forward_hook(push), model.rollout_buffer)
    return _ATTACHMENTS[policy]


def _give_law(policy: LMActorCriticPolicy, cores: Sequence[TokenMDP]) -> None:
    """Let the policy sample as these environments say; after `PPO.load` they may be others than at first."""
    codec = cores[0].task.codec
    if policy.lm.tokenizer is not codec.tokenizer and Codec.of(policy.lm.tokenizer).fingerprint != codec.fingerprint:
        raise TokenizerError("the policy has another vocabulary than the environment: its token ids mean other text")
    laws = {core.task.law for core in cores}
    if len(laws) > 1:
        raise ConfigError(
            "the environments have different sampling laws (temperature, top_k, banned_tokens, …), and one policy can "
            "follow only one: make them all alike"
        )
    policy.law = laws.pop()


def _require_relabelling(model: Any, normalizer: VecNormalize | None) -> None:
    """Raise `ConfigError` where the KL of a deferred reference cannot be moved to its tokens."""
    if normalizer is not None and normalizer.norm_reward:
        raise ConfigError(
            "VecNormalize rescales rewards whose KL a deferred reference charges only at the end, so it cannot be put "
            "on its tokens afterwards: use norm_reward=False, or make the environment with reference_backend='cached'"
        )
    buffer = type(model.rollout_buffer).__name__
    if not isinstance(model.rollout_buffer, EpisodeRolloutBuffer):
        cure = "make the environment with reference_backend='cached', or with kl_placement='terminal'"
        if "rollout_buffer_class" in inspect.signature(type(model)).parameters:  # not so for RecurrentPPO
            kind = "Maskable" if buffer.startswith("Maskable") else ""
            cure = f"use rollout_buffer_class={kind}EpisodeRolloutBuffer, or {cure}"
        raise ConfigError(
            "the reference is deferred, so the KL comes in one lump at the end of an episode, and "
            f"{buffer} cannot put it on its tokens: {cure}"
        )


def _refuse_unfit_modules(model: Any) -> None:
    """Raise `ConfigError` where SB3 would damage a pretrained model, differentiate it in vain, or turn dropout on."""
    policy = model.policy
    pretrained = [m for m in policy.modules() if isinstance(m, PreTrainedModel)]
    if getattr(policy, "ortho_init", False):
        extractors = [m for name, m in policy.named_children() if name.endswith("features_extractor")]
        inside = {part for extractor in extractors for part in extractor.modules()}
        if any(isinstance(m, (PreTrainedModel, CausalLM)) for m in inside):
            raise ConfigError(
                "ortho_init=True, SB3's default, has overwritten the pretrained weights of the model in the features "
                "extractor: make the algorithm anew with policy_kwargs={'ortho_init': False, …}"
            )
    for name, share in _dropout(policy):
        raise ConfigError(
            f"policy.{name} has dropout {share:g}: SB3 samples without it and trains with it, so the policy that "
            "learns is not the one that acted (a first ratio far from 1); set it to 0"
        )
    if any(kind.__name__ == "TRPO" for kind in type(model).__mro__):
        if any(m.config._attn_implementation != "eager" for m in pretrained):
            raise ConfigError(
                "TRPO differentiates twice, which only eager attention can: load the model with "
                "CausalLM.from_pretrained(…, attention='eager'), or attn_implementation='eager' in transformers"
            )
        # TRPO takes the parameters called "value" for the critic's, and asks all others for a gradient.
        if frozen := [n for n, p in policy.named_parameters() if not p.requires_grad and "value" not in n]:
            raise ConfigError(
                f"TRPO asks every parameter for a gradient, and {frozen[0]} is frozen: train all layers, or use PPO"
            )


def _dropout(module: nn.Module, name: str = "") -> Iterator[tuple[str, float]]:
    """Every part outside a `CausalLM`, which keeps dropout off by itself, that drops, with the share that it drops."""
    if isinstance(module, CausalLM):
        return
    attribute = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout"
    for share in (getattr(module, attribute, 0.0), getattr(module, "attention_dropout", 0.0)):
        if isinstance(share, (int, float)) and share > 0:
            yield name, float(share)
    for child, part in module.named_children():
        yield from _dropout(part, f"{name}.{child}".lstrip("."))
