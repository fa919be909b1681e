"""Sampling 128 ragged responses, in one process: our decoder in three ways, and `model.generate`.

    python benchmarks/decoding.py

A GPT-2 of one million parameters whose EOS has the same probability at every token: responses of 16 tokens on average,
at most 64, and of 32, at most 128. 32 rows are decoded side by side. In lockstep, and in `generate`, there are four
batches of 32, each decoded until its longest response is finished; ours are the same responses in all three ways. All
in one thread; process time per response token, medians of alternated rounds; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from paired import Cost, begin, row, table, take_turns

from rlhf_env.functional import gather_logp, inverse_cdf_sample
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sampling import sample_responses
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.codec import Codec
from rlhf_env.text.tokenizers import word_tokenizer
from rlhf_env.types import SamplingLaw

VOCAB, ROWS, RESPONSES, PROMPT = 1000, 32, 128, 16
LENGTHS = ((16, 64), (32, 128))  # tokens on average, but for the limit, and at most


class Samplers:
    """Ways to sample the responses to 128 prompts; each returns how many tokens they have."""

    def __init__(self, mean: int, longest: int) -> None:
        tokenizer = word_tokenizer(f"w{i}" for i in range(VOCAB - 4))
        config = tiny_config("gpt2", VOCAB, n_layer=4, n_embd=128, n_head=4, n_positions=PROMPT + longest)
        self.policy = CausalLM.from_config(config, tokenizer).requires_grad_(False)
        body: Any = self.policy.model.transformer
        # The first hidden unit is always 1 and only EOS reads it, so that EOS has the same odds everywhere.
        body.ln_f.weight[0], body.ln_f.bias[0], body.wte.weight[:, 0] = 0.0, 1.0, 0.0
        body.wte.weight[tokenizer.eos_token_id, 0] = np.log((VOCAB - 1) / (mean - 1))
        self.longest, self.eos = longest, Codec.of(tokenizer).eos_token_id
        self.law = SamplingLaw(VOCAB, self.eos)
        self.prompts = np.random.default_rng(0).integers(0, VOCAB - 4, (RESPONSES, PROMPT))

    @torch.no_grad()
    def lockstep(self, seed: int) -> int:
        tokens = 0
        for numbers in np.arange(RESPONSES).reshape(-1, ROWS):
            uniform = [np.random.default_rng([seed, i]).random(self.longest, dtype=np.float32) for i in numbers]
            uniform = torch.from_numpy(np.stack(uniform))
            decoder = self.policy.decoder(ROWS, self.law)
            decoder.start(range(ROWS), self.prompts[numbers].tolist())
            going = np.ones(ROWS, dtype=np.bool_)
            for t in range(self.longest):
                drawn = inverse_cdf_sample(decoder.log_probs, uniform[:, t])
                gather_logp(decoder.log_probs, drawn)
                tokens += int(going.sum())
                going &= drawn.numpy() != self.eos
                if not going.any() or t == self.longest - 1:
                    break
                decoder.append(drawn.numpy(), range(ROWS))
        return tokens

    def dropped(self, seed: int) -> int:
        return sum(self._ours(seed, numbers) for numbers in np.arange(RESPONSES).reshape(-1, ROWS))

    def refilled(self, seed: int) -> int:
        return self._ours(seed, np.arange(RESPONSES))

    def generate(self, seed: int, use_cache: bool = True) -> int:
        torch.manual_seed(seed)
        tokens, model = 0, self.policy.model
        law_of_ours = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        for batch in torch.from_numpy(self.prompts).split(ROWS):
            ids = model.generate(  # type: ignore[operator]
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=self.longest,
                use_cache=use_cache,
                eos_token_id=self.eos,
                pad_token_id=self.policy.tokenizer.pad_token_id,
                **law_of_ours,
            )[:, PROMPT:]
            ends = (ids == self.eos).long()
            tokens += int((ends.cumsum(1) - ends == 0).sum())  # up to the first EOS, which counts
        return tokens

    def _ours(self, seed: int, numbers: np.ndarray) -> int:
        drawn = sample_responses(
            self.policy,
            self.prompts[numbers].tolist(),
            self.law,
            max_new_tokens=self.longest,
            seeds=[(seed, i) for i in numbers.tolist()],
            num_rows=ROWS,
        )
        return int(drawn.response_mask.sum())


def per_token(sample: Callable[[int], int]) -> Cost:
    seeds = count()

    def cost() -> float:
        began = time.process_time()
        tokens = sample(next(seeds))
        return (time.process_time() - began) / tokens

    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    begin()
    for mean, longest in LENGTHS:
        samplers = Samplers(mean, longest)
        ways: dict[str, Callable[[int], int]] = {
            "ours, lockstep": samplers.lockstep,
            "ours, finished rows dropped": samplers.dropped,
            "ours, refilled": samplers.refilled,
            "`generate`": samplers.generate,
        }
        if (mean, longest) == LENGTHS[0]:  # minutes, of longer ones
            ways["`generate` without a cache"] = lambda seed, s=samplers: s.generate(seed, use_cache=False)
        assert len({ways[name](0) for name in list(ways)[:3]}) == 1, "ours are the same responses"
        table(f"{RESPONSES} responses, mean {mean}, at most {longest}", "µs per token", "tokens per second", "time")
        found = take_turns({name: per_token(sample) for name, sample in ways.items()}, rounds)
        for name, (cost, ratio) in found.items():
            row(name, f"{1e6 * cost:.0f}", f"{1 / cost:,.0f}", f"{ratio:.2f}")


if __name__ == "__main__":
    main()
