"""The third stage: from comparisons to a reward model, measured on comparisons that it never saw."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rlhf_env.errors import DataError
from rlhf_env.models.causal_lm import CausalLM, parse_dtype
from rlhf_env.preferences.comparisons import distinct, read_comparisons
from rlhf_env.preferences.labelers import SimulatedLabeler, label_agreement, utilities_of
from rlhf_env.preferences.splits import split_by_prompt
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.bradley_terry import fit_comparisons, measure_comparisons, new_reward_model, usable
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.load import load_reward
from rlhf_env.settings import LabelerConfig
from rlhf_env.text.prompts import load_prompts, prompt_indices
from rlhf_env.training.assemble import parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import RewardConfig
from rlhf_env.training.evaluate import response_texts
from rlhf_env.training.inference import unscored_envs
from rlhf_env.training.report import surroundings
from rlhf_env.training.sft import OnStep, new_model
from rlhf_env.types import Comparison

_BAGGING_STREAM = 7
SAMPLING_SEED = 2_000_003  # added to the seed: the responses to normalise on are neither those compared nor trained on


def run_reward(config: RewardConfig, out: str | Path, *, on_step: OnStep | None = None) -> dict[str, Any]:
    """Learn a reward model as `config` says and leave the run, with the model in `out`/model; returns summary.json.

    `accuracy`, `log_loss`, `brier` and `ece` are of the labels held out; where gold is known, `gold_accuracy` says how
    often the model prefers what gold prefers, and `label_agreement` how often the labels do.
    """
    out = Path(out)
    require_free(out)
    began = time.perf_counter()
    device = parse_device(config.device)
    gold = None if config.gold is None else load_reward(config.gold, device=device)
    comparisons, identical = distinct(read_comparisons(config.comparisons))
    least, needed = 2, "2 are needed, one to learn from and one to measure on"
    if config.eval_comparisons is not None:
        least, needed = 1, "1 is needed"
    if len(comparisons) < least:
        raise DataError(
            f"{config.comparisons}: of {len(comparisons) + identical} comparisons {len(comparisons)} have responses "
            f"that differ; at least {needed}"
        )
    model = _start(config, comparisons)
    comparisons, same_tokens, learned, held_out = _sides(config, model, comparisons)
    normal = _reference_responses(config, comparisons)
    model.encode(*normal)  # what its tokenizer cannot read shows now, not after everything is learned

    run = Run.create(out, to_dict(config))  # from here on there is something to keep
    for row in fit_comparisons(model, learned, config.fit, seed=config.seed):
        run.log(row)
        if on_step is not None:
            on_step(row)
    mean, std = model.normalize_on(*normal)
    model.save_pretrained(out / "model")
    summary: dict[str, Any] = {
        **measure_comparisons(model, held_out),
        "loss_learned": measure_comparisons(model, learned)["log_loss"],
        "comparisons": len(learned),
        "held_out": len(held_out),
        "held_out_prompts": len({c.prompt for c in held_out}),
        "identical": identical + same_tokens,
        "reward_mean": mean,
        "reward_std": std,
        "seed": config.seed,
        "seconds": time.perf_counter() - began,
        **surroundings(config.device),
    }
    if gold is not None:
        asked = [c.prompt for c in held_out], [c.responses for c in held_out]
        ranks = SimulatedLabeler(gold, LabelerConfig(temperature=0.0)).rank(*asked, range(len(held_out)))
        by_gold = [Comparison(c.prompt, c.responses, r) for c, r in zip(held_out, ranks, strict=True) if r is not None]
        measured = measure_comparisons(model, by_gold)
        summary |= {f"gold_{k}": measured[k] for k in ("accuracy", "accuracy_low", "accuracy_high") if k in measured}
        summary |= label_agreement(held_out, utilities_of(gold, *asked))
    run.write_summary(summary)
    return run.summary


def _sides(
    config: RewardConfig, model: ClassifierReward, comparisons: Sequence[Comparison]
) -> tuple[list[Comparison], int, list[Comparison], list[Comparison]]:
    """The comparisons that `model` can learn from, how many it cannot, those that it learns from and those held out."""
    source = config.comparisons
    try:
        comparisons, same_tokens = usable(model, comparisons)
        if config.eval_comparisons is None:
            learned, held_out = split_by_prompt(comparisons, config.held_out, config.seed)
        else:
            source, learned = config.eval_comparisons, comparisons
            held_out, _ = usable(model, distinct(read_comparisons(source))[0])
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    if config.bagging:
        drawn = np.random.default_rng([config.seed, _BAGGING_STREAM]).integers(len(learned), size=len(learned))
        learned = [learned[i] for i in drawn]
    return comparisons, same_tokens, learned, held_out


def _start(config: RewardConfig, comparisons: Sequence[Comparison]) -> ClassifierReward:
    """The body with a fresh head; a new body is made where the settings name none."""

    def on(body: str) -> ClassifierReward:
        return new_reward_model(
            body,
            seed=config.seed,
            of=config.of,
            device=config.device,
            dtype=parse_dtype(config.dtype),
            max_length=config.max_length,
        )

    if config.body is not None:
        return on(config.body)
    texts = [c.prompt + response for c in comparisons for response in c.responses]
    with TemporaryDirectory() as folder:
        new_model(config.new, texts, config.seed, "cpu", config.dtype).save_pretrained(folder)
        return on(folder)


def _reference_responses(config: RewardConfig, comparisons: Sequence[Comparison]) -> tuple[list[str], list[str]]:
    """Prompts and responses that shall score mean 0, variance 1: fresh ones of the reference, or those compared."""
    if config.reference is None or config.prompts is None:
        pairs = [(c.prompt, response) for c in comparisons for response in c.responses]
        return [prompt for prompt, _ in pairs], [response for _, response in pairs]
    prompts = load_prompts(config.prompts)
    reference = CausalLM.from_pretrained(config.reference, device=config.device, dtype=config.dtype)
    envs = unscored_envs(config.env, config.num_envs, prompts, config.prompts, reference)
    asked = [prompts[i] for i in prompt_indices(config.seed, 0, config.normalize_on, len(prompts))]
    return asked, response_texts(envs.task, collect(reference, envs, asked, seed=config.seed + SAMPLING_SEED))
