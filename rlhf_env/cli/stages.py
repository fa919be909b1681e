"""`rlhf-env sft`, `prefer`, `revise` and `reward`: the stages before reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_env.cli import settings as cli
from rlhf_env.errors import ConfigError
from rlhf_env.settings import REWARD_KINDS
from rlhf_env.training.config import FineTuneConfig, PreferConfig, ReviseConfig, RewardConfig

_SFT, _PREFER, _REVISE, _REWARD = (
    cli.sentences(kind) for kind in (FineTuneConfig, PreferConfig, ReviseConfig, RewardConfig)
)
_COMMON = {name: name for name in ("seed", "device", "dtype")}
_FIT = {name: f"fit.{name}" for name in ("learning_rate", "epochs", "batch_size")}
_SFT_FLAGS = _COMMON | _FIT | {name: name for name in ("demonstrations", "policy", "chat_template")}
_PREFER_FLAGS = {
    **_COMMON,
    **{name: name for name in ("policy", "prompts", "gold", "comparisons", "responses", "num_envs")},
    **{name: f"labeler.{name}" for name in ("temperature", "flip_rate")},
    "judge": "judge.model",
    **{name: f"env.{name}" for name in ("max_new_tokens", "chat_template")},
}
_REVISE_FLAGS = {
    **_COMMON,
    **{name: name for name in ("principles", "prompts", "responses", "rounds")},
    **{name: f"writer.{name}" for name in ("model", "served_name", "max_new_tokens", "temperature")},
    "judge": "judge.model",
}
_REWARD_FLAGS = _COMMON | _FIT | {"kind": "kind", "max_new_tokens": "env.max_new_tokens"}
_REWARD_FLAGS |= {n: n for n in ("comparisons", "body", "reference", "prompts", "gold", "held_out")}
MORE_TO_SFT = cli.rest_of(_SFT, _SFT_FLAGS)
MORE_TO_PREFER = cli.rest_of(_PREFER, _PREFER_FLAGS)
MORE_TO_REVISE = cli.rest_of(_REVISE, _REVISE_FLAGS)
MORE_TO_REWARD = cli.rest_of(_REWARD, _REWARD_FLAGS) + "".join(
    f"\n  settings.{key} (of {kind}): {sentence}"
    for kind, own in REWARD_KINDS.items()
    for key, sentence in cli.sentences(own).items()
)
_KIND = f"{_REWARD['kind']} One of {', '.join(REWARD_KINDS)}."

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=cli.OVERRIDES)]
Out = Annotated[Path | None, typer.Option(help="The stage's folder, new or empty.")]
Config = Annotated[Path | None, typer.Option(help=cli.CONFIG)]
Threads = Annotated[int | None, typer.Option(help=cli.THREADS)]


def sft(
    overrides: Overrides = None,
    demonstrations: Annotated[str | None, typer.Option(help=_SFT["demonstrations"])] = None,
    policy: Annotated[str | None, typer.Option(help=_SFT["policy"])] = None,
    out: Out = None,
    learning_rate: Annotated[str | None, typer.Option(metavar="FLOAT", help=_SFT["fit.learning_rate"])] = None,
    epochs: Annotated[str | None, typer.Option(metavar="N", help=_SFT["fit.epochs"])] = None,
    batch_size: Annotated[str | None, typer.Option(metavar="N", help=_SFT["fit.batch_size"])] = None,
    chat_template: Annotated[str | None, typer.Option(help=_SFT["chat_template"])] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_SFT["seed"])] = None,
    device: Annotated[str | None, typer.Option(help=_SFT["device"])] = None,
    dtype: Annotated[str | None, typer.Option(help=_SFT["dtype"])] = None,
    config: Config = None,
    threads: Threads = None,
) -> None:
    """Teach a policy to write like demonstrations: the start, and the reference, of reinforcement learning.

    Plain text is learned whole; where there is a prompt, the loss is on the response only. The policy is in OUT/model.
    """
    given = locals()
    flags = {key: given[name] for name, key in _SFT_FLAGS.items()}
    folder = _required(out)
    settings = cli.settings_from(FineTuneConfig, config, flags, overrides)
    cli.use_threads(threads)

    from rlhf_env.cli.show import step_progress
    from rlhf_env.training.sft import run_sft

    with step_progress() as show:
        summary = run_sft(settings, folder, on_step=show)
    _print_stage("sft", summary, f"policy: {folder / 'model'}")


def prefer(
    overrides: Overrides = None,
    policy: Annotated[str | None, typer.Option(help=_PREFER["policy"])] = None,
    prompts: Annotated[str | None, typer.Option(help=_PREFER["prompts"])] = None,
    gold: Annotated[str | None, typer.Option(help=_PREFER["gold"])] = None,
    out: Out = None,
    comparisons: Annotated[str | None, typer.Option(metavar="N", help=_PREFER["comparisons"])] = None,
    responses: Annotated[str | None, typer.Option(metavar="K", help=_PREFER["responses"])] = None,
    temperature: Annotated[str | None, typer.Option(metavar="FLOAT", help=_PREFER["labeler.temperature"])] = None,
    flip_rate: Annotated[str | None, typer.Option(metavar="FLOAT", help=_PREFER["labeler.flip_rate"])] = None,
    judge: Annotated[str | None, typer.Option(help=_PREFER["judge.model"])] = None,
    max_new_tokens: Annotated[str | None, typer.Option(metavar="N", help=_PREFER["env.max_new_tokens"])] = None,
    chat_template: Annotated[str | None, typer.Option(help=_PREFER["env.chat_template"])] = None,
    num_envs: Annotated[str | None, typer.Option(metavar="N", help=_PREFER["num_envs"])] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_PREFER["seed"])] = None,
    device: Annotated[str | None, typer.Option(help=_PREFER["device"])] = None,
    dtype: Annotated[str | None, typer.Option(help=_PREFER["dtype"])] = None,
    config: Config = None,
    threads: Threads = None,
) -> None:
    """Sample K responses to each prompt and let a simulated labeler, or a judge, rank them: OUT/comparisons.jsonl.

    A judge is a language model, local or behind a server, which is asked which of two responses is better.
    """
    given = locals()
    flags = {key: given[name] for name, key in _PREFER_FLAGS.items()}
    folder = _required(out)
    settings = cli.settings_from(PreferConfig, config, flags, overrides)
    cli.use_threads(threads)

    from rlhf_env.cli.show import response_progress
    from rlhf_env.training.prefer import run_prefer

    with response_progress() as show:
        summary = run_prefer(settings, folder, progress=show)
    _print_stage("prefer", summary, f"comparisons: {folder / 'comparisons.jsonl'}")


def revise(
    overrides: Overrides = None,
    principles: Annotated[str | None, typer.Option(help=_REVISE["principles"])] = None,
    model: Annotated[str | None, typer.Option(help=_REVISE["writer.model"])] = None,
    prompts: Annotated[str | None, typer.Option(help=_REVISE["prompts"])] = None,
    responses: Annotated[str | None, typer.Option(metavar="FILE", help=_REVISE["responses"])] = None,
    out: Out = None,
    rounds: Annotated[str | None, typer.Option(metavar="N", help=_REVISE["rounds"])] = None,
    judge: Annotated[str | None, typer.Option(help=_REVISE["judge.model"])] = None,
    served_name: Annotated[str | None, typer.Option(help=_REVISE["writer.served_name"])] = None,
    max_new_tokens: Annotated[str | None, typer.Option(metavar="N", help=_REVISE["writer.max_new_tokens"])] = None,
    temperature: Annotated[str | None, typer.Option(metavar="FLOAT", help=_REVISE["writer.temperature"])] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_REVISE["seed"])] = None,
    device: Annotated[str | None, typer.Option(help=_REVISE["device"])] = None,
    dtype: Annotated[str | None, typer.Option(help=_REVISE["dtype"])] = None,
    config: Config = None,
    threads: Threads = None,
) -> None:
    """Criticise and rewrite responses by principles: OUT/revisions.jsonl for sft, OUT/comparisons.jsonl for reward.

    A language model, local or behind a server, does both, and first responds to the prompts where no responses are
    given. In the comparisons the revision counts as better or, with --judge, what the judge says by a principle.
    """
    given = locals()
    flags = {key: given[name] for name, key in _REVISE_FLAGS.items()}
    folder = _required(out)
    settings = cli.settings_from(ReviseConfig, config, flags, overrides)
    cli.use_threads(threads)

    from rlhf_env.cli.show import response_progress
    from rlhf_env.training.revise import run_revise

    with response_progress() as show:
        summary = run_revise(settings, folder, progress=show)
    _print_stage("revise", summary, f"demonstrations: {folder / 'revisions.jsonl'}")


def reward(
    overrides: Overrides = None,
    comparisons: Annotated[str | None, typer.Option(help=_REWARD["comparisons"])] = None,
    kind: Annotated[str | None, typer.Option(help=_KIND)] = None,
    body: Annotated[str | None, typer.Option(help=_REWARD["body"])] = None,
    out: Out = None,
    reference: Annotated[str | None, typer.Option(help=_REWARD["reference"])] = None,
    prompts: Annotated[str | None, typer.Option(help=_REWARD["prompts"])] = None,
    gold: Annotated[str | None, typer.Option(help=_REWARD["gold"])] = None,
    held_out: Annotated[str | None, typer.Option(metavar="FLOAT", help=_REWARD["held_out"])] = None,
    max_new_tokens: Annotated[str | None, typer.Option(metavar="N", help=_REWARD["env.max_new_tokens"])] = None,
    learning_rate: Annotated[str | None, typer.Option(metavar="FLOAT", help=_REWARD["fit.learning_rate"])] = None,
    epochs: Annotated[str | None, typer.Option(metavar="N", help=_REWARD["fit.epochs"])] = None,
    batch_size: Annotated[str | None, typer.Option(metavar="N", help=_REWARD["fit.batch_size"])] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help=_REWARD["seed"])] = None,
    device: Annotated[str | None, typer.Option(help=_REWARD["device"])] = None,
    dtype: Annotated[str | None, typer.Option(help=_REWARD["dtype"])] = None,
    config: Config = None,
    threads: Threads = None,
) -> None:
    """Learn a reward model from what people said: OUT/model, a Hugging Face sequence classifier.

    It is measured on comparisons held out, and normalised: responses of the reference score mean 0, variance 1.
    """
    given = locals()
    flags = {key: given[name] for name, key in _REWARD_FLAGS.items()}
    folder = _required(out)
    settings = cli.settings_from(RewardConfig, config, flags, overrides)
    cli.use_threads(threads)

    from rlhf_env.cli.show import step_progress
    from rlhf_env.training.reward import run_reward

    with step_progress() as show:
        summary = run_reward(settings, folder, on_step=show)
    _print_stage("reward", summary, f"reward model: {folder / 'model'}")


def _required(out: Path | None) -> Path:
    if out is None:
        raise ConfigError("--out is missing: the folder to leave the result in, for example --out runs/first")
    return out


def _print_stage(name: str, summary: Mapping[str, Any], result: str) -> None:
    from rlhf_env.training.page import stage_result

    print(f"{stage_result(name, summary)}\n{result}  ({summary['seconds']:,.1f} s)")
