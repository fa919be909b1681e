"""`rlhf-env demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rlhf_env.worlds.enumerable import EnumerableWorld

_OPTIMUM_UPDATES, _OPTIMUM_BATCH = 300, 256
_REVIEW_UPDATES = 40
_BEST_OF = (4, 16, 64)


def demo(
    out: Annotated[Path, typer.Option(help="The folder to leave everything in, new or empty.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the world, the models, the agents and sampling.")] = 0,
) -> None:
    """Show the two things this package is for, from nothing, in about a minute and a half.

    First PPO on a world small enough to be listed, beside the exact optimum. Then a small language model that learns
    to write film reviews, and PPO that teaches it to like the films without forgetting how to write.
    """
    from rlhf_env.records.jsonl import write_json
    from rlhf_env.records.run import require_free

    require_free(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    known = _known_optimum(out, seed)
    reviews = _reviews(out, seed)
    seconds = time.perf_counter() - began
    write_json(out / "summary.json", {"known_optimum": known, "reviews": reviews, "seed": seed, "seconds": seconds})
    print(f"\n{seconds:.0f} seconds; everything is in {out}: summary.json, plots/, reviews/README.md (the run's card)")


def _known_optimum(out: Path, seed: int) -> dict[str, Any]:
    """PPO on the enumerable world: a table of exact numbers, and the figure of its path below the frontier."""
    from rlhf_env.agents.ppo import PPO, PPOConfig
    from rlhf_env.cli.show import metrics_table, training_progress
    from rlhf_env.envs.vector import TextGenerationVectorEnv
    from rlhf_env.training.loop import train
    from rlhf_env.training.report import decimal
    from rlhf_env.worlds.enumerable import EnumerableWorld, best_of_n_log_probs

    world = EnumerableWorld.make(seed)
    print(f"1. PPO beside the exact optimum: all {len(world.sequences):,} responses of a small world, β = {world.beta}")
    policy = world.policy()
    envs = TextGenerationVectorEnv(_OPTIMUM_BATCH, **world.env_kwargs())
    config = PPOConfig(learning_rate=1e-3, batch_size=_OPTIMUM_BATCH, epochs=1, value_coef=0.5)
    path: list[tuple[float, float]] = [(0.0, 0.0)]
    with training_progress({"updates": _OPTIMUM_UPDATES}) as show:
        for row in train(PPO(policy, config, seed=seed), envs, updates=_OPTIMUM_UPDATES, seed=seed):
            show({**row, "tokens_per_second": world.length * _OPTIMUM_BATCH / row["seconds"]})
            if row["update"] <= 20 or row["update"] % 20 == 0:
                now = world.sequence_log_probs(policy).detach()
                path.append((float(world.kl(now)), float(world.expected_gold(now))))
    found = {"reference": world.ref_log_probs, "PPO": world.sequence_log_probs(policy).detach()}
    found |= {f"best of {n}": best_of_n_log_probs(world.ref_log_probs, world.gold, n) for n in _BEST_OF}
    found["exact optimum"] = world.optimal_log_probs()
    numbers = {
        name: {"gold": float(world.expected_gold(p)), "kl": float(world.kl(p)), "gain": world.gain(p)}
        for name, p in found.items()
    }
    columns = {"policy": list(found)}
    columns |= {key: [decimal(row[key]) for row in numbers.values()] for key in ("gold", "kl", "gain")}
    metrics_table(columns, "exact numbers; KL in nats; gain: 0 = reference, 1 = optimum of gold − β·KL")
    _draw(world, path, numbers, out / "plots" / "known_optimum.png")
    return numbers


def _draw(
    world: EnumerableWorld, path: list[tuple[float, float]], numbers: dict[str, dict[str, float]], file: Path
) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    kl, gold = world.frontier([world.beta * 1.1**k for k in range(-14, 50)])
    axes.plot(kl, gold, color="black", label="exact frontier: nothing can be above it")
    axes.plot(*zip(*path, strict=True), "o-", markersize=3, color="C0", label="PPO on its way")
    best = [numbers[f"best of {n}"] for n in _BEST_OF]
    axes.plot([b["kl"] for b in best], [b["gold"] for b in best], "^", color="C2", label="best of 4, 16, 64")
    star = numbers["exact optimum"]
    axes.plot(star["kl"], star["gold"], "*", markersize=14, color="C1", label=f"optimum at β = {world.beta}")
    axes.set(xlabel="KL to the reference, nats per sequence", ylabel="gold")
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _reviews(out: Path, seed: int) -> dict[str, Any]:
    """A tiny GPT-2 learns to write film reviews; PPO then raises their sentiment. Leaves a run like `train` does."""
    from rlhf_env.cli.show import training_progress
    from rlhf_env.cli.train import print_summary
    from rlhf_env.models.causal_lm import CausalLM
    from rlhf_env.models.sft import SFTConfig, fit_texts
    from rlhf_env.models.tiny import tiny_config
    from rlhf_env.text.corpus import film_reviews, review_openings
    from rlhf_env.text.tokenizers import word_tokenizer
    from rlhf_env.training.config import EnvConfig, TrainConfig
    from rlhf_env.training.run import run_training

    texts = film_reviews()
    print(
        f"\n2. A tiny GPT-2 learns to write from {len(texts):,} film reviews, then to like the films (VADER sentiment)"
    )
    tokenizer = word_tokenizer(texts)
    eos: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    writer = CausalLM.from_config(tiny_config("gpt2", len(tokenizer), **eos), tokenizer, seed=seed)
    for step in fit_texts(writer, texts, SFTConfig(learning_rate=2e-3, epochs=4), seed=seed):
        if step["step"] % 63 == 0:
            print(f"   step {step['step']:.0f}/{step['steps']:.0f}: {step['loss']:.3f} nats per token")
    writer.save_pretrained(out / "reference")
    (out / "prompts.txt").write_text("\n".join(review_openings()) + "\n", encoding="utf-8")
    config = TrainConfig(
        policy=str(out / "reference"),
        prompts=str(out / "prompts.txt"),
        reward="vader",
        updates=_REVIEW_UPDATES,
        seed=seed,
        num_envs=64,
        eval_episodes=256,
        env=EnvConfig(beta=0.05, max_new_tokens=24, missing_eos_penalty=0.5),
        settings={"learning_rate": 5e-4},
    )
    with training_progress(config.budget) as show:
        summary = run_training(config, out / "reviews", on_update=show)
    print_summary(summary, out / "reviews")
    return summary
