"""Whole episodes at once: cached sampling, then one pass of the reference and of the reward model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_env import processes
from rlhf_env.envs.binding import find_cores
from rlhf_env.envs.core import TokenMDP
from rlhf_env.envs.task import TextTask
from rlhf_env.errors import ConfigError, NegativeKLWarning, PromptTooLongError, TokenizerError
from rlhf_env.functional import token_rewards
from rlhf_env.models.sampling import Responder, Samples, sample_responses
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.models.sharding import gathered
from rlhf_env.text.codec import Codec
from rlhf_env.types import Policy, Rollout

_SAMPLING_STREAM = 1  # keeps the random numbers of sampling apart from those that shuffle the prompts


def collect(
    policy: Policy | Responder,
    envs: Any,
    prompts: Sequence[str] | None = None,
    *,
    episodes: int | None = None,
    seed: int = 0,
    start: int = 0,
    group_size: int | None = None,
    stream: int = 0,
    greedy: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Finished episodes of `policy` under the law of `envs`, in the order of their prompts.

    The same episodes that stepping the environment would give, and the same rewards, without stepping it. With
    `prompts`, one episode for each; otherwise `episodes` of the environment's own prompts, from position `start` of
    their endlessly reshuffled order, where each stands `group_size` times in a row (none: as the environment says).
    Episode i depends only on `seed`, `start + i`, its prompt and `stream`, whose number keeps independent answers to
    the same prompts apart. `envs` is a `TextGenerationVectorEnv` (its `num_envs` rows are decoded side by side) or any
    wrapper of one. A policy that is a `Responder` is asked for its responses. `progress` is told how many more episodes
    are finished.

    Where several `processes` work together, each writes and scores its share, and all of them get all episodes.
    """
    core = find_cores(envs)[0]
    task = core.task
    if task.length_limit == "truncate":
        raise ConfigError("collect scores every response, so the environment needs length_limit='terminate'")
    if prompts is None:
        if episodes is None:
            raise ConfigError("collect needs prompts, or how many episodes of the environment's own prompts")
        size = group_size or task.group_size
        if start % size or episodes % size:
            raise ConfigError(
                f"{episodes} episodes from position {start} cut groups of {size} apart: collect, and an agent's "
                "batch_size, must be multiples of group_size"
            )
        prompts, prompt_ids = task.prompts_at(seed, start, episodes, size)
    else:
        if isinstance(prompts, str):
            raise ConfigError("prompts must be a sequence of texts, not one string")
        prompt_ids = [task.encode_prompt(prompt, where=f"prompt {row}") for row, prompt in enumerate(prompts)]
    if not prompt_ids:
        raise ConfigError("collect needs at least one prompt")
    _require_same_vocabulary(policy, task.codec)
    limits = [task.longest(len(ids)) for ids in prompt_ids]
    context = getattr(policy, "context_length", None)
    for ids, limit in zip(prompt_ids, limits, strict=True):
        if context is not None and len(ids) + limit > context:
            raise PromptTooLongError(
                f"{len(ids)} tokens of prompt and {limit} of response exceed the policy's context of {context}"
            )

    if len(prompts) < processes.count():
        raise ConfigError(f"{len(prompts)} episodes cannot be shared among {processes.count()} processes")
    mine = processes.share(len(prompts))
    seeds = [(seed, start + i, _SAMPLING_STREAM, *([stream] if stream else [])) for i in range(len(prompts))]

    answer = policy.sample_responses if isinstance(policy, Responder) else partial(sample_responses, policy)

    def written() -> Rollout:
        samples = answer(
            prompt_ids[mine],
            task.law,
            max_new_tokens=limits[mine],
            seeds=seeds[mine],
            num_rows=core.num_slots,
            greedy=greedy,
            reference=task.reference,
            stop=task.says_stop if task.stop_strings else None,
            progress=progress,
            first=mine.start,
        )
        return _charged(policy, core, prompts[mine], prompt_ids[mine], samples)

    device = getattr(policy, "device", torch.device("cpu"))
    with gathered():
        own = processes.agreed(written)
    parts = processes.gather(own.to("cpu" if processes.count() > 1 else device))
    rollout = Rollout.joined(parts, task.codec.pad_token_id).to(device)
    if task.uses_reference and task.kl_mode != "off":
        rollout.require_finite()
        # The log-ratio of the most probable tokens is no estimate of the KL, and the reference's own KL steers nothing.
        if not greedy and policy is not task.reference:
            _alarm_on_negative(rollout.kl)
            core.observe_kl(rollout.kl.tolist())
    return rollout


