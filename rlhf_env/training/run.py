"""A training run from settings to a folder, and its continuation after it was interrupted."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_env.errors import ConfigError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.checkpoint import (
    flatten_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unflatten_state,
)
from rlhf_env.records.config import build, flat, read_layer, to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.training.agents import agent_class, agent_config
from rlhf_env.training.assemble import Parts, assemble
from rlhf_env.training.config import TrainConfig
from rlhf_env.training.evaluate import Evaluation, evaluate
from rlhf_env.training.loop import Spent, train
from rlhf_env.training.page import write_report
from rlhf_env.training.report import paired_samples, plot_training, summarize, training_card
from rlhf_env.types import Agent, Policy

Report = Callable[[dict[str, Any]], None]


def run_training(
    config: TrainConfig, out: str | Path, *, resume: bool = False, on_update: Report | None = None
) -> dict[str, Any]:
    """Train as `config` says, evaluating before and after, and leave everything in the folder `out`.

    Returns what summary.json says; `out`/model is the trained policy. `on_update` is shown each row of metrics.jsonl
    once it and, where one is due, its checkpoint are written. With `resume` the run in `out` continues from its newest
    complete checkpoint and becomes, bit for bit, the run that was never interrupted.
    """
    config, out, began = dataclasses.replace(config, **config.budget), Path(out), time.perf_counter()
    sb3 = config.agent.startswith("sb3:")
    if sb3 and resume:
        raise ConfigError(f"{config.agent} keeps its state to itself, so its runs cannot be resumed: start a new one")
    if sb3:
        from rlhf_env.training.sb3 import make_sb3, sb3_class, train_sb3  # a second of imports that ours do not need

        sb3_class(config.agent, config.settings)  # a mistake in the settings shows before any model is loaded
    else:
        agent_config(agent_class(config.agent), config.settings)
    if resume:
        _require_same(config, out)
    else:
        require_free(out)
    parts = assemble(config)

    def measure(policy: Policy) -> Evaluation:
        return evaluate(policy, parts.eval_envs, episodes=config.eval_episodes, gold=parts.gold)

    def finish_row(row: dict[str, Any], policy: Policy) -> dict[str, Any]:
        """What every agent's row gets: speed, and an evaluation where one is due."""
        nonlocal tokens, updating
        updating += row["seconds"]
        written, tokens = row["tokens"] - tokens, row["tokens"]
        row["tokens_per_second"] = written / row["seconds"]
        if config.eval_every and row["update"] % config.eval_every == 0:
            measured = measure(policy).metrics
            row |= {f"eval_{name}": value for name, value in measured.items() if not name.startswith("reference_")}
        run.log(row)
        return row

    tokens, updating = 0, 0.0
    before = measure(parts.policy)
    if sb3:
        model = make_sb3(config, parts.envs)
        run = Run.create(out, to_dict(config))
        policy = train_sb3(model, config, run, finish_row, on_update)
    else:
        torch.manual_seed(config.seed)  # ours need no global randomness, but your agent may use some
        cls = agent_class(config.agent)
        agent = cls(parts.policy, agent_config(cls, config.settings), seed=config.seed)
        run = Run.open(out) if resume else Run.create(out, to_dict(config))  # from here on there is something to keep
        spent = _restore(config, run, agent, parts) if resume else Spent()
        tokens = spent.tokens
        _train(config, agent, parts, spent, run, finish_row, on_update)
        policy = parts.policy
    after = measure(policy)

    _save_model(policy, out / "model")
    beside = time.perf_counter() - began - updating  # loading and evaluating; of an interrupted run, since it resumed
    summary = summarize(config, parts, run.metrics, before.metrics, after.metrics, beside)
    samples = paired_samples(before.samples, after.samples)
    run.write_samples(samples)
    run.write_tokens(after.tokens)
    figure = plot_training(run.metrics, summary, run.plots / "training.png")
    run.write_card(training_card(config, summary, samples, figure=figure))
    run.write_summary(summary)  # last: where it is, the run is finished
    write_report(out)
    return run.summary


def _train(
    config: TrainConfig,
    agent: Agent,
    parts: Parts,
    spent: Spent,
    run: Run,
    finish_row: Callable[[dict[str, Any], Policy], dict[str, Any]],
    on_update: Report | None,
) -> None:
    saved = spent.updates
    for metrics in train(agent, parts.envs, **config.budget, seed=config.seed, spent=spent):
        row = finish_row(dict(metrics), agent.policy)
        spent = Spent(row["update"], row["episodes"], row["tokens"])
        if config.checkpoint_every and spent.updates % config.checkpoint_every == 0:
            _save(run, agent, parts, spent)
            saved = spent.updates
        if on_update is not None:
            on_update(row)
    if saved != spent.updates:
        _save(run, agent, parts, spent)


def _save(run: Run, agent: Agent, parts: Parts, spent: Spent) -> None:
    tensors, tree = flatten_state(agent.state_dict())
    save_checkpoint(
        run.checkpoints,
        spent.updates,
        tensors={"agent": tensors, "random": {"cpu": torch.get_rng_state()}},
        state={"agent": tree, "spent": dataclasses.asdict(spent), "beta": parts.envs.core.beta_state()},
        write_model=parts.policy.save_pretrained,
    )


def _restore(config: TrainConfig, run: Run, agent: Agent, parts: Parts) -> Spent:
    """Put policy, agent, β and random state back as the newest checkpoint has them; rows logged since are dropped."""
    path, spent = latest_checkpoint(run.checkpoints), Spent()
    if path is not None:
        checkpoint = load_checkpoint(path)
        trained = CausalLM.from_pretrained(path / "model", device=config.device, dtype=config.dtype)
        parts.policy.load_state_dict(trained.state_dict())
        agent.load_state_dict(unflatten_state(checkpoint.tensors.get("agent", {}), checkpoint.state["agent"]))
        torch.set_rng_state(checkpoint.tensors["random"]["cpu"])
        parts.envs.core.load_beta_state(checkpoint.state["beta"])
        spent = Spent(**checkpoint.state["spent"])
    run.truncate_metrics(spent.updates)
    return spent


def changed_settings(config: Any, out: Path) -> list[str]:
    """The settings of `config`, by their dotted keys, in which it differs from what the run in `out` was begun with."""
    then, now = flat(to_dict(build(type(config), read_layer(out / "config.yaml")))), flat(to_dict(config))
    return [key for key in {**now, **then} if now.get(key) != then.get(key)]


def _require_same(config: TrainConfig, out: Path) -> None:
    Run.open(out)
    if changed := changed_settings(config, out):
        raise ConfigError(
            f"{out} was begun with another {', '.join(changed)}: a run is resumed exactly as it was begun; to go on "
            f"differently, start a new run with --policy on a checkpoint's model folder"
        )


def _save_model(policy: CausalLM, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
