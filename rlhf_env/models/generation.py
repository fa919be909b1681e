"""A causal language model as a function of texts: prompts → responses, and prompts → log-odds of two words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_env.errors import DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sampling import sample_responses
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.text.codec import Codec
from rlhf_env.text.prompts import hash_fraction
from rlhf_env.types import Rollout, SamplingLaw


def text_generator(
    model: CausalLM,
    *,
    max_new_tokens: int,
    greedy: bool = True,
    temperature: float = 1.0,
    seed: int = 0,
    chat_template: str | None = "auto",
    num_rows: int = 32,
) -> Callable[[Sequence[str]], list[str]]:
    """A function from prompts to the model's responses, up to EOS or `max_new_tokens`.

    A response depends on the seed and the text of its prompt alone: the same prompt gets the same response. `DataError`
    names the prompt that leaves no room in the model's context. `chat_template` is that of `Codec`.
    """
    codec = Codec(model.tokenizer, chat_template=chat_template)
    law = SamplingLaw(codec.vocab_size, codec.require_eos(), temperature)

    def generate(prompts: Sequence[str]) -> list[str]:
        if not prompts:
            return []
        ids = [codec.encode_prompt(prompt) for prompt in prompts]
        _require_room(model, [len(those) + max_new_tokens for those in ids])
        drawn = sample_responses(
            model,
            ids,
            law,
            max_new_tokens=max_new_tokens,
            seeds=[[seed, int(hash_fraction(prompt) * 2**53)] for prompt in prompts],
            num_rows=num_rows,
            greedy=greedy,
        )
        rows = zip(drawn.response_ids, drawn.response_mask, strict=True)
        return codec.decode_responses(ids, [row[mask].tolist() for row, mask in rows])

    return generate


def continuation_log_odds(
    model: CausalLM, first: str = "A", second: str = "B", *, chat_template: str | None = "auto"
) -> Callable[[Sequence[str]], NDArray[np.float64]]:
    """A function from prompts to log P(`first` | prompt) − log P(`second` | prompt), [B] in nats.

    P is of all tokens of the continuation, and of nothing after it; so compare continuations of equally many tokens.
    """
    codec = Codec(model.tokenizer, chat_template=chat_template)
    law = SamplingLaw(codec.vocab_size, codec.eos_token_id)

    def log_odds(prompts: Sequence[str]) -> NDArray[np.float64]:
        if not prompts:
            return np.zeros(0)
        ids = [codec.encode_prompt(prompt) for prompt in prompts]
        both = [
            [codec.encode_response(those, prompt, word) for those, prompt in zip(ids, prompts, strict=True)]
            for word in (first, second)
        ]
        longest = [max(len(a), len(b)) for a, b in zip(*both, strict=True)]
        _require_room(model, [len(those) + more for those, more in zip(ids, longest, strict=True)])
        logp = [
            teacher_forced_logp(model, Rollout.of_tokens(ids, words, law)).sum(1).double().numpy(force=True)
            for words in both
        ]
        return logp[0] - logp[1]

    return log_odds


def _require_room(model: CausalLM, lengths: Sequence[int]) -> None:
    most = model.context_length
    for row, length in enumerate(lengths):
        if most is not None and length > most:
            raise DataError(
                f"prompt {row} and what is written after it are {length} tokens, but the model reads {most}: use "
                "shorter texts or a shorter template, or a model with a longer context"
            )
