"""A training run from settings to a folder, and its continuation after it was interrupted."""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_env import processes
from rlhf_env.errors import ConfigError, NonFiniteError, RemoteError, RewardError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sharding import is_spread, load_whole, whole_state
from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.records.atomic import settle_folder, write_folder_atomic
from rlhf_env.records.checkpoint import (
    flatten_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unflatten_state,
)
from rlhf_env.records.config import build, flat, read_layer, to_dict
from rlhf_env.records.dashboards import open_dashboards, require_dashboards
from rlhf_env.records.jsonl import read_json, write_json
from rlhf_env.records.run import Run, require_free
from rlhf_env.records.safe_text import safe_text
from rlhf_env.text.sources import read_rows
from rlhf_env.training.agents import agent_class, agent_config, check_agent, is_sb3
from rlhf_env.training.assemble import Parts, assemble
from rlhf_env.training.config import TrainConfig
from rlhf_env.training.evaluate import Evaluation, evaluate
from rlhf_env.training.interruption import Interrupted, InterruptedAgain
from rlhf_env.training.loop import Spent, train
from rlhf_env.training.offline import load_log, load_pairs
from rlhf_env.training.page import write_report
from rlhf_env.training.report import paired_samples, plot_training, summarize, training_card
from rlhf_env.types import Agent, OfflineAgent, Pairs, Policy, Rollout

Report = Callable[[dict[str, Any]], None]
FinishRow = Callable[[dict[str, Any], Callable[[], Policy]], dict[str, Any]]

#: Where errors name a single episode, and where one of what was sampled rather than of a step.
_EPISODE = r"\b(?:episode|prompt) (\d+)"
_SAMPLED_EPISODE = _EPISODE + r"(?!.*the step was not taken)"

#: Agents that step on groups, a choice or memories of what was sampled, whose rows are not those of the batch.
_CHOOSING = ("rejection_sampling", "online_dpo", "soft_q", "bon_distillation")


def run_training(
    config: TrainConfig, out: str | Path, *, resume: bool = False, on_update: Report | None = None
) -> dict[str, Any]:
    """Train as `config` says, evaluating before and after, and leave everything in the folder `out`.

    Returns what summary.json says; `out`/model is the trained policy. `on_update` is shown each row of metrics.jsonl
    once it and, where one is due, its checkpoint are written; where it raises `Interrupted`, a checkpoint is written
    first, and so it is where there is no reward: nothing is learned without one, and the `RewardError` or `RemoteError`
    ends the run. With `resume` the run in `out` continues from its newest complete checkpoint and becomes, bit for bit,
    the run that was never interrupted.

    Where several `processes` work together, the first of them writes the folder, which all must be able to read when a
    run is resumed, and shows the rows; the others return {}.
    """
    leads = processes.rank() == 0
    config, out, began = dataclasses.replace(config, **config.budget), Path(out), time.perf_counter()
    sb3 = is_sb3(config.agent)
    if sb3 and processes.count() > 1:
        raise ConfigError(f"{config.agent} learns in one process: start it without torchrun")
    if sb3 and resume:
        raise ConfigError(f"{config.agent} keeps its state to itself, so its runs cannot be resumed: start a new one")
    check_agent(config)  # a mistake in the settings shows before any model is loaded
    require_dashboards(config.log_to)
    processes.in_first(lambda: _require_same(config, out) if resume else require_free(out))
    cls: Any = None if sb3 else agent_class(config.agent)
    parts = assemble(config, kl_mode=getattr(cls, "kl_mode", "reward"))
    data = None if config.data is None else _load_data(cls, config, parts)
    if config.data is not None and not _prompts_of(cls, config.data).isdisjoint(parts.eval_envs.task.prompts):
        parts = dataclasses.replace(parts, held_out=False)

    def measure(policy: Policy, best_of: int = 1) -> Evaluation:
        return evaluate(policy, parts.eval_envs, episodes=config.eval_episodes, gold=parts.gold, best_of=best_of)

    def finish_row(row: dict[str, Any], policy_of: Callable[[], Policy]) -> dict[str, Any]:
        """What every agent's row gets: speed, and an evaluation where one is due."""
        nonlocal tokens, updating
        updating += row["seconds"]
        written, tokens = row["tokens"] - tokens, row["tokens"]
        if written:
            row["tokens_per_second"] = written / row["seconds"]
        if config.eval_every and row["update"] % config.eval_every == 0:
            policy = policy_of()  # which some agents make anew each time that they are asked
            measured = measure(policy, best_of).metrics
            row |= {f"eval_{name}": value for name, value in measured.items() if not name.startswith("reference_")}
            _keep_best(run, row, parts.eval_envs.beta, _writer(policy, parts))
        if leads:
            run.log(row)
            tell(row)
        return row

    tokens, updating, best_of = 0, 0.0, 1
    before = measure(parts.policy)
    if sb3:
        from rlhf_env.training.sb3 import make_sb3, train_sb3  # a second of imports that ours do not need

        model = make_sb3(config, parts.envs)
        run = Run.create(out, to_dict(config))
        with _no_folder_if_refused(run), open_dashboards(config.log_to, out, to_dict(config)) as tell:
            finish = lambda row, policy: finish_row(row, lambda: policy)  # noqa: E731
            policy: Policy = train_sb3(model, config, run, finish, on_update)
    else:
        torch.manual_seed(config.seed)  # ours need no global randomness, but your agent may use some
        agent = cls(parts.policy, agent_config(cls, config.settings), seed=config.seed)
        # From here on there is something to keep.
        run = processes.in_first(lambda: Run.open(out) if resume else Run.create(out, to_dict(config)))
        standing = _restore(config, run, agent, parts) if resume else _Standing.of(parts, Spent())
        tokens, best_of = standing.spent.tokens, getattr(agent, "best_of", 1)
        if standing.unmeasured:
            updating -= standing.unmeasured["seconds"]  # which passed before it was resumed
        log_to = config.log_to if leads else ()
        dashboards = open_dashboards(log_to, out, to_dict(config), start=standing.spent.updates)
        with nullcontext() if resume else _no_folder_if_refused(run), dashboards as tell:
            _train(config, agent, data, parts, standing, run, finish_row, on_update)
        policy = agent.policy
    after = measure(policy, best_of)
    write = _writer(policy, parts)
    if not leads:
        return {}

    write_folder_atomic(out / "model", write)
    beside = time.perf_counter() - began - updating  # loading and evaluating; of an interrupted run, since it resumed
    best = read_json(run.best / "metrics.json") if run.best.is_dir() else {}
    summary = summarize(config, parts, run.metrics, before.metrics, after.metrics, best, beside)
    samples = paired_samples(before.samples, after.samples)
    run.write_samples(samples)
    run.write_tokens(after.tokens)
    figure = plot_training(run.metrics, summary, run.plots / "training.png")
    run.write_card(training_card(config, summary, samples, figure=figure))
    run.write_summary(summary)  # last: where it is, the run is finished
    write_report(out)
    return run.summary


