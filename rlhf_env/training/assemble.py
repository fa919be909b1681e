"""From settings to objects: prompts, models, environments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_env.envs.beta import AdaptiveBeta, BetaController, ScheduledBeta
from rlhf_env.envs.task import KLMode, ScoreFn
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError, EmptyPromptError, PromptTooLongError, TokenizerError
from rlhf_env.http import is_url
from rlhf_env.models import sharding
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.chat import chat_generator
from rlhf_env.models.generation import text_generator
from rlhf_env.models.remote import RemoteLM
from rlhf_env.records.safe_text import safe_text
from rlhf_env.reward_models.ensemble import Ensemble
from rlhf_env.reward_models.load import load_reward
from rlhf_env.text.codec import Codec
from rlhf_env.text.prompts import load_prompts
from rlhf_env.training.config import (
    EnvConfig,
    EvaluateConfig,
    GenerateConfig,
    PreferConfig,
    RewardEvalConfig,
    TrainConfig,
    WriterConfig,
)
from rlhf_env.types import Policy, RewardModel

_HELD_OUT_STREAM = 2


@dataclass(frozen=True)
class Parts:
    """What a training run is made of."""

    policy: CausalLM
    envs: TextGenerationVectorEnv
    eval_envs: TextGenerationVectorEnv  # the same task on the prompts to evaluate on, with β fixed
    gold: RewardModel | ScoreFn | None
    held_out: bool  # whether neither training nor its data use the prompts of evaluation


def assemble(config: TrainConfig, *, kl_mode: KLMode = "reward") -> Parts:
    """Read the prompts, load the models and make the environments of a training run.

    `kl_mode` says what the rewards of training contain; those of evaluation always hold the KL.
    """
    prompts = load_prompts(config.prompts)
    if config.eval_prompts is None:
        prompts, eval_prompts = split_prompts(prompts, config.seed)
    else:
        eval_prompts = load_prompts(config.eval_prompts)
    device = parse_device(config.device)
    reward = load_reward(config.reward, device=device)
    explored = _with_bonus(reward, config.bonus)
    gold = None if config.gold is None else load_reward(config.gold, device=device)
    policy = CausalLM.from_pretrained(config.policy, device=config.device, dtype=config.dtype)
    reference = load_reference(config) or policy.frozen_copy()
    policy.freeze_layers(config.freeze_layers)
    if config.gradient_checkpointing:
        policy.checkpoint_gradients()
    sharding.forget()  # those of an earlier run in this process
    if config.spread_weights:
        for model in (policy, reference):
            model.spread()

    def make(
        prompts: Sequence[str], file: str, reward: Any, beta: float | BetaController, kl_mode: KLMode = "reward"
    ) -> TextGenerationVectorEnv:
        return make_envs(config.env, config.num_envs, prompts, file, policy, reward, reference, beta, kl_mode)

    env, beta = config.env, config.env.beta
    if env.target_kl is not None:
        beta = AdaptiveBeta(initial=env.beta, target=env.target_kl, horizon=env.beta_horizon)
    elif env.final_beta is not None:
        beta = ScheduledBeta(((0, env.beta), (env.beta_horizon, env.final_beta)))
    return Parts(
        policy=policy,
        envs=make(prompts, config.prompts, explored, beta, kl_mode),
        eval_envs=make(eval_prompts, config.eval_prompts or config.prompts, reward, env.beta),
        gold=gold,
        held_out=set(eval_prompts).isdisjoint(prompts),
    )


def _with_bonus(reward: Any, bonus: float) -> Any:
    """What training is told: the ensemble with its bonus for disagreement, which evaluation leaves out."""
    if bonus == 0:
        return reward
    if not isinstance(reward, Ensemble):
        raise ConfigError("bonus is for the disagreement of several rewards: name them with commas, --reward A,B,C")
    return dataclasses.replace(reward, bonus=reward.bonus + bonus)


def split_prompts(prompts: Sequence[str], seed: int, share: float = 0.1) -> tuple[list[str], list[str]]:
    """Prompts to train on, and a seeded share of the distinct ones to evaluate on: 1 to 128; one prompt serves as both.

    A text that occurs several times is on one side only.
    """
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) == 1:
        return list(prompts), distinct
    count = min(128, max(1, int(len(distinct) * share)))
    chosen = np.random.default_rng([seed, _HELD_OUT_STREAM]).permutation(len(distinct))[:count]
    held_out = {distinct[i] for i in chosen}
    return [p for p in prompts if p not in held_out], [p for p in distinct if p in held_out]


def load_sampler(config: PreferConfig | EvaluateConfig | GenerateConfig | RewardEvalConfig) -> CausalLM | RemoteLM:
    """The policy of settings that only want its responses and name one: a model, or a server that has one."""
    assert config.policy is not None
    if is_url(config.policy):
        return RemoteLM.connect(config.policy, config.server)
    return CausalLM.from_pretrained(config.policy, device=config.device, dtype=config.dtype)


def load_writer(
    config: WriterConfig, seed: int, load_model: Callable[[str], CausalLM] = CausalLM.from_pretrained
) -> Callable[[Sequence[str]], Sequence[str]]:
    """The language model of the settings as a function of texts, prompts → replies; a server is not yet asked."""
    assert config.model is not None
    if is_url(config.model):
        return chat_generator(
            config.model,
            config.served_name or "",
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=seed,
            at_once=config.at_once,
            http=config.http,
        )
    return text_generator(
        load_model(config.model),
        max_new_tokens=config.max_new_tokens,
        greedy=config.temperature == 0,
        temperature=config.temperature or 1.0,
        seed=seed,
        chat_template=read_chat_template(config.chat_template),
        num_rows=config.at_once,
    )


def load_reference(config: TrainConfig | EvaluateConfig) -> CausalLM | None:
    """The frozen reference, where the settings name one."""
    if config.reference is None:
        return None
    return CausalLM.from_pretrained(config.reference, device=config.device, dtype=config.dtype).requires_grad_(False)


def make_envs(
    env: EnvConfig,
    num_envs: int,
    prompts: Sequence[str],
    file: str,
    policy: CausalLM | RemoteLM,
    reward: RewardModel | ScoreFn,
    reference: Policy | None,
    beta: float | BetaController,
    kl_mode: KLMode = "reward",
) -> TextGenerationVectorEnv:
    """The batched environment of the settings; what is wrong with a prompt is told with the `file` it came from."""
    codec = Codec(policy.tokenizer, chat_template=read_chat_template(env.chat_template))
    if isinstance(reference, CausalLM) and Codec.of(reference.tokenizer).fingerprint != codec.fingerprint:
        raise TokenizerError("the reference has another vocabulary than the policy: KL between them means nothing")
    try:
        envs = TextGenerationVectorEnv(
            num_envs,
            prompts=prompts,
            tokenizer=codec,
            reward_model=reward,
            reference=reference,
            beta=beta,
            max_new_tokens=env.max_new_tokens,
            max_prompt_tokens=env.max_prompt_tokens,
            temperature=env.temperature,
            top_k=env.top_k,
            top_p=env.top_p,
            min_new_tokens=env.min_new_tokens,
            stop_strings=env.stop_strings,
            missing_eos_penalty=env.missing_eos_penalty,
            length_penalty=env.length_penalty,
            group_size=env.group_size,
            kl_mode=kl_mode,
            kl_placement=env.kl_placement,
        )
        if policy.context_length is not None and envs.task.observation_length > policy.context_length:
            raise PromptTooLongError(
                f"{envs.task.max_prompt_tokens} tokens of prompt and {env.max_new_tokens} of response exceed the "
                f"model's context of {policy.context_length}: shorten the prompts, or lower max_new_tokens"
            )
    except EmptyPromptError as error:
        raise EmptyPromptError(f"{file}: {error}") from None
    except PromptTooLongError as error:  # it knows the row among these prompts, not the line of the file
        longest = max(prompts, key=lambda prompt: len(codec.encode_prompt(prompt)))
        raise PromptTooLongError(f'{file}: {error}; the longest prompt begins "{safe_text(longest[:60])}"') from None
    return envs


def parse_device(name: str) -> torch.device:
    """The torch device called `name`, which must be there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}; `rlhf-env doctor` lists what there is") from error
    return device


def read_chat_template(setting: str) -> str:
    """ "auto" and "none" as they are, else the text of the Jinja file."""
    if setting in ("auto", "none"):
        return setting
    try:
        return Path(setting).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template must be auto, none or a Jinja file, and {setting!r}: {error}") from error
