"""From settings to labelers: who answers the queries of `rlhf-env prefer`, and of every other command that asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_env.errors import ConfigError
from rlhf_env.preferences.labelers import SimulatedLabeler
from rlhf_env.preferences.populations import Population
from rlhf_env.preferences.utilities import log_words, markdown_marks, sycophancy, weighted
from rlhf_env.records.config import to_dict
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.settings import LabelerConfig
from rlhf_env.training.config import MemberConfig
from rlhf_env.types import Labeler

_MEMBER_STREAM = 8  # of the seeds of a population's members


def build_labelers(
    one: MemberConfig,
    several: Sequence[MemberConfig],
    overlap: int,
    *,
    gold: str,
    seed: int,
    load: Callable[[str], Any],
) -> Labeler | Population:
    """The `one` labeler or, where there are any, the `several`, whose seeds are made of the seed and their number.

    `gold` is the name of the true reward of those that name none, `load` makes a reward model of a name.
    """
    if not several:
        return _labeler(one, gold, seed, load)
    members = []
    for number, member in enumerate(several):
        own = int(np.random.default_rng([seed, number, _MEMBER_STREAM]).integers(2**32))
        members.append(_labeler(member, gold, own, load, prefix=f"{number} "))
    return Population(members, [member.weight for member in several], overlap, seed)


def _labeler(
    member: MemberConfig, gold: str, seed: int, load: Callable[[str], Any], *, prefix: str = ""
) -> SimulatedLabeler:
    gold = member.gold or gold
    name = f"{prefix}{_name(gold, member.biases, member.labeler, seed)}"
    return SimulatedLabeler(_with_biases(load(gold), member.biases), member.labeler, seed=seed, name=name)


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
