"""Small real objects for tests: random models, rollouts, environments. Each test states only what is odd about it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import Rollout, SamplingLaw

ALPHABET = "abcdefgh"
EOS = 9  # a … h are 0 … 7, then <bos> <eos> <pad>
PROMPTS = ("abc", "d", "efghab", "ca")


@cache
def _model(family: str, dtype: str, seed: int) -> CausalLM:
    tokenizer = char_tokenizer(ALPHABET)  # 8 letters and three special tokens: 11 ids
    config = tiny_config(family, len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=64)  # type: ignore[arg-type]
    config.initializer_range = 0.3  # far from uniform, so that a wrong position or mask shows
    return CausalLM.from_config(config, tokenizer, seed=seed, dtype=dtype)


def random_model(family: str = "gpt2", *, dtype: str = "float32", seed: int = 0) -> CausalLM:
    """A tiny model with large random weights over eight letters; a fresh copy each time."""
    return _model(family, dtype, seed).frozen_copy().requires_grad_(True)


#: How a model of a family that is known in blocks may be read.
PATHS = ("blocks", "Hugging Face")


def read_by(policy: CausalLM, path: str) -> CausalLM:
    """The policy, read block by block or, for a hook that nobody must pass over, by Hugging Face's forward."""
    if path == "Hugging Face":
        policy.model.register_forward_hook(lambda *_: None)
    assert (policy.body is None) == (path == "Hugging Face")
    return policy


@cache
def _frozen_model() -> CausalLM:
    return random_model().requires_grad_(False)  # one object: nobody trains a reference


def make_rollout(
    policy: CausalLM,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    left: int = 0,
    right: int = 0,
) -> Rollout:
    """Episodes of given token ids with `left` and `right` columns of extra padding; log-probabilities are zeros."""
    b, p, t = len(prompts), max(map(len, prompts)) + left, max(map(len, responses)) + right
    prompt_ids, response_ids = torch.zeros(b, p, dtype=torch.int64), torch.zeros(b, t, dtype=torch.int64)
    prompt_mask, response_mask = torch.zeros(b, p, dtype=torch.bool), torch.zeros(b, t, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        prompt_ids[i, p - len(prompt) :], prompt_mask[i, p - len(prompt) :] = torch.tensor(prompt), True
        response_ids[i, : len(response)], response_mask[i, : len(response)] = torch.tensor(response), True
    zeros, ones = torch.zeros(b, t), torch.zeros(b)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        logp=zeros,
        ref_logp=zeros,
        values=zeros,
        reward=zeros,
        score=ones,
        penalty=ones,
        beta=ones,
        ended=torch.ones(b, dtype=torch.bool),
        law=SamplingLaw(len(policy.tokenizer), policy.tokenizer.eos_token_id),
    )


def letter_score(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that depends on prompt, order and length, so that a mix-up of rows or a lost token shows."""
    return [
        sum((1 + 0.1 * i) * (ord(c) - 100) / 7 for i, c in enumerate(r)) + 0.01 * len(p)
        for p, r in zip(prompts, responses, strict=True)
    ]


def make_envs(num_envs: int = 3, **kwargs: Any) -> TextGenerationVectorEnv:
    """A batched environment over the letters with a random reference."""
    reference = kwargs.pop("reference", _frozen_model())
    defaults: dict[str, Any] = {
        "prompts": PROMPTS,
        "tokenizer": _frozen_model().tokenizer,
        "reward_model": letter_score,
        "reference": reference,
        "beta": 0.3,
        "max_new_tokens": 6,
    }
    return TextGenerationVectorEnv(num_envs, **(defaults | kwargs))


def make_env(**kwargs: Any) -> TextGenerationEnv:
    """One environment over the letters with a random reference."""
    reference = kwargs.pop("reference", _frozen_model())
    defaults: dict[str, Any] = {
        "prompts": PROMPTS,
        "tokenizer": _frozen_model().tokenizer,
        "reward_model": letter_score,
        "reference": reference,
        "beta": 0.3 if reference else 0.0,
        "max_new_tokens": 6,
    }
    return TextGenerationEnv(**(defaults | kwargs))
