"""Every agent on a language model through a learned reward, at equal tokens: what does gold gain, and for how much KL?

    python examples/compare_agents/language.py reviews --out runs/reviews --jobs 2
    python examples/compare_agents/language.py stories --model FOLDER --out runs/stories --jobs 2

Reviews is the model that the package ships; stories wants a Hugging Face folder of karpathy's stories260K. Each seed is
an experiment of its own: a simulated labeler who knows gold (VADER sentiment) compares responses of the reference, a
proxy learns from the comparisons, and every agent maximises that proxy, or learns from the same comparisons directly.
All who sample have the same learning rate, β and budget of tokens; gold is measured on prompts that nobody trained on.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from study import AGENTS, Row, plot_beside_ppo, print_table, run_all

from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.records.jsonl import read_json, read_jsonl, write_jsonl
from rlhf_env.settings import BradleyTerryConfig, LabelerConfig
from rlhf_env.text.prompts import load_prompts
from rlhf_env.training.assemble import split_prompts
from rlhf_env.training.config import EnvConfig, PreferConfig, RewardConfig, TrainConfig
from rlhf_env.training.prefer import run_prefer
from rlhf_env.training.reward import run_reward
from rlhf_env.training.run import run_training
from rlhf_env.worlds import reviews

HERE = Path(__file__).parents[1]
BEST_OF = 16

EVALUATIONS = 4  # on the way, for the curves

ONE_STEP = {"batch_size": 64}  # four steps on what PPO takes four minibatches of
PAIRS = {"batch_size": 32, "epochs": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"batch_size": 256, "epochs": 1, "lam": 1.0},
    **dict.fromkeys(("a2c", "reinforce", "rloo", "remax"), ONE_STEP),
    "grpo": {"batch_size": 256, "minibatches": 4},
    "grpo (published)": {"batch_size": 256, "minibatches": 4, "kl": "k3"},
    "nlpo": {"batch_size": 256, "epochs": 1, "lam": 1.0},
    "best_of_n": {"n": BEST_OF, "draws": BEST_OF, "prompts": 16},
    "rejection_sampling": {"batch_size": 256, "group_size": 4},
    "bon_distillation": {"batch_size": 64, "n": BEST_OF, "draws": BEST_OF},
    **dict.fromkeys(("dpo", "ipo", "kto"), PAIRS),
    "online_dpo": {"batch_size": 256, "minibatches": 4},
    "ilql": {"batch_size": 64, "epochs": 10, "learning_rate": 1e-3},
    "soft_q": {"batch_size": 256, "epochs": 1},
}


def task(name: str, model: str | None) -> dict[str, Any]:
    """Reference, prompts, environment (β is per standard deviation of the proxy), and what goes with the model."""
    if name == "reviews":
        env = EnvConfig(beta=reviews.BETA, max_new_tokens=reviews.MAX_NEW_TOKENS)
        files = {"prompts": "builtin:reviews", "eval_prompts": None}
        known = {"rate": 5e-4, "length": 8, "comparisons": 4000}
        return {"policy": str(reviews.ASSETS / "reference"), **files, "env": env, **known}
    if model is None:
        raise SystemExit("stories needs --model FOLDER, a Hugging Face folder of stories260K")
    files = {"prompts": "story_openings.txt", "eval_prompts": "story_openings_held_out.txt"}
    found = {key: str(HERE / file) for key, file in files.items()}
    known = {"rate": 1e-4, "length": 41, "comparisons": 3000}
    return {"policy": model, **found, "env": EnvConfig(beta=0.05, max_new_tokens=48), **known}


def prepare(what: dict[str, Any], seed: int, out: Path) -> None:
    """One seed's prompts, comparisons, the proxy that learns from them, and the compared responses as a log."""
    prefer, reward, prompts = out / "prefer", out / "reward", load_prompts(what["prompts"])
    held_out = None if what["eval_prompts"] is None else load_prompts(what["eval_prompts"])
    train, evaluate = split_prompts(prompts, seed, 0.25) if held_out is None else (prompts, held_out)
    out.mkdir(parents=True, exist_ok=True)
    for file, texts in (("train.jsonl", train), ("eval.jsonl", evaluate)):
        write_jsonl(out / file, [{"prompt": text} for text in texts])
    if not (prefer / "summary.json").exists():
        labeler = LabelerConfig(temperature=0.25)
        config = PreferConfig(
            policy=what["policy"],
            prompts=str(out / "train.jsonl"),
            gold="vader",
            comparisons=what["comparisons"],
            labeler=labeler,
            seed=seed,
            num_envs=128,
            env=what["env"],
        )
        run_prefer(config, prefer)
    if not (reward / "summary.json").exists():
        config = RewardConfig(
            comparisons=str(prefer / "comparisons.jsonl"),
            body=what["policy"],
            gold="vader",
            seed=seed,
            fit=BradleyTerryConfig(learning_rate=1e-3, epochs=2),
        )
        run_reward(config, reward)
    compared = read_comparisons(prefer / "comparisons.jsonl")
    rows = ({"prompt": c.prompt, "response": response} for c in compared for response in c.responses)
    write_jsonl(out / "log.jsonl", rows)


