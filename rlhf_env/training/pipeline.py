"""The whole pipeline: demonstrations → policy → comparisons → reward model → reinforcement learning → evaluation.

Each stage is a run folder of its own whose model or file is the next one's input. A stage is finished once its
summary.json is there, so a pipeline that was killed at any moment goes on with the stage it was in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.preferences.comparisons import distinct, read_comparisons
from rlhf_env.records.config import to_dict
from rlhf_env.records.dashboards import require_dashboards
from rlhf_env.records.run import Run
from rlhf_env.reward_models.bradley_terry import new_reward_model, usable
from rlhf_env.reward_models.load import load_reward
from rlhf_env.text.demonstrations import load_demonstrations
from rlhf_env.text.prompts import load_prompts, openings
from rlhf_env.text.sources import read_rows
from rlhf_env.training.agents import agent_class, check_agent, is_sb3
from rlhf_env.training.assemble import parse_device, split_prompts
from rlhf_env.training.config import (
    EvaluateConfig,
    FineTuneConfig,
    PipelineConfig,
    PreferConfig,
    RewardConfig,
    TrainConfig,
)
from rlhf_env.training.inference import read_text, run_evaluation, unscored_envs
from rlhf_env.training.page import stage_result, write_report
from rlhf_env.training.prefer import labelers_of, run_prefer
from rlhf_env.training.report import interval, surroundings
from rlhf_env.training.reward import require_kind_of_comparisons, run_reward
from rlhf_env.training.run import run_training
from rlhf_env.training.sft import prepare_sft, run_sft
from rlhf_env.training.stages import Stage, Watch, begin, finish, section

STAGES = ("sft", "prefer", "reward", "train", "evaluate")

EVALUATION_SEED = 1_000_003  # added to the seed: evaluation draws with other random numbers than training


def run_pipeline(
    config: PipelineConfig, out: str | Path, *, watch: Watch | None = None, until: str | None = None
) -> dict[str, Any]:
    """Run, or go on with, the pipeline in the folder `out`; returns what summary.json says.

    All settings are checked and all files read before the first stage. A folder in which a pipeline was begun is
    continued at its first unfinished stage, and becomes what it would have become without the interruption; settings
    may differ from those it was begun with where no stage has used them yet. `until` names a stage to stop after,
    whose summary is returned then.
    """
    out = Path(out)
    prompts, eval_prompts = _prompts(config)
    stages = plan(config, out)
    names = [stage.name for stage in stages]
    if until is not None and until not in names:
        raise ConfigError(f"there is no stage {until!r} to stop after; this pipeline has {', '.join(names)}")
    _check_inputs(config, stages, prompts, eval_prompts)
    run = begin(config, out, stages, prompts, eval_prompts, folders=STAGES)
    for stage in stages:
        finish(stage, out, watch)
        if stage.name == until and stage is not stages[-1]:
            return Run(out / stage.name).summary
    if not (out / "train" / "report.html").exists():  # a kill came between its summary and its report
        write_report(out / "train")
    summary = _summary(config, out, stages)
    run.write_card(_card(config, out, summary))
    run.write_summary(summary)
    write_report(out)
    return run.summary


def plan(config: PipelineConfig, out: Path) -> list[Stage]:
    """The stages of a pipeline in their order, each with the settings of its command."""
    if config.policy is None and config.demonstrations is None:
        raise ConfigError("the pipeline needs a policy, or demonstrations to fine-tune one on")
    learned = config.reward_model is None
    agent, data = (config.train.get(name) for name in ("agent", "data"))
    compared = data is None and isinstance(agent, str) and _learns_from(agent) == "pairs"
    judged = not {"judge", "labelers"}.isdisjoint(config.prefer)  # may need no gold, as its own settings make sure
    if (learned or compared) and config.comparisons is None and config.gold is None and not judged:
        instead = "train.data" if compared and not learned else "reward_model"
        raise ConfigError(
            "the pipeline needs to know what is good: comparisons (a file), gold (the true reward of a simulated "
            f"labeler), a judge (prefer.judge.model) or {instead}"
        )
    reference = config.policy if config.demonstrations is None else str(out / "sft" / "model")
    train_prompts, eval_prompts = (str(out / "prompts" / f"{name}.jsonl") for name in ("train", "eval"))
    comparisons = config.comparisons or str(out / "prefer" / "comparisons.jsonl")
    reward = config.reward_model or str(out / "reward" / "model")

    stages = []
    if config.demonstrations is not None:
        wiring = {"demonstrations": config.demonstrations, "policy": config.policy}
        usual = {"chat_template": config.env.chat_template}
        sft = section(FineTuneConfig, config, "sft", wiring, usual)
        stages.append(Stage("sft", sft, lambda out, show: run_sft(sft, out, on_step=show)))
    if (learned or compared) and config.comparisons is None:
        wiring = {"policy": reference, "prompts": train_prompts, "gold": config.gold}
        prefer = section(PreferConfig, config, "prefer", wiring)
        stages.append(Stage("prefer", prefer, lambda out, show: run_prefer(prefer, out, progress=show)))
    if learned:
        wiring = {"comparisons": comparisons, "reference": reference, "prompts": train_prompts, "gold": config.gold}
        learn = section(RewardConfig, config, "reward", wiring, {"body": reference})
        stages.append(Stage("reward", learn, lambda out, show: run_reward(learn, out, on_step=show)))
    wiring = {"policy": reference, "reference": None, "prompts": train_prompts, "eval_prompts": eval_prompts}
    wiring |= {"reward": reward, "gold": config.gold}
    train = section(TrainConfig, config, "train", wiring, {"data": comparisons} if compared else {})
    train = replace(train, **train.budget)
    stages.append(
        Stage(
            "train",
            train,
            lambda out, show: run_training(train, out, resume=(out / "config.yaml").is_file(), on_update=show),
            resumable=not is_sb3(train.agent),
        )
    )
    wiring = {"policy": str(out / "train" / "model"), "reference": reference, "prompts": eval_prompts}
    wiring |= {"reward": reward, "gold": config.gold}
    usual = {"seed": config.seed + EVALUATION_SEED, "episodes": 512, "best_of": 16, "env": to_dict(train.env)}
    final = section(EvaluateConfig, config, "evaluate", wiring, usual)
    stages.append(Stage("evaluate", final, lambda out, show: run_evaluation(final, out, progress=show)))
    return stages


def _learns_from(agent: str) -> str | None:
    """Which kind of data an agent learns from, if it samples nothing itself."""
    return None if is_sb3(agent) else getattr(agent_class(agent), "learns_from", None)


def _prompts(config: PipelineConfig) -> tuple[list[str], list[str]]:
    """Prompts to train on and to evaluate on."""
    if config.prompts is not None:
        prompts = load_prompts(config.prompts)
    elif config.demonstrations is None:
        raise ConfigError("the pipeline needs prompts, or demonstrations to take them from")
    else:
        demonstrations = load_demonstrations(config.demonstrations)
        asked = list(dict.fromkeys(d.prompt for d in demonstrations if d.prompt))
        prompts = asked or openings([d.response for d in demonstrations], config.opening_words)
    if config.eval_prompts is not None:
        return prompts, load_prompts(config.eval_prompts)
    return split_prompts(prompts, config.seed, config.eval_share)


def _check_inputs(
    config: PipelineConfig, stages: Sequence[Stage], prompts: Sequence[str], eval_prompts: Sequence[str]
) -> None:
    """Meet every mistake in files and names before anything is learned."""
    for stage in stages:
        parse_device(stage.config.device)
    if isinstance(sft := stages[0].config, FineTuneConfig):
        policy, *_ = prepare_sft(sft, load_demonstrations(sft.demonstrations))
    else:
        assert config.policy is not None
        policy = CausalLM.from_pretrained(config.policy, dtype=config.dtype)
    file = str(config.prompts or config.demonstrations)
    for env in dict.fromkeys(stage.config.env for stage in stages if hasattr(stage.config, "env")):
        unscored_envs(env, 1, prompts, file, policy)  # whether the prompts are tokens of its, and fit its context
        unscored_envs(env, 1, eval_prompts, config.eval_prompts or file, policy)
    learn = next((stage.config for stage in stages if stage.name == "reward"), None)
    if learn is not None:
        require_kind_of_comparisons(learn)
        comparisons = [] if config.comparisons is None else distinct(read_comparisons(config.comparisons))[0]
        if config.comparisons is not None and len(comparisons) < 2:
            raise DataError(f"{config.comparisons}: at least two comparisons of responses that differ are needed")
        if learn.body is not None and (learn.body != learn.reference or config.demonstrations is None):
            body = new_reward_model(learn.body, of=learn.of, max_length=learn.max_length)
            if comparisons:
                usable(body, comparisons)
    for reward in filter(None, (config.gold, config.reward_model)):
        load_reward(reward)
    for prefer in (stage.config for stage in stages if isinstance(stage.config, PreferConfig)):
        labelers_of(prefer)
    if (text := stages[-1].config.text) is not None:
        read_text(text)
    train: TrainConfig = next(stage.config for stage in stages if stage.name == "train")
    policy.freeze_layers(train.freeze_layers)
    check_agent(train)
    if train.data is not None and train.data in (config.comparisons, config.train.get("data")):
        if _learns_from(train.agent) == "pairs":
            read_comparisons(train.data)
        else:
            read_rows(train.data, required={"prompt": str, "response": str})
    require_dashboards(train.log_to)


#: What the summary says, and where each stage calls it so; a metric's interval goes with it.
_FROM_EVALUATION = {
    "gold_before": "reference_gold",
    "gold_after": "gold",
    "proxy_before": "reference_score",
    "proxy_after": "score",
    "kl": "kl",
    "win_rate": "win_rate",
    "length_before": "reference_length",
    "length_after": "length",
    "eos_rate_before": "reference_eos_rate",
    "eos_rate": "eos_rate",
    "distinct_2_before": "reference_distinct_2",
    "distinct_2": "distinct_2",
}
_FROM_TRAINING = ("agent", "beta", "updates", "episodes", "tokens", "queries", "tokens_per_second")
_FROM_REWARD = {
    "reward_model_accuracy": "accuracy",
    "reward_model_gold_accuracy": "gold_accuracy",
    "label_agreement": "label_agreement",
}


def _summary(config: PipelineConfig, out: Path, stages: Sequence[Stage]) -> dict[str, Any]:
    done = {stage.name: Run(out / stage.name).summary for stage in stages}
    summary: dict[str, Any] = {}
    for names, found in ((_FROM_EVALUATION, done["evaluate"]), (_FROM_REWARD, done.get("reward", {}))):
        for name, source in names.items():
            summary |= {f"{name}{end}": found[source + end] for end in ("", "_low", "_high") if source + end in found}
    trained, seconds = done["train"], {name: stage["seconds"] for name, stage in done.items()}
    return {
        **summary,
        **{name: trained[name] for name in _FROM_TRAINING if name in trained},
        "seed": config.seed,
        "seconds": sum(seconds.values()),
        "seconds_by_stage": seconds,
        **surroundings(config.device),
    }


def _card(config: PipelineConfig, out: Path, summary: Mapping[str, Any]) -> str:
    """The pipeline's README.md: what was done, how it did, and the command that does it again."""
    pairs = [("gold", "gold_before", "gold_after"), ("score", "proxy_before", "proxy_after"), ("KL, nats", "", "kl")]
    pairs += [("length, tokens", "length_before", "length_after"), ("EOS rate", "eos_rate_before", "eos_rate")]
    table = [f"| {name} | {interval(summary, a)} | {interval(summary, b)} |" for name, a, b in pairs if b in summary]
    stages = [
        f"- `{name}/` ({seconds:,.0f} s): {stage_result(name, Run(out / name).summary)}"
        for name, seconds in summary["seconds_by_stage"].items()
    ]
    paragraphs = [
        "# An RLHF pipeline",
        f"Seed {config.seed}, β = {summary['beta']:g}, {summary['seconds']:,.0f} seconds. `train/model/` is the "
        "policy; `report.html` has curves and samples. Score is what was trained on, gold the true reward, with 95 % "
        "intervals over responses.",
        "\n".join(["| | before | after |", "|---|---|---|", *table]),
        "\n".join(stages),
        "The same again, bit for bit with the same versions and number of threads:",
        "    rlhf-env pipeline config.yaml --out NEW_FOLDER",
        ", ".join(f"{name} {number}" for name, number in summary["versions"].items()),
    ]
    return "\n\n".join(paragraphs) + "\n"