def _load_data(cls: Any, config: TrainConfig, parts: Parts) -> Pairs | Rollout:
    load = load_pairs if cls.learns_from == "pairs" else load_log
    return load(str(config.data), parts.envs, too_long=config.too_long)


def _prompts_of(cls: Any, source: str) -> set[str]:
    if cls.learns_from == "pairs":
        return {comparison.prompt for comparison in read_comparisons(source)}
    return {row["prompt"] for _, row in read_rows(source)}


@contextmanager
def _no_folder_if_refused(run: Run) -> Iterator[None]:
    """A new run that is refused before its first row leaves nothing that stands in the way of the corrected one."""
    try:
        yield
    except ConfigError:
        if not (run.path / "metrics.jsonl").exists():
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _writer(policy: Policy, parts: Parts) -> Callable[[Path], None]:
    """What writes an agent's policy, or the model that it is made from, into a folder; all processes have to ask."""
    model = policy if isinstance(policy, CausalLM) else parts.policy
    return partial(model.save_pretrained, state=whole_state(model.model) if is_spread(model.model) else None)


def _keep_best(run: Run, row: dict[str, Any], beta: float, write_model: Callable[[Path], None]) -> None:
    """Keep a model if no evaluation before it came to a higher score − β·KL − penalties; gold has no say in it."""
    if processes.rank() > 0:
        return
    objective = row["eval_score"] - beta * row.get("eval_kl", row.get("eval_kl_bound", 0.0))
    objective -= row.get("eval_penalty", 0.0)
    if run.best.is_dir() and read_json(run.best / "metrics.json")["objective"] >= objective:
        return
    measured = {name: value for name, value in row.items() if name == "update" or name.startswith("eval_")}

    def write(folder: Path) -> None:
        write_model(folder / "model")
        write_json(folder / "metrics.json", {"objective": objective, **measured})

    write_folder_atomic(run.best, write)


@dataclass(frozen=True)
class _Standing:
    """Where a run stands between two updates, but for what its agent knows."""

    spent: Spent
    beta: dict[str, Any]  #: of the environments' β
    random: Tensor  #: state of torch's global generator
    unmeasured: dict[str, Any] | None = None  #: the last update's row, where its evaluation is still to be made

    @classmethod
    def of(cls, parts: Parts, spent: Spent, unmeasured: dict[str, Any] | None = None) -> _Standing:
        return cls(spent, parts.envs.core.beta_state(), torch.get_rng_state(), unmeasured)


