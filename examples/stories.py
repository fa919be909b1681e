"""PPO on a real pretrained model: happier stories, at what KL, and what happens without the KL term.

    python examples/stories.py --model FOLDER --out runs/stories --seeds 0 1 2

FOLDER is a Hugging Face folder of karpathy's stories260K (or any small story model). For each seed: our PPO and
Stable-Baselines3's with the KL term, our PPO without it at that learning rate and at ten times it; beside them
best-of-n from the model itself. The score is the VADER sentiment of the response, on openings that training never saw.
Every run leaves its folder under --out; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from rlhf_env.functional import best_of_n
from rlhf_env.records.jsonl import read_json, read_jsonl
from rlhf_env.records.safe_text import safe_text
from rlhf_env.training.assemble import assemble
from rlhf_env.training.collect import collect
from rlhf_env.training.config import EnvConfig, TrainConfig
from rlhf_env.training.run import run_training

HERE = Path(__file__).parent


def settings(model: str, agent: str, beta: float, rate: float, seed: int, tokens: int) -> TrainConfig:
    shared = {"learning_rate": rate, "max_grad_norm": 1.0}
    ours = {**shared, "batch_size": 256, "epochs": 1, "lam": 1.0}
    # The same amount per update: 96 steps of 128 environments are 256 responses; a quarter of them per minibatch.
    theirs = {**shared, "n_steps": 96, "batch_size": 3072, "n_epochs": 1, "gae_lambda": 1.0, "vf_coef": 0.05}
    return TrainConfig(
        policy=model,
        prompts=str(HERE / "story_openings.txt"),
        eval_prompts=str(HERE / "story_openings_held_out.txt"),
        reward="vader",
        agent=agent,
        tokens=tokens,
        seed=seed,
        num_envs=128,
        eval_episodes=384,
        eval_every=4,
        env=EnvConfig(beta=beta, max_new_tokens=48),
        settings=theirs if agent.startswith("sb3:") else ours,
    )


def print_best_of(config: TrainConfig, draws: int) -> None:
    """Best of n by the score, estimated from `draws` responses per prompt, and the upper bound of its KL."""
    parts = assemble(config)
    prompts = parts.eval_envs.task.prompts
    rollout = collect(parts.policy, parts.eval_envs, [p for p in prompts for _ in range(draws)], seed=12345)
    for n in (1, 4, 16, 64):
        mean = best_of_n(rollout.score.reshape(len(prompts), draws), n)
        half = 1.96 * float(mean.std()) / math.sqrt(len(prompts))
        print(f"best of {n:<3}          {mean.mean():6.3f} ± {half:.3f}   KL ≤ {math.log(n) - (n - 1) / n:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--beta", type=float, default=0.03)
    parser.add_argument("--tokens", type=int, default=400_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_best_of(settings(args.model, "ppo", args.beta, 1e-4, 0, args.tokens), draws=128)
    print(
        f"{'agent':<8}{'β':>5}{'rate':>8}{'seed':>5}   {'score [95 %]':<22}{'KL':>7}  distinct-2  path: (KL, score) …"
    )
    rows = [("ppo", args.beta, 1e-4), ("sb3:PPO", args.beta, 1e-4), ("ppo", 0.0, 1e-4), ("ppo", 0.0, 1e-3)]
    for agent, beta, rate in rows:
        for seed in args.seeds:
            out = args.out / f"{agent.replace(':', '-')}-beta{beta}-rate{rate}-seed{seed}"
            if not (out / "summary.json").exists():
                run_training(settings(args.model, agent, beta, rate, seed, args.tokens), out)
            s = read_json(out / "summary.json")
            path = [r for r in read_jsonl(out / "metrics.jsonl") if "eval_kl" in r]
            text = " ".join(f"({r['eval_kl']:.1f}, {r['eval_score']:.2f})" for r in path)
            interval = f"{s['score_after']:.3f} [{s['score_after_low']:.3f}, {s['score_after_high']:.3f}]"
            print(
                f"{agent:<8}{beta:>5}{rate:>8}{seed:>5}   {interval:<22}{s['kl']:>7.2f}  {s['distinct_2']:.3f}  {text}"
            )
            sample = read_jsonl(out / "samples.jsonl")[0]
            print(f"    {safe_text(sample['prompt'])} | {safe_text(sample['after'])}", flush=True)


if __name__ == "__main__":
    main()
