"""The online loop: the present policy writes, a labeler compares what is worth asking, rewards and policy learn on.

Christiano et al. 2017, arXiv 1706.03741, with language models as in Ziegler et al. 2019, arXiv 1909.08593, §2.3. Each
round is five stages in a folder of their own, round-0/pool and so on; what was killed at any moment goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_env.errors import ConfigError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.preferences.queries import label_schedule
from rlhf_env.records.dashboards import require_dashboards
from rlhf_env.records.jsonl import write_jsonl
from rlhf_env.records.run import Run
from rlhf_env.reward_models.bradley_terry import new_reward_model
from rlhf_env.reward_models.load import load_reward
from rlhf_env.text.prompts import load_prompts
from rlhf_env.training.agents import check_agent, is_sb3
from rlhf_env.training.assemble import parse_device, split_prompts
from rlhf_env.training.config import OnlineConfig, RewardConfig, TrainConfig
from rlhf_env.training.inference import unscored_envs
from rlhf_env.training.page import write_report
from rlhf_env.training.querying import (
    EnsembleConfig,
    LabelsConfig,
    PoolConfig,
    labelers_of,
    run_ensemble,
    run_labels,
    run_pool,
)
from rlhf_env.training.report import interval, surroundings
from rlhf_env.training.reward import require_kind_of_comparisons, run_reward
from rlhf_env.training.run import run_training
from rlhf_env.training.stages import Stage, Watch, begin, finish, section

_ROUND_STREAM = 10

#: What a round says, in the stage that says it, and where that calls it so; a metric's interval goes with it.
_ROUND = {
    "pool": {"identical": "identical", "disagreement": "disagreement", "accuracy_pool": "accuracy_pool"},
    "labels": {
        **{name: name for name in ("asked", "skipped", "kept", "comparisons", "held_out", "label_agreement")},
        **{name: name for name in ("accuracy_new_pairs", "log_loss_new_pairs")},
    },
    "ensemble": {"accuracy_held_out": "accuracy", "log_loss_held_out": "log_loss"},
    "train": {
        **{"proxy_before": "score_before", "proxy_after": "score_after"},
        **{name: name for name in ("gold_before", "gold_after", "kl", "updates", "tokens")},
    },
}

#: The columns of the table of rounds.
COLUMNS = {
    "asked": "labels asked",
    "kept": "labels kept",
    "accuracy_pool": "accuracy, pool",
    "accuracy_new_pairs": "accuracy, new pairs",
    "accuracy_held_out": "accuracy, refitted",
    "proxy_before": "score before",
    "proxy_after": "score after",
    "gold_before": "gold before",
    "gold_after": "gold after",
    "kl": "KL, nats",
}


def run_online(config: OnlineConfig, out: str | Path, *, watch: Watch | None = None) -> dict[str, Any]:
    """Run, or go on with, the online loop in the folder `out`; returns what summary.json says.

    All settings are checked and all files read before the first stage. A folder in which a loop was begun is continued
    at its first unfinished stage, and becomes what it would have become without the interruption; settings may differ
    from those it was begun with where no stage has used them yet. rounds.jsonl has a row for each finished round.
    """
    out = Path(out)
    prompts = load_prompts(config.prompts)
    if config.eval_prompts is None:
        prompts, eval_prompts = split_prompts(prompts, config.seed, config.eval_share)
    else:
        eval_prompts = load_prompts(config.eval_prompts)
    stages = plan(config, out)
    _check_inputs(config, stages, prompts, eval_prompts)
    there = sorted(str(path.relative_to(out)) for path in out.glob("round-*/*") if path.is_dir())
    run = begin(config, out, stages, prompts, eval_prompts, folders=there, whole="loop")
    rounds = _write_rounds(out, config.rounds)
    for stage in stages:
        finish(stage, out, watch)
        if isinstance(stage.config, TrainConfig):
            if not (out / stage.name / "report.html").exists():  # a kill came between its summary and its report
                write_report(out / stage.name)
            rounds = _write_rounds(out, config.rounds)
    summary = _summary(config, out, stages, rounds)
    run.write_card(_card(summary, rounds))
    run.write_summary(summary)
    return run.summary


def plan(config: OnlineConfig, out: Path) -> list[Stage]:
    """The stages of all rounds in their order, each with its settings."""
    pairs = label_schedule(config.comparisons // config.overlap, config.rounds, config.schedule, config.initial)
    if pairs[0] < 2:
        raise ConfigError(
            f"the first round asks about {pairs[0]} pair, but needs one to learn from and one to measure on: raise "
            "comparisons or initial"
        )
    if max(pairs) > config.pool:
        raise ConfigError(
            f"a round asks about {max(pairs)} pairs, at most one of each prompt of the pool, which has {config.pool}: "
            "raise pool"
        )
    if "," in str(out):
        raise ConfigError(f"{out} has a comma, which stands between the members of an ensemble: choose another folder")
    stages = []
    for number in range(config.rounds):
        stages += _round(config, out, number, pairs)
    return stages


def _round(config: OnlineConfig, out: Path, number: int, pairs: Sequence[int]) -> list[Stage]:
    """The stages of one round; all before it are what it starts from."""

    def at(name: str, of: int = number) -> str:
        return str(out / f"round-{of}" / name)

    def ensemble_of(of: int) -> str:
        return ",".join(at(f"reward-{m}/model", of) for m in range(config.members))

    train_prompts, eval_prompts = (str(out / "prompts" / f"{name}.jsonl") for name in ("train", "eval"))
    before, ensemble = number - 1, ensemble_of(number)
    policy, present, earlier = config.policy, None, None
    if number:
        policy, present, earlier = at("train/model", before), ensemble_of(before), at("labels/all.jsonl", before)
    pool = PoolConfig(
        policy=policy,
        prompts=train_prompts,
        gold=config.gold,
        ensemble=present,
        size=config.pool,
        candidates=config.candidates,
        start=number * config.pool,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        num_envs=config.num_envs,
        env=config.env,
    )
    label = LabelsConfig(
        pool=at("pool/pool.jsonl"),
        policy=policy,
        earlier=earlier,
        gold=config.gold,
        labeler=config.labeler,
        biases=config.biases,
        labelers=config.labelers,
        overlap=config.overlap,
        rule="uniform" if present is None else config.rule,
        count=pairs[number],
        first=sum(pairs[:number]),
        keep=config.keep,
        held_out=config.held_out,
        seed=config.seed,
        device=config.device,
    )
    wiring = {"comparisons": at("labels/learned.jsonl"), "eval_comparisons": at("labels/held_out.jsonl")}
    wiring |= {"held_out": config.held_out, "reference": config.policy, "prompts": train_prompts, "gold": config.gold}
    usual = {"body": config.policy, "bagging": config.members > 1}
    learn = [
        section(RewardConfig, config, "reward", wiring | {"seed": seed}, usual, whole="loop")
        for seed in (_seed(config.seed, number, member) for member in range(config.members))
    ]
    held_out = EnsembleConfig(ensemble, at("labels/held_out.jsonl"), config.device)
    wiring = {"policy": policy, "reference": config.policy, "prompts": train_prompts, "eval_prompts": eval_prompts}
    wiring |= {
        "reward": ensemble,
        "gold": config.gold,
        "data": None,
        "seed": _seed(config.seed, number, config.members),
    }
    train = section(TrainConfig, config, "train", wiring, whole="loop")
    train = replace(train, **_share(train.budget, number, config.rounds))
    return [
        Stage(f"round-{number}/pool", pool, lambda out, show: run_pool(pool, out, progress=show)),
        Stage(f"round-{number}/labels", label, lambda out, show: run_labels(label, out)),
        *(Stage(f"round-{number}/reward-{m}", each, partial(_learn, each)) for m, each in enumerate(learn)),
        Stage(f"round-{number}/ensemble", held_out, lambda out, show: run_ensemble(held_out, out)),
        Stage(
            f"round-{number}/train",
            train,
            lambda out, show: run_training(train, out, resume=(out / "config.yaml").is_file(), on_update=show),
            resumable=not is_sb3(train.agent),
        ),
    ]


def _learn(config: RewardConfig, out: Path, show: Any) -> None:
    run_reward(config, out, on_step=show)


def _seed(seed: int, number: int, part: int) -> int:
    """A seed of its own for each member and for the training of each round."""
    return int(np.random.default_rng([seed, number, part, _ROUND_STREAM]).integers(2**31))


def _share(budget: Mapping[str, int], number: int, rounds: int) -> dict[str, int]:
    """A round's part of the budget of all; what cannot be divided goes to the first ones."""
    if few := [f"{total} {unit}" for unit, total in budget.items() if total < rounds]:
        raise ConfigError(f"train's budget of {few[0]} is that of all rounds together, and there are {rounds} of them")
    return {unit: total // rounds + (number < total % rounds) for unit, total in budget.items()}


def _check_inputs(
    config: OnlineConfig, stages: Sequence[Stage], prompts: Sequence[str], eval_prompts: Sequence[str]
) -> None:
    """Meet every mistake in files and names before anything is written."""
    parse_device(config.device)
    learn: RewardConfig = next(stage.config for stage in stages if isinstance(stage.config, RewardConfig))
    train: TrainConfig = next(stage.config for stage in stages if isinstance(stage.config, TrainConfig))
    check_agent(train)
    require_kind_of_comparisons(learn)
    require_dashboards(train.log_to)
    labelers_of(config, cache(load_reward))
    load_reward(config.gold)
    policy = CausalLM.from_pretrained(config.policy, dtype=config.dtype)
    policy.freeze_layers(train.freeze_layers)
    for env in dict.fromkeys((config.env, learn.env, train.env)):
        unscored_envs(env, 1, prompts, config.prompts, policy)  # whether the prompts are tokens of its, and fit
        unscored_envs(env, 1, eval_prompts, config.eval_prompts or config.prompts, policy)
    if learn.body is not None:
        new_reward_model(learn.body, of=learn.of, max_length=learn.max_length)


def _write_rounds(out: Path, rounds: int) -> list[dict[str, Any]]:
    """Write rounds.jsonl, a row for each round that is finished."""
    rows = []
    for number in range(rounds):
        said = {name: Run(out / f"round-{number}" / name) for name in _ROUND}
        if not said["train"].finished:
            break
        row: dict[str, Any] = {"round": number}
        for stage, names in _ROUND.items():
            found = said[stage].summary
            for name, source in names.items():
                row |= {f"{name}{end}": found[source + end] for end in ("", "_low", "_high") if source + end in found}
        rows.append(row)
    write_jsonl(out / "rounds.jsonl", rows)
    return rows


def _summary(
    config: OnlineConfig, out: Path, stages: Sequence[Stage], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The loop in one mapping: its last round, but gold before the first one, and sums of what was spent."""
    first = {name: value for name, value in rounds[0].items() if name.startswith("gold_before")}
    counted = ("asked", "skipped", "kept", "updates", "tokens")
    train = Run(out / stages[-1].name).summary
    return {
        **{name: value for name, value in rounds[-1].items() if name not in ("round", "identical")},
        **first,
        **{name: sum(row[name] for row in rounds) for name in counted},
        "rounds": config.rounds,
        "rule": config.rule,
        "members": config.members,
        "agent": train["agent"],
        "beta": train["beta"],
        "policy": str(Path(stages[-1].name) / "model"),
        "seed": config.seed,
        "seconds": sum(Run(out / stage.name).summary["seconds"] for stage in stages),
        **surroundings(config.device),
    }


def round_cells(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The table of rounds as text, a column by its name."""
    columns = {"round": [str(row["round"]) for row in rounds]}
    for name, title in COLUMNS.items():
        counts = name in ("asked", "kept")
        columns[title] = [f"{row[name]:,}" if counts else interval(row, name) for row in rounds]
    return columns


def _card(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """The loop's README.md: how each round went, and the command that does it again."""
    columns = round_cells(rounds)
    lines = [" | ".join(cells) for cells in zip(*columns.values(), strict=True)]
    paragraphs = [
        "# Online RLHF",
        f"{summary['rounds']} rounds, {summary['asked']:,} labels asked and {summary['kept']:,} kept, chosen by "
        f"{summary['rule']} among the pairs of an ensemble of {summary['members']}; {summary['agent']}, "
        f"β = {summary['beta']:g}, {summary['tokens']:,} sampled tokens, {summary['seconds']:,.0f} seconds. The policy "
        f"is in `{summary['policy']}/`.",
        "\n".join(f"| {line} |" for line in (" | ".join(columns), " | ".join("---" for _ in columns), *lines)),
        "Accuracy on the pool is against gold, over all pairs, and on new pairs against the labels that were asked "
        "for, both before the ensemble learned from them; held out, after it. Score is that of the round's own "
        "ensemble, gold the true reward, KL that to the first policy. With 95 % intervals.",
        "The same again, bit for bit with the same versions and number of threads:",
        "    rlhf-env online config.yaml --out NEW_FOLDER",
        ", ".join(f"{name} {number}" for name, number in summary["versions"].items()),
    ]
    return "\n\n".join(paragraphs) + "\n"