def run(name: str, model: str | None, tokens: int, episodes: int, out: Path, agent: str, seed: int) -> Row:
    """One agent on one seed's proxy, measured on held-out prompts; `curve` is gold over KL, evaluated on the way."""
    what, shared = task(name, model), out / f"seed{seed}"
    settings, kind = {"learning_rate": what["rate"], **SETTINGS[agent]}, agent.partition(" ")[0]
    offline = kind in ("dpo", "ipo", "kto", "ilql")
    # A normalised reward's unit is a deviation of the proxy's logits, and β the price of a nat in that unit.
    beta = what["env"].beta * read_json(shared / "reward" / "model" / "config.json")["reward_std"]
    if kind in ("dpo", "ipo", "kto"):
        settings["learning_rate"] /= 5  # of 1, ½ and ⅕ the best for DPO on seed 100 of the reviews
        settings["beta"] = beta / 4 if kind == "ipo" else beta  # IPO's d is (p − ½)/β: the slope of DPO's at p = ½
    if kind == "ilql":
        settings["perturbation"] = 1 / what["env"].beta
    if kind == "best_of_n":
        del settings["learning_rate"]
    data = {"ilql": "log.jsonl"}.get(kind, "prefer/comparisons.jsonl")
    budget: dict[str, Any] = {} if offline else {"updates": 1} if kind == "best_of_n" else {"tokens": tokens}
    folder = shared / agent.replace(" ", "-")
    config = TrainConfig(
        policy=what["policy"],
        prompts=str(shared / "train.jsonl"),
        eval_prompts=str(shared / "eval.jsonl"),
        reward=str(shared / "reward" / "model"),
        gold="vader",
        agent=kind,
        data=str(shared / data) if offline else None,
        too_long="drop",  # a few responses of the limit's length are spelled with more tokens than were sampled
        **budget,
        seed=seed,
        num_envs=128,
        eval_episodes=episodes,
        eval_every=evaluate_every(what, settings, tokens, offline),
        checkpoint_every=0,
        env=what["env"],
        settings=settings,
    )
    if not (folder / "summary.json").exists():
        run_training(config, folder, resume=(folder / "config.yaml").is_file())
    s, rows = read_json(folder / "summary.json"), read_jsonl(folder / "metrics.jsonl")
    path = [(row["eval_kl"], row["eval_gold"]) for row in rows if "eval_kl" in row]
    here = {key: s.get(key) for key in ("gold_before", "gold_after", "score_after", "length", "distinct_2")}
    cost = {"tokens": s["tokens"], "queries": s["queries"], "seconds": s["seconds"]}
    kl = s.get("kl", s.get("kl_bound"))
    curve = [(0.0, s["gold_before"]), *path, (kl, s["gold_after"])]
    return {**here, **cost, "kl": kl, "objective": s["score_after"] - what["env"].beta * kl, "curve": curve}


def evaluate_every(what: dict[str, Any], settings: dict[str, Any], tokens: int, offline: bool) -> int:
    """How many updates are about a quarter of the run."""
    size = settings.get("batch_size", 256)
    examples = what["comparisons"] * settings.get("epochs", 1) if offline else tokens / what["length"]
    return max(1, int(examples / size / EVALUATIONS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("reviews", "stories"))
    parser.add_argument("--model", help="folder of stories260K, for stories")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--agents", nargs="+", default=AGENTS, choices=AGENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=60_000, help="that each run samples")
    parser.add_argument("--eval-episodes", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        prepare(task(args.task, args.model), seed, args.out / f"seed{seed}")
    one = partial(run, args.task, args.model, args.tokens, args.eval_episodes, args.out)
    rows = run_all(one, args.agents, args.seeds, args.out, args.jobs)
    columns = [("gold_after", "gold", ".3f"), ("score_after", "proxy", ".2f"), ("kl", "KL, nats", ".2f")]
    columns += [("objective", "proxy − β·KL", ".2f"), ("length", "length", ".1f"), ("distinct_2", "distinct-2", ".3f")]
    columns += [("tokens", "tokens", ",.0f"), ("queries", "queries", ",.0f"), ("seconds", "seconds", ".0f")]
    before = sum(row["gold_before"] for found in rows.values() for row in found) / sum(map(len, rows.values()))
    print(f"gold before: {before:.3f}; the KL of best_of_n is its bound\n")
    print_table(rows, columns)
    plot_beside_ppo(rows, args.out / f"{args.task}.png", labels=("KL to the reference, nats", "gold"))


if __name__ == "__main__":
    main()
