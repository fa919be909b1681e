"""PPO through a learned reward on a real pretrained model: how many comparisons does it take?

    python examples/learned_proxy.py --model FOLDER --out runs/proxy --seeds 0 1 2

FOLDER is a Hugging Face folder of karpathy's stories260K (or any small story model). The gold reward is VADER
sentiment. For each seed, 3,000 comparisons are made by a labeler with noise; reward models learn from the first 100,
300, 1,000 and all of them, and PPO maximises each. Beside them: PPO on gold itself, and best-of-n by each reward.
β is the same for all rewards in units of their standard deviation on the reference's responses. Every pipeline
leaves its folder under --out; a finished one is not run again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rlhf_env.preferences.comparisons import read_comparisons, write_comparisons
from rlhf_env.preferences.labelers import utilities_of
from rlhf_env.records.jsonl import read_json, read_jsonl
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.training.config import EnvConfig, PipelineConfig
from rlhf_env.training.pipeline import run_pipeline

HERE = Path(__file__).parent
BETA = 0.05  # per standard deviation of the reward


def settings(model: str, comparisons: int, seed: int, tokens: int) -> PipelineConfig:
    ppo = {"learning_rate": 1e-4, "batch_size": 256, "epochs": 1, "lam": 1.0, "max_grad_norm": 1.0}
    return PipelineConfig(
        policy=model,
        prompts=str(HERE / "story_openings.txt"),
        eval_prompts=str(HERE / "story_openings_held_out.txt"),
        gold="vader",
        seed=seed,
        num_envs=128,
        env=EnvConfig(beta=BETA, max_new_tokens=48),
        prefer={"comparisons": comparisons, "labeler": {"temperature": 0.25}},
        reward={"fit": {"learning_rate": 1e-3, "epochs": 2}},
        train={"tokens": tokens, "eval_every": 5, "settings": ppo},
        evaluate={"episodes": 384, "best_of": 64},
    )


def gold_at(out: Path, kl: float) -> float:
    """Gold where the path of evaluations from the reference to the trained policy crosses a KL; NaN beyond its end."""
    s, rows = read_json(out / "train" / "summary.json"), read_jsonl(out / "train" / "metrics.jsonl")
    path = [(0.0, s["gold_before"]), *((row["eval_kl"], row["eval_gold"]) for row in rows if "eval_kl" in row)]
    kls, golds = zip(*sorted([*path, (s["kl"], s["gold_after"])]), strict=True)
    return float(np.interp(kl, kls, golds, right=np.nan))


def print_row(name: str, seed: int, out: Path) -> None:
    s, rows = read_json(out / "summary.json"), read_json(out / "evaluate" / "summary.json")["best_of"]
    accuracy = [f"{s.get(f'reward_model_{kind}', np.nan):.3f}" for kind in ("accuracy", "gold_accuracy")]
    cells = [f"{name:>5} {seed:>4}", *accuracy, f"{s['gold_before']:.3f} →"]
    cells += [f"{s['gold_after']:.3f} [{s['gold_after_low']:.3f}, {s['gold_after_high']:.3f}]", f"{s['kl']:5.2f}"]
    cells += [f"{s['proxy_before']:5.2f} → {s['proxy_after']:4.2f}", *(f"{gold_at(out, kl):5.3f}" for kl in (2, 4))]
    print("  ".join(cells + [f"{row['gold']:.3f}" for row in rows if row["n"] in (4, 16, 64)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3000, 1000, 300, 100], help="the largest one first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("reward seed  accuracy: labels, gold  gold  KL  proxy  gold at 2 and 4 nats  gold of the best of 4, 16, 64")
    for seed in args.seeds:
        config = settings(args.model, args.sizes[0], seed, args.tokens)
        full = args.out / f"proxy-{args.sizes[0]}-seed{seed}"
        run_pipeline(config, full)
        print_row(str(args.sizes[0]), seed, full)
        comparisons = read_comparisons(full / "prefer" / "comparisons.jsonl")
        for size in args.sizes[1:]:
            file = args.out / f"first-{size}-seed{seed}.jsonl"
            write_comparisons(file, comparisons[:size])
            out = args.out / f"proxy-{size}-seed{seed}"
            run_pipeline(replace(config, comparisons=str(file), prefer={}), out)
            print_row(str(size), seed, out)
        gold = utilities_of(VaderReward(), [c.prompt for c in comparisons], [c.responses for c in comparisons])
        spread = float(torch.tensor([u for those in gold for u in those]).std())
        env, out = replace(config.env, beta=round(BETA * spread, 4)), args.out / f"gold-seed{seed}"
        run_pipeline(replace(config, reward_model="vader", env=env, prefer={}, reward={}), out)
        print_row("gold", seed, out)


if __name__ == "__main__":
    main()
