"""Sampling 128 ragged responses, three ways, in one process: our decoder that refills rows, and `model.generate`.

    python benchmarks/decoding.py

A GPT-2 of one million parameters whose EOS has probability 1/16 at every token: responses of 16 tokens on average, at
most 64. 32 rows are decoded side by side; `generate` takes four batches of 32, each as long as its longest response.
All in one thread; process time per response token, medians of alternated rounds; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sampling import sample_responses
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import word_tokenizer
from rlhf_env.types import SamplingLaw

VOCAB, ROWS, RESPONSES, PROMPT, LONGEST, MEAN = 1000, 32, 128, 16, 64, 16


def make_policy() -> CausalLM:
    tokenizer = word_tokenizer(f"w{i}" for i in range(VOCAB - 4))
    config = tiny_config("gpt2", VOCAB, n_layer=4, n_embd=128, n_head=4, n_positions=PROMPT + LONGEST)
    policy = CausalLM.from_config(config, tokenizer).requires_grad_(False)
    body: Any = policy.model.transformer
    # The first hidden unit is always 1 and only EOS reads it, so that EOS has the same odds everywhere.
    body.ln_f.weight[0], body.ln_f.bias[0], body.wte.weight[:, 0] = 0.0, 1.0, 0.0
    body.wte.weight[tokenizer.eos_token_id, 0] = np.log((VOCAB - 1) / (MEAN - 1))
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    policy = make_policy()
    eos = policy.tokenizer.eos_token_id
    law = SamplingLaw(VOCAB, eos)
    prompts = np.random.default_rng(0).integers(0, VOCAB - 4, (RESPONSES, PROMPT))

    def refilled(seed: int) -> int:
        seeds = [(seed, i) for i in range(RESPONSES)]
        drawn = sample_responses(policy, prompts.tolist(), law, max_new_tokens=LONGEST, seeds=seeds, num_rows=ROWS)
        return int(drawn.response_mask.sum())

    def generated(seed: int, use_cache: bool) -> int:
        torch.manual_seed(seed)
        tokens, model = 0, policy.model
        law_of_ours = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        for batch in torch.from_numpy(prompts).split(ROWS):
            ids = model.generate(  # type: ignore[operator]
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=LONGEST,
                use_cache=use_cache,
                eos_token_id=eos,
                pad_token_id=policy.tokenizer.pad_token_id,
                **law_of_ours,
            )[:, PROMPT:]
            ends = (ids == eos).long()
            tokens += int((ends.cumsum(1) - ends == 0).sum())  # up to the first EOS, which counts
        return tokens

    contestants: dict[str, Callable[[int], int]] = {
        "rlhf-env: cache, refilled rows": refilled,
        "generate: cache": lambda seed: generated(seed, True),
        "generate: no cache": lambda seed: generated(seed, False),
    }
    costs: dict[str, list[float]] = {name: [] for name in contestants}
    for seed in range(rounds):
        for name, sample in contestants.items():
            began = time.process_time()
            tokens = sample(seed)
            costs[name].append((time.process_time() - began) / tokens)
    first = costs["rlhf-env: cache, refilled rows"]
    print(f"| {RESPONSES} responses | µs per token | tokens per second | time |\n|---|---|---|---|")
    for name, cost in costs.items():
        ratio = statistics.median(c / f for c, f in zip(cost, first, strict=True))
        each = statistics.median(cost)
        print(f"| {name} | {1e6 * each:.0f} | {1 / each:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
