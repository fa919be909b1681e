"""What there is to gain beyond doing the same work faster: PPO with less work, beside our own plain PPO.

    python benchmarks/below_the_floor.py

The iteration of `iteration.py`: 32 prompts of 16 tokens, 32 tokens each, four passes in four minibatches. In one
thread; process time, medians of alternated rounds; ratios to plain PPO are taken within a round. Peak memory is that of
two iterations in a process of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from iteration import SIZES, Iterate, Work
from paired import begin, peak, row, seconds, table, take_turns

from rlhf_env.models.adapters import add_lora
from rlhf_env.models.causal_lm import CausalLM


def half_frozen(work: Work, *, again: bool) -> Iterate:
    policy = work.lm().freeze_layers(work.layers // 2)
    if again:  # what the frozen half makes of the episodes is made in every pass
        policy.begin = lambda rollout: None
    return work.ours(policy=policy)


def half_precision(work: Work) -> Iterate:
    policy = CausalLM.from_config(work.config(), work.tokenizer, dtype="bfloat16")
    return work.ours(policy=policy, envs=work.envs(reference=policy.frozen_copy()))


def lora(work: Work, *, shared: bool) -> Iterate:
    policy = add_lora(work.lm())
    reference = policy.without_adapters() if shared else work.lm().requires_grad_(False)
    return work.ours(policy=policy, envs=work.envs(reference=reference))


WAYS: dict[str, Callable[[Work], Iterate]] = {
    "plain": Work.ours,
    "8 responses to a prompt, which is read once": lambda work: work.ours(envs=work.envs(group_size=8)),
    "embeddings and half of the layers frozen, read in every pass": lambda work: half_frozen(work, again=True),
    "the same, read once": lambda work: half_frozen(work, again=False),
    "bfloat16": half_precision,
    "LoRA, the reference a copy": lambda work: lora(work, shared=False),
    "LoRA, the reference the same weights without it": lambda work: lora(work, shared=True),
    "gradient checkpointing": lambda work: work.ours(policy=work.lm().checkpoint_gradients()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=WAYS, help="run two iterations of one and print its peak memory")
    args = parser.parse_args()
    if args.only:
        torch.set_num_threads(1)
        iterate = WAYS[args.only](Work(args.sizes[0], 32, 32))
        for _ in range(2):
            iterate()
        print(peak())
        return
    begin()
    table("model", "PPO", "seconds", "ratio", "peak memory, MB")
    for size in args.sizes:
        work = Work(size, 32, 32)
        found = take_turns({name: seconds(way(work)) for name, way in WAYS.items()}, args.rounds)
        for name, (middle, ratio) in found.items():
            words = [sys.executable, __file__, "--sizes", size, "--only", name]
            memory = int(subprocess.run(words, check=True, capture_output=True).stdout)
            row(size, name, f"{middle:.3f}", f"{ratio:.2f}", memory)


if __name__ == "__main__":
    main()
