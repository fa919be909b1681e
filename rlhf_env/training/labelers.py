"""From settings to labelers: who answers the queries of `rlhf-env prefer`, and of every other command that asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from rlhf_env.errors import ConfigError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.generation import continuation_log_odds
from rlhf_env.preferences.constitution import (
    PRINCIPLE_NEXT_WORD_TEMPLATE,
    PRINCIPLE_TEMPLATE,
    principle_judges,
    read_principles,
)
from rlhf_env.preferences.judge import NEXT_WORD_TEMPLATE, VERDICT_TEMPLATE, JudgeLabeler, LogOddsJudge
from rlhf_env.preferences.labelers import SimulatedLabeler
from rlhf_env.preferences.populations import Population
from rlhf_env.preferences.utilities import log_words, markdown_marks, sycophancy, weighted
from rlhf_env.records.config import to_dict
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.settings import LabelerConfig
from rlhf_env.text.codec import Codec
from rlhf_env.training.assemble import load_writer, read_chat_template
from rlhf_env.training.inference import read_text
from rlhf_env.training.labeler_config import JudgeConfig, MemberConfig
from rlhf_env.types import Labeler

_MEMBER_STREAM = 8  # of the seeds of a population's members


def build_labelers(
    one: MemberConfig,
    several: Sequence[MemberConfig],
    overlap: int,
    *,
    gold: str | None,
    seed: int,
    load: Callable[[str], Any],
    load_model: Callable[[str], CausalLM] = CausalLM.from_pretrained,
) -> Labeler | Population:
    """The `one` labeler or, where there are any, the `several`, whose seeds are made of the seed and their number.

    A judge by principles is as many labelers, who share its weight. `gold` is the name of the true reward of those
    that name none; `load` makes a reward model of a name, `load_model` the language model of a judge.
    """
    load_model = cache(load_model)  # members may share one
    if not several:
        alone = _members(one, gold, seed, load, load_model)
        return alone[0] if len(alone) == 1 else Population(alone, seed=seed)
    members: list[Labeler] = []
    weights: list[float] = []
    for number, member in enumerate(several):
        own = int(np.random.default_rng([seed, number, _MEMBER_STREAM]).integers(2**32))
        more = _members(member, gold, own, load, load_model, prefix=f"{number} ")
        members, weights = members + more, weights + [member.weight / len(more)] * len(more)
    return Population(members, weights, overlap, seed)


def reply_counts(labelers: Labeler | Population) -> dict[str, int]:
    """`JudgeLabeler.counts` of all judges together; empty where there are none."""
    each = labelers.labelers if isinstance(labelers, Population) else [labelers]
    judges = [labeler for labeler in each if isinstance(labeler, JudgeLabeler)]
    return {name: sum(judge.counts[name] for judge in judges) for name in (judges[0].counts if judges else ())}


def build_judges(
    config: JudgeConfig, seed: int, load_model: Callable[[str], CausalLM] = CausalLM.from_pretrained, prefix: str = ""
) -> list[Labeler]:
    """The judge of the settings or, with principles, one for each of them."""
    base = f"{prefix}judge: {config.served_name or config.model}"
    judge = partial(_judge(config, seed, load_model), swap=config.swap)
    principles = None if config.principles is None else read_principles(config.principles)
    if principles is None:
        usual = VERDICT_TEMPLATE if config.by == "verdict" else NEXT_WORD_TEMPLATE
    else:
        usual = PRINCIPLE_TEMPLATE if config.by == "verdict" else PRINCIPLE_NEXT_WORD_TEMPLATE
    template = read_template(config.template, usual)
    if principles is None and "{principle}" in template:
        raise ConfigError(f"{config.template} has a place for a principle, but there are no judge.principles")
    if principles is None:
        return [judge(template=template, name=base)]
    return principle_judges(judge, principles, template=template, name=f"{base}, principle: ")


def read_template(file: str | None, usual: str) -> str:
    """The text of a template's file, without line breaks at its end, after which the model goes on; none: the usual."""
    return usual if file is None else read_text(file).rstrip("\n")


def _judge(config: JudgeConfig, seed: int, load_model: Callable[[str], CausalLM]) -> Callable[..., Labeler]:
    if config.by == "verdict":
        return partial(JudgeLabeler, load_writer(config, seed, load_model), tie_policy=config.tie_policy)
    model, chat_template = load_model(config.model or ""), read_chat_template(config.chat_template)
    words = config.words or (
        ("A", "B") if Codec(model.tokenizer, chat_template=chat_template).is_chat else (" A", " B")
    )
    return partial(LogOddsJudge, continuation_log_odds(model, *words, chat_template=chat_template))


def _members(
    member: MemberConfig,
    gold: str | None,
    seed: int,
    load: Callable[[str], Any],
    load_model: Callable[[str], CausalLM],
    *,
    prefix: str = "",
) -> list[Labeler]:
    if member.judge.model is not None:
        return build_judges(member.judge, seed, load_model, prefix)
    own = member.gold or gold
    if own is None:
        raise ConfigError("a simulated labeler needs gold, the true reward that it knows")
    name = f"{prefix}{_name(own, member.biases, member.labeler, seed)}"
    return [SimulatedLabeler(_with_biases(load(own), member.biases), member.labeler, seed=seed, name=name)]


def _with_biases(gold: Any, biases: Mapping[str, float]) -> Any:
    """Gold, or the sum of gold and what else a labeler likes, by its name and weight."""
    if not biases:
        return gold
    known = {"log_words": log_words, "markdown_marks": markdown_marks, "sycophancy": sycophancy(VaderReward())}
    if unknown := [name for name in biases if name not in known]:
        raise ConfigError(f"{unknown[0]!r} is no bias: choose among {', '.join(known)}, or write a gold of your own")
    return weighted([(1.0, gold), *((weight, known[name]) for name, weight in biases.items())])


def _name(gold: str, biases: Mapping[str, float], errors: LabelerConfig, seed: int) -> str:
    """Whom a comparison is by: gold, biases, the two errors that every labeler has, and those that it has besides."""
    likes = [f"{weight:+} {name}" for name, weight in biases.items()]
    given = {name: value for name, value in to_dict(errors).items() if value != getattr(LabelerConfig(), name)}
    shown = {"temperature": errors.temperature, "flip_rate": errors.flip_rate, **given, "seed": seed}
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
    return f"simulated: {' '.join([gold, *likes])}, {said}"
