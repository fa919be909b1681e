"""`rlhf_env/TextGeneration-v0`: bring your own prompts, models and reward; without any, a tiny random model."""

from __future__ import annotations

from functools import cache
from typing import Any

from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.envs.spaces import unshared
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.text.corpus import film_reviews, review_openings
from rlhf_env.text.tokenizers import word_tokenizer


def make_env(**kwargs: Any) -> TextGenerationEnv:
    """One environment; keywords are those of `TextGenerationEnv`."""
    return TextGenerationEnv(**_with_defaults(kwargs))


def make_vector_env(num_envs: int = 1, **kwargs: Any) -> TextGenerationVectorEnv:
    """`num_envs` environments in one batch; keywords are those of `TextGenerationVectorEnv`."""
    return TextGenerationVectorEnv(num_envs, **_with_defaults(kwargs))


@cache
def tiny_model() -> CausalLM:
    """A GPT-2 of random weights over the words of the built-in film reviews: one object, shared."""
    tokenizer = word_tokenizer(film_reviews())
    return CausalLM.from_config(tiny_config("gpt2", len(tokenizer)), tokenizer).requires_grad_(False)


def _with_defaults(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = unshared(kwargs)
    defaults: dict[str, Any] = {"prompts": review_openings(), "reward_model": VaderReward(), "max_new_tokens": 24}
    if "tokenizer" not in kwargs:
        # A model of the user's own comes with its own tokenizer.
        reference = kwargs.get("reference") or tiny_model()
        defaults |= {"tokenizer": reference.tokenizer, "reference": reference}
    elif kwargs.get("reference") is None:
        defaults["beta"] = 0.0
    return defaults | kwargs