def _train(
    config: TrainConfig,
    agent: Any,
    data: Pairs | Rollout | None,
    parts: Parts,
    standing: _Standing,
    run: Run,
    finish_row: FinishRow,
    on_update: Report | None,
) -> None:
    spent, unmeasured = standing.spent, standing.unmeasured
    saved = None if unmeasured else spent.updates  # a checkpoint with a row that is not measured is to be replaced
    if data is None:
        rows = train(agent, parts.envs, **config.budget, seed=config.seed, spent=spent)
    else:
        rows = _fit(agent, data, config.updates, spent.updates)

    def prompt(row: int) -> str:
        return _prompt(agent, data, parts, config.seed, standing.spent, row)

    def save() -> None:
        nonlocal saved
        if saved != standing.spent.updates:
            _save(run, agent, parts, standing)
            saved = standing.spent.updates

    named = _SAMPLED_EPISODE if config.agent in _CHOOSING else _EPISODE
    rows = _naming_prompts(rows, prompt, named, "batch" if data is None else "data")
    try:
        for metrics in chain([unmeasured] if unmeasured else [], rows):
            row = dict(metrics)
            spent = Spent(row["update"], row["episodes"], row["tokens"], row["queries"])
            standing = _Standing.of(parts, spent, unmeasured=row)
            finish_row(row, lambda: agent.policy)
            standing = _Standing.of(parts, spent)
            try:
                if config.checkpoint_every and row["update"] % config.checkpoint_every == 0:
                    save()
                if on_update is not None:
                    on_update(row)
            except InterruptedAgain:
                raise
            except Interrupted:  # which nothing but a second signal follows: there is time to save
                save()
                raise
    except (RewardError, RemoteError):  # nothing was learned since, but sampling may have moved β
        save()
        raise
    save()


def _fit(agent: OfflineAgent, data: Pairs | Rollout, updates: int | None, start: int) -> Iterator[dict[str, float]]:
    """The rows of an agent that learns from data: as `train` yields them, with nothing sampled."""
    began = time.perf_counter()
    for update, metrics in enumerate(agent.fit(data, updates=updates, start=start), start=start + 1):
        seconds = time.perf_counter() - began
        yield {"update": update, "episodes": 0, "tokens": 0, "queries": 0, **metrics, "seconds": seconds}
        began = time.perf_counter()


def _naming_prompts(
    rows: Iterator[dict[str, float]], prompt: Callable[[int], str], pattern: str, whole: str
) -> Iterator[dict[str, float]]:
    """The same rows; an error about one episode, as `pattern` finds it, of the `whole` says what its prompt was."""
    try:
        yield from rows
    except NonFiniteError as error:
        message = str(error).replace(" of the batch", f" of the {whole}")
        if named := re.search(pattern, message):
            message += f'; episode {named[1]} was asked "{safe_text(prompt(int(named[1]))[:80])}"'
        raise NonFiniteError(message) from error


def _prompt(agent: Any, data: Pairs | Rollout | None, parts: Parts, seed: int, spent: Spent, row: int) -> str:
    """The prompt of this row of the data, or of the policy's own responses that come after what was `spent`."""
    task = parts.envs.task
    if data is None:
        size = getattr(agent, "group_size", None) or task.group_size
        return task.prompts_at(seed, spent.episodes + row, 1, size)[0][0]
    rollout = data.first if isinstance(data, Pairs) else data
    return task.codec.decode(rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist())


def _save(run: Run, agent: Agent | OfflineAgent, parts: Parts, standing: _Standing) -> None:
    write, (tensors, tree) = _writer(parts.policy, parts), flatten_state(agent.state_dict())
    if processes.rank() > 0:
        return
    save_checkpoint(
        run.checkpoints,
        standing.spent.updates,
        tensors={"agent": tensors, "random": {"cpu": standing.random}},
        state={
            "agent": tree,
            "spent": dataclasses.asdict(standing.spent),
            "beta": standing.beta,
            "unmeasured": standing.unmeasured,
        },
        write_model=write,
    )


def _restore(config: TrainConfig, run: Run, agent: Agent | OfflineAgent, parts: Parts) -> _Standing:
    """Put policy, agent, β and random state back as the newest checkpoint has them; rows logged since are dropped."""
    path, spent, unmeasured = processes.in_first(lambda: _newest(run)), Spent(), None
    if path is not None:
        checkpoint = load_checkpoint(path)
        trained = CausalLM.from_pretrained(path / "model", device=config.device, dtype=config.dtype)
        load_whole(parts.policy, trained.state_dict())
        agent.load_state_dict(unflatten_state(checkpoint.tensors.get("agent", {}), checkpoint.state["agent"]))
        torch.set_rng_state(checkpoint.tensors["random"]["cpu"])
        parts.envs.core.load_beta_state(checkpoint.state["beta"])
        spent, unmeasured = Spent(**checkpoint.state["spent"]), checkpoint.state.get("unmeasured")
    if processes.rank() == 0:
        run.truncate_metrics(spent.updates - (unmeasured is not None))
    return _Standing.of(parts, spent, unmeasured)


def _newest(run: Run) -> Path | None:
    settle_folder(run.best)
    return latest_checkpoint(run.checkpoints)


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
