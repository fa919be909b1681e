"""TRL at the same work as `iteration.py`, in its own environment: one iteration for each line that comes in.

Started by `iteration.py` and `gpu.py`. Reads "go" lines and answers each with the seconds that the iteration took, of
process time on a CPU and on the wall on a GPU; at the end of the input, with the peak memory in MB.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true"}

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)


class Turns(TrainerCallback):
    """Before every iteration of `steps` optimizer steps waits for its turn; after it says how long it took."""

    def __init__(self, steps: int, answers: Any, device: torch.device) -> None:
        self.steps, self.answers, self.device, self.began = steps, answers, device, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            print(self.now() - self.began, file=self.answers, flush=True)
            self.wait()

    def wait(self) -> None:
        if not sys.stdin.readline():
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak = torch.cuda.max_memory_allocated() / 1e6 if self.device.type == "cuda" else kilobytes / 1024
            print(int(peak), file=self.answers, flush=True)
            os._exit(0)
        self.began = self.now()

    def now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithm", choices=("grpo", "rloo", "ppo"))
    parser.add_argument("folder", help="of policy/, reward/ and prompts.txt")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with open(f"{args.folder}/prompts.txt", encoding="utf-8") as file:
        prompts = file.read().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(f"{args.folder}/policy", padding_side="left")

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(f"{args.folder}/policy", dtype=dtype)

    def reward() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(f"{args.folder}/reward", num_labels=1).eval()

    batch = len(prompts)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "learning_rate": 1e-4,
        "per_device_train_batch_size": batch // 4,
        "gradient_accumulation_steps": 1,
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    if args.algorithm == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

        # A PPOTrainer's step is a whole iteration: as many passes as `num_ppo_epochs` in its minibatches.
        config = PPOConfig(
            **common,
            num_ppo_epochs=4,
            num_mini_batches=4,
            total_episodes=batch * 10_000,
            local_rollout_forward_batch_size=batch,
            response_length=args.tokens,
            stop_token=None,
            kl_coef=0.05,
            num_sample_generations=0,
        )
        config.per_device_train_batch_size = batch
        rows = [{"input_ids": tokenizer(p)["input_ids"]} for p in prompts]
        trainer: Any = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy(),
            ref_model=policy(),
            reward_model=reward(),
            value_model=reward(),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            callbacks=[Turns(1, answers, device)],
        )
    else:
        import trl  # type: ignore[import-not-found]

        scorer = reward() if (Path(args.folder) / "reward").is_dir() else None

        @torch.no_grad()
        def score(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            if scorer is None:
                return [float(len(set(ids))) for ids in completion_ids]
            ids = torch.tensor([tokenizer(p)["input_ids"] + c for p, c in zip(prompts, completion_ids, strict=True)])
            return scorer(ids).logits[:, 0].tolist()

        kind = args.algorithm.upper()
        parts = 4 if kind == "GRPO" else 1  # of a batch, and passes over it
        common["per_device_train_batch_size"] = batch // parts
        config = getattr(trl, f"{kind}Config")(
            **common,
            max_steps=10**6,
            num_generations=8 if kind == "GRPO" else 4,
            steps_per_generation=parts,
            num_iterations=parts,
            max_completion_length=args.tokens,
            beta=0.05,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            generation_kwargs={"min_new_tokens": args.tokens},
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=policy(),
            reward_funcs=score,
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[Turns(parts * parts, answers, device)],
        )
    trainer.train()


if __name__ == "__main__":
    main()