def _charged(
    policy: Policy | Responder,
    core: TokenMDP,
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    samples: Samples,
) -> Rollout:
    """Sampled responses with what the reward model and the reference say of them."""
    task, ended = core.task, samples.ended
    responses = [row[m].tolist() for row, m in zip(samples.response_ids, samples.response_mask, strict=True)]
    lengths = samples.response_mask.numpy().sum(1)
    score, _ = task.score(prompts, prompt_ids, responses)
    token_score = torch.zeros_like(samples.logp)
    if task.scores_tokens:
        said = task.token_scores(prompts, prompt_ids, responses)
        for row, numbers in enumerate(said):
            token_score[row, : len(numbers)] = torch.from_numpy(numbers)
    penalty = sum(task.penalties(ended.numpy(), lengths).values(), np.zeros(len(responses)))
    padded, mask = left_padded_prompts(prompt_ids, task.codec.pad_token_id)
    rollout = Rollout(
        prompt_ids=padded,
        prompt_mask=mask,
        response_ids=torch.where(samples.response_mask, samples.response_ids, task.codec.pad_token_id),
        response_mask=samples.response_mask,
        logp=samples.logp,
        ref_logp=samples.logp,  # without a reference the KL is 0
        values=samples.values,
        reward=torch.zeros_like(samples.logp),
        score=torch.from_numpy(score).to(samples.logp.dtype) + token_score.sum(1),
        penalty=torch.from_numpy(penalty).to(samples.logp.dtype),
        beta=torch.full_like(samples.logp[:, 0], core.beta),
        ended=ended,
        law=task.law,
        candidates=samples.candidates,
    ).to(getattr(policy, "device", "cpu"))
    if task.uses_reference and task.kl_mode != "off":
        assert task.reference is not None
        rollout = dataclasses.replace(rollout, ref_logp=teacher_forced_logp(task.reference, rollout))
    return dataclasses.replace(rollout, reward=_rewards(task, rollout, token_score.to(rollout.logp)))


def left_padded_prompts(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] and mask [B, P] of prompts of unequal length."""
    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), pad, dtype=np.int64), np.zeros((len(prompts), width), dtype=np.bool_)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, True
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _require_same_vocabulary(policy: Policy | Responder, codec: Codec) -> None:
    own = getattr(policy, "tokenizer", codec.tokenizer)
    if own is not codec.tokenizer and Codec.of(own).fingerprint != codec.fingerprint:
        raise TokenizerError("the policy has another vocabulary than the environment: its token ids mean other text")


def _alarm_on_negative(kl: Tensor) -> None:
    """Warn where the mean of log π − log ref is below 0 by more than three standard errors (and by 0.05 nats).

    Of fewer than 16 episodes the standard error itself is a guess: two alike would alarm one time in ten.
    """
    mean = float(kl.mean())
    error = float(kl.std()) / len(kl) ** 0.5 if len(kl) >= 16 else float("inf")
    if mean < -max(3 * error, 0.05):
        warnings.warn(
            f"the mean KL to the reference is {mean:.3f} ± {error:.3f} nats, and no true KL is negative: the sampler "
            "does not draw from the distribution that its log-probabilities describe, or policy and reference follow "
            "different laws; training on it drives the policy away",
            NegativeKLWarning,
            stacklevel=3,
        )


def _rewards(task: TextTask, rollout: Rollout, token_score: Tensor) -> Tensor:
    """What the agent receives at each token, [B, T]; `token_score` [B, T] is what a process reward said of it."""
    worth, mask = rollout.score - token_score.sum(1) - rollout.penalty, rollout.response_mask
    if task.kl_mode == "reference":
        rewards = token_rewards(worth, torch.zeros_like(rollout.logp), rollout.ref_logp, mask, rollout.beta)
    else:
        beta = rollout.beta if task.kl_mode == "reward" else 0.0
        rewards = token_rewards(worth, rollout.logp, rollout.ref_logp, mask, beta, placement=task.kl_placement)
    return rewards + token_score
