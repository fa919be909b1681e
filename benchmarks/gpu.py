"""Half a billion random weights on one GPU: sampling beside `model.generate`, and an iteration beside TRL's.

    python benchmarks/gpu.py                                       # bfloat16 on a GPU
    python benchmarks/gpu.py --trl                                 # GRPO, and TRL's, where TRL is installed
    python benchmarks/gpu.py --device cpu --dtype float32 --width 128 --layers 4 --responses 16 --tokens 16

A Llama of 24 layers of width 1,024 and 32,000 tokens. Responses all have the same number of tokens; four passes in four
minibatches. Time on the wall, once everything that was started is done; medians of alternated rounds. Ours keeps
float32 copies of bfloat16 weights for the optimizer, TRL does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from paired import Cost, Peer, begin, row, table, take_turns

from rlhf_env import TextGenerationVectorEnv
from rlhf_env.agents import GRPO, PPO, GRPOConfig, PPOConfig
from rlhf_env.models import decoding
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sampling import sample_responses
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import word_tokenizer
from rlhf_env.training.collect import collect
from rlhf_env.training.loop import train
from rlhf_env.types import SamplingLaw

PROMPT = 64


def on_the_wall(work: Any, device: torch.device) -> Cost:
    def cost() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return cost


def products(device: torch.device, dtype: str, size: int = 8192) -> float:
    """Operations per second of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    cost = on_the_wall(lambda: torch.mm(a, b), device)
    return 2 * size**3 / min(cost() for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    for name, default in (("width", 1024), ("layers", 24), ("vocab", 32_000), ("responses", 128), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trl", action="store_true", help="GRPO and TRL's, of this interpreter, instead of PPO")
    args = parser.parse_args()
    device, batch, tokens = torch.device(args.device), args.responses, args.tokens
    tokenizer = word_tokenizer(f"w{i}" for i in range(args.vocab - 4))
    sizes = {"n_layer": args.layers, "n_embd": args.width, "n_head": args.width // 64, "n_positions": PROMPT + tokens}
    config = tiny_config("llama", args.vocab, **sizes)
    policy = CausalLM.from_config(config, tokenizer, device=args.device, dtype=args.dtype)
    prompts = np.random.default_rng(0).integers(0, args.vocab - 4, (batch, PROMPT))

    def ours() -> None:
        seeds = [(i,) for i in range(batch)]
        law = SamplingLaw(args.vocab, None)
        sample_responses(policy, prompts.tolist(), law, max_new_tokens=tokens, seeds=seeds, num_rows=batch)

    def step_by_step() -> None:
        with patch.object(decoding, "Replay", lambda step, *_: step):
            ours()

    def generate() -> None:
        ids, model = torch.from_numpy(prompts).to(device), policy.model
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        law = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **lengths, **law)  # type: ignore

    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts.tolist()]
    envs = TextGenerationVectorEnv(
        batch,
        prompts=texts,
        tokenizer=tokenizer,
        reference=policy.frozen_copy(),
        reward_model=lambda prompts, responses: [float(len(set(r.split()))) for r in responses],
        max_new_tokens=tokens,
        stop_at_eos=False,
        beta=0.05,
    )
    usual: dict[str, Any] = {"batch_size": batch, "micro_batch_size": args.micro_batch}
    grouped = GRPOConfig(**usual, epochs=4, minibatches=4, group_size=8, kl="k3")
    name, agent = ("GRPO", GRPO(policy, grouped)) if args.trl else ("PPO", PPO(policy, PPOConfig(**usual)))
    updates = train(agent, envs, updates=10**6)
    rollout = collect(policy, envs, episodes=batch)
    contestants: dict[str, Cost] = {
        who: on_the_wall(work, device)
        for who, work in {
            "sampling": ours,
            "sampling, steps not replayed": step_by_step,
            "sampling by `generate`": generate,
            name: lambda: next(updates),
            f"{name}'s update alone": lambda: agent.update(rollout),
        }.items()
    }
    count = sum(p.numel() for p in policy.model.parameters())
    begin(device)
    print(f"{count:,} weights in {args.dtype}, {batch} responses of {tokens} tokens")
    with tempfile.TemporaryDirectory() as folder:
        if args.trl:
            policy.save_pretrained(Path(folder) / "policy")
            (Path(folder) / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
            more = ("--device", args.device, "--dtype", args.dtype)
            contestants["TRL's GRPO"] = Peer(Path(sys.executable), "grpo", Path(folder), tokens, *more)
        table("", "seconds", "tokens per second", "time")
        found = take_turns(contestants, args.rounds)
        for who, (middle, ratio) in found.items():
            row(who, f"{middle:.3f}", f"{batch * tokens / middle:,.0f}", f"{ratio:.2f}")
        operations = 4 * 6 * count * batch * (PROMPT + tokens)  # four passes, 6 for each weight and token
        rate = operations / found[f"{name}'s update alone"][0]
        most = products(device, args.dtype)
        print(f"\nin the update: {rate / 1e12:.1f} TFLOP/s, of {most / 1e12:.1f} in products of 8192")
        if device.type == "cuda":
            print(f"peak memory: {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB", end="")
            if isinstance(peer := contestants.get("TRL's GRPO"), Peer):
                print(f"; TRL's GRPO {peer.peak() / 1e3:.1f} GB", end="")
            print()


if __name__ == "__main__":
    main()
