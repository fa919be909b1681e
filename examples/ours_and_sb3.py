"""Our PPO and Stable-Baselines3's, unmodified, on the same language model at equal tokens: do both reach the same?

    python examples/ours_and_sb3.py --out runs/both                      # film reviews, which the package ships
    python examples/ours_and_sb3.py --out runs/both --model FOLDER       # stories260K as a Hugging Face folder

Per agent the mean over the seeds with its 95 % interval, measured on held-out prompts, and the mean of the differences
within a seed. The objective is score − β·KL. Every run leaves its folder under --out; a finished one is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from rlhf_env.intervals import mean_interval
from rlhf_env.records.jsonl import read_json
from rlhf_env.training.config import EnvConfig, TrainConfig
from rlhf_env.training.run import run_training
from rlhf_env.worlds import reviews

HERE = Path(__file__).parent


def config(agent: str, seed: int, tokens: int, episodes: int, model: str | None) -> TrainConfig:
    """For both about 256 responses per update, in four minibatches, one pass, and a learning rate that falls to 0."""
    rate, steps = (5e-4, 16) if model is None else (1e-4, 80)  # responses have 8 and 41 tokens on average, at first
    ours: dict[str, Any] = {"learning_rate": rate, "batch_size": 256, "epochs": 1, "lam": 1.0, "max_grad_norm": 1.0}
    theirs: dict[str, Any] = {
        "learning_rate": f"lin_{rate}",
        "n_steps": steps,
        "batch_size": 128 * steps // 4,
        "n_epochs": 1,
    }
    theirs |= {"gae_lambda": 1.0, "vf_coef": 0.05, "max_grad_norm": 1.0}
    shared: dict[str, Any] = {
        "agent": agent,
        "seed": seed,
        "tokens": tokens,
        "num_envs": 128,
        "eval_episodes": episodes,
        "gold": "vader",
        "settings": theirs if agent.startswith("sb3:") else ours,
    }
    if model is None:
        shipped = {"policy": str(reviews.ASSETS / "reference"), "reward": str(reviews.ASSETS / "proxy")}
        env = EnvConfig(beta=reviews.BETA, max_new_tokens=reviews.MAX_NEW_TOKENS)
        return TrainConfig(**shipped, **shared, prompts="builtin:reviews", env=env)
    openings = {"prompts": "story_openings.txt", "eval_prompts": "story_openings_held_out.txt"}
    files = {name: str(HERE / file) for name, file in openings.items()}
    env = EnvConfig(beta=0.03, max_new_tokens=48)
    return TrainConfig(policy=model, reward="vader", **files, **shared, env=env)


def measured(agent: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    settings = config(agent, seed, args.tokens, args.eval_episodes, args.model)
    out = args.out / f"{'reviews' if args.model is None else 'stories'}-{agent.replace(':', '-')}-seed{seed}"
    if not (out / "summary.json").exists():
        run_training(settings, out)
    found = read_json(out / "summary.json")
    return {
        "objective": found["score_after"] - settings.env.beta * found["kl"],
        "score": found["score_after"],
        "gold": found["gold_after"],
        "KL": found["kl"],
        "tokens": found["tokens"],
        "seconds": found["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a story model; none: the film reviews")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=250_000, help="that each run samples")
    parser.add_argument("--eval-episodes", type=int, default=512, help="responses that each run is measured on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {agent: [measured(agent, seed, args) for seed in args.seeds] for agent in ("ppo", "sb3:PPO")}
    rows = {agent: {name: [run[name] for run in runs] for name in runs[0]} for agent, runs in found.items()}
    rows["sb3 − ours"] = {
        name: [b - a for a, b in zip(rows["ppo"][name], rows["sb3:PPO"][name], strict=True)] for name in rows["ppo"]
    }
    print(f"| {len(args.seeds)} seeds | " + " | ".join(rows["ppo"]) + " |\n|" + "---|" * (1 + len(rows["ppo"])))
    for agent, columns in rows.items():
        cells = []
        for name, values in columns.items():
            m = mean_interval("x", values)
            digits = 0 if name in ("tokens", "seconds") else 3
            low, high = m.get("x_low", float("nan")), m.get("x_high", float("nan"))  # one seed has no interval
            cells.append(f"{m['x']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        print(f"| {agent} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
