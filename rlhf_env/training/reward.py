"""The third stage: from what people said to a reward model, measured on what it never saw."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rlhf_env.errors import ConfigError, DataError, RLHFEnvError
from rlhf_env.models.causal_lm import CausalLM, parse_dtype
from rlhf_env.preferences.labelers import SimulatedLabeler, label_agreement, utilities_of
from rlhf_env.preferences.splits import split_by_prompt
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.bradley_terry import measure_comparisons, new_reward_model
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.heads import Head
from rlhf_env.reward_models.load import load_reward
from rlhf_env.settings import LabelerConfig
from rlhf_env.text.prompts import load_prompts, prompt_indices
from rlhf_env.training.assemble import parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import RewardConfig
from rlhf_env.training.evaluate import response_texts
from rlhf_env.training.inference import unscored_envs
from rlhf_env.training.report import surroundings
from rlhf_env.training.reward_kinds import COMPARISONS, KINDS, Data
from rlhf_env.training.sft import OnStep, new_model
from rlhf_env.types import Comparison

_BAGGING_STREAM = 7
SAMPLING_SEED = 2_000_003  # added to the seed: the responses to normalise on are neither those compared nor trained on


def run_reward(config: RewardConfig, out: str | Path, *, on_step: OnStep | None = None) -> dict[str, Any]:
    """Learn a reward model as `config` says and leave the run, with the model in `out`/model; returns summary.json.

    `accuracy`, `log_loss`, `brier` and `ece` are of the labels held out (`rmse` of ratings); where gold is known,
    `gold_accuracy` says how often the model prefers what gold prefers, and `label_agreement` how often the labels do.
    `own_accuracy` of scores of people or groups is by the score of whoever judged.
    """
    out = Path(out)
    require_free(out)
    began = time.perf_counter()
    device = parse_device(config.device)
    gold = None if config.gold is None else load_reward(config.gold, device=device)
    kind = KINDS[config.kind]
    data, own = kind.data, config.own
    examples, identical = data.read(config.comparisons, own)
    least, needed = 2, "2 are needed, one to learn from and one to measure on"
    if config.eval_comparisons is not None:
        least, needed = 1, "1 is needed"
    if len(examples) < least:
        have = " have responses that differ" if data is COMPARISONS else ""
        raise DataError(
            f"{config.comparisons}: of {len(examples) + identical} {data.noun} {len(examples)}{have}; at least {needed}"
        )
    try:
        head = kind.head(own, examples)
    except RLHFEnvError as error:
        raise type(error)(f"{config.comparisons}: {error}") from error
    model = _start(config, head, _texts(data, own, examples))
    examples, same_tokens, learned, held_out = _sides(config, model, examples)
    normal = _reference_responses(config, _texts(data, own, examples))
    model.encode(*normal)  # what its tokenizer cannot read shows now, not after everything is learned

    run = Run.create(out, to_dict(config))  # from here on there is something to keep
    row: dict[str, Any] = {}
    for row in kind.fit(model, learned, config.fit, own, config.seed):
        run.log(row)
        if on_step is not None:
            on_step(row)
    mean, std = model.normalize_on(*normal)
    model.save_pretrained(out / "model")
    summary: dict[str, Any] = {
        "kind": config.kind,
        **data.measure(model, held_out),
        **kind.more(model, held_out, row),
        **{name: row[name] for name in ("tie_parameter", "weights", "members") if name in row},
        "loss_learned": data.measure(model, learned)[data.loss],
        data.noun: len(learned),
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


def require_kind_of_comparisons(config: RewardConfig) -> None:
    """Raise `ConfigError` where a stage that is handed comparisons would learn from something else."""
    if KINDS[config.kind].data is not COMPARISONS:
        raise ConfigError(
            f"reward.kind {config.kind} learns from files of its own, and here it would be given comparisons: learn it "
            "first (rlhf-env reward) and name it as the reward"
        )


def _sides(
    config: RewardConfig, model: ClassifierReward, examples: Sequence[Any]
) -> tuple[list[Any], int, list[Any], list[Any]]:
    """The examples that `model` can learn from, how many it cannot, those that it learns from and those held out."""
    source, data = config.comparisons, KINDS[config.kind].data
    try:
        usable, same_tokens = data.usable(model, examples)
        if config.eval_comparisons is None:
            learned, held_out = split_by_prompt(usable, config.held_out, config.seed)
        else:
            source, learned = config.eval_comparisons, usable
            held_out, _ = data.usable(model, data.read(source, config.own)[0])
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    if config.bagging:
        drawn = np.random.default_rng([config.seed, _BAGGING_STREAM]).integers(len(learned), size=len(learned))
        learned = [learned[i] for i in drawn]
    return usable, same_tokens, learned, held_out


def _texts(data: Data, own: Any, examples: Sequence[Any]) -> tuple[list[str], list[str]]:
    """All responses, and with each its prompt: the prompts [B], the responses [B]."""
    pairs = [(example.prompt, response) for example in examples for response in data.responses(example, own)]
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def _start(config: RewardConfig, head: Head | None, texts: tuple[list[str], list[str]]) -> ClassifierReward:
    """The body with a fresh head; a new body, that can read the `texts`, is made where the settings name none."""

    def on(body: str) -> ClassifierReward:
        return new_reward_model(
            body,
            seed=config.seed,
            of=config.of,
            device=config.device,
            dtype=parse_dtype(config.dtype),
            max_length=config.max_length,
            head=head,
        )

    if config.body is not None:
        return on(config.body)
    whole = [prompt + response for prompt, response in zip(*texts, strict=True)]
    with TemporaryDirectory() as folder:
        new_model(config.new, whole, config.seed, "cpu", config.dtype).save_pretrained(folder)
        return on(folder)


def _reference_responses(config: RewardConfig, texts: tuple[list[str], list[str]]) -> tuple[list[str], list[str]]:
    """Prompts and responses that shall score mean 0, variance 1: fresh ones of the reference, or those judged."""
    if config.reference is None or config.prompts is None:
        return texts
    prompts = load_prompts(config.prompts)
    reference = CausalLM.from_pretrained(config.reference, device=config.device, dtype=config.dtype)
    envs = unscored_envs(config.env, config.num_envs, prompts, config.prompts, reference)
    asked = [prompts[i] for i in prompt_indices(config.seed, 0, config.normalize_on, len(prompts))]
    return asked, response_texts(envs.task, collect(reference, envs, asked, seed=config.seed + SAMPLING_SEED))
