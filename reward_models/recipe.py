"""Reward models made of others, as a YAML file says: a `kind`, and its members, each a text or a recipe again.

A text is what --reward takes. Every key is checked, and a mistake is named by file and place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlhf_env.errors import ConfigError
from rlhf_env.records.config import Layer, build, read_layer
from rlhf_env.records.jsonl import read_jsonl
from rlhf_env.reward_models.cache import cached
from rlhf_env.reward_models.ensemble import Ensemble, quantile, worst_case
from rlhf_env.reward_models.normalise import Normalised, normalised
from rlhf_env.reward_models.remote import RemoteConfig, RemoteReward
from rlhf_env.reward_models.rules import Rule, RuleReward, expression, matches
from rlhf_env.reward_models.safety_first import SafetyFirst
from rlhf_env.reward_models.weighted_sum import WeightedSum
from rlhf_env.settings import HTTPConfig

T = TypeVar("T")
Load = Callable[[str], Any]

_DEEPEST = 16  # recipes inside recipes


def load_recipe(file: str | Path, load: Load) -> Any:
    """The reward model of the recipe in `file`; `load` makes a reward of a text.

    Files that a recipe names are looked for where the command runs, as those of other settings. Raises `ConfigError`.
    """
    layer = read_layer(file)
    return _Place(layer.source, "", load).reward(layer.values)


@dataclass(frozen=True)
class _Place:
    """A place in a recipe, at which rewards and sections can be read."""

    source: str
    prefix: str
    load: Load
    depth: int = 0

    def at(self, name: str) -> _Place:
        return _Place(self.source, f"{self.prefix}{name}.", self.load, self.depth + 1)

    def reward(self, value: Any) -> Any:
        where = f"{self.source}: {self.prefix.removesuffix('.')}" if self.prefix else self.source
        if self.depth > _DEEPEST:
            raise ConfigError(f"{where}: recipes are nested more than {_DEEPEST} deep; does one contain itself?")
        if isinstance(value, str):
            return self.load(value)
        if not isinstance(value, Mapping) or "kind" not in value:
            raise ConfigError(f"{where}: a reward is a text as --reward takes it, or a mapping with a kind")
        values = dict(value)
        if not isinstance(kind := values.pop("kind"), str) or kind not in KINDS:
            close = get_close_matches(str(kind), KINDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(KINDS)}"
            raise ConfigError(f"{where}: there is no kind {str(kind)[:40]!r}; {hint}")
        try:
            return self.section(KINDS[kind], values).made(self)
        except ConfigError as error:
            if str(error).startswith(self.source):
                raise
            raise ConfigError(f"{where}: {error}") from error

    def section(self, cls: type[T], value: Any) -> T:
        return build(cls, Layer(self.source, value), prefix=self.prefix)

    def rewards(self, name: str, values: Sequence[Any]) -> list[Any]:
        return [self.at(f"{name}[{i}]").reward(value) for i, value in enumerate(values)]


class _Kind(Protocol):
    def made(self, here: _Place) -> Any: ...


@dataclass(frozen=True)
class _Mean:
    """The mean of the members' scores."""

    members: tuple[Any, ...]

    def made(self, here: _Place) -> Ensemble:
        return Ensemble(here.rewards("members", self.members))


@dataclass(frozen=True)
class _WorstCase:
    """The lowest of the members' scores."""

    members: tuple[Any, ...]

    def made(self, here: _Place) -> Ensemble:
        return Ensemble(here.rewards("members", self.members), combine=worst_case)


@dataclass(frozen=True)
class _Quantile:
    """The quantile `q` of the members' scores."""

    members: tuple[Any, ...]
    q: float

    def made(self, here: _Place) -> Ensemble:
        return Ensemble(here.rewards("members", self.members), combine=quantile(self.q))


@dataclass(frozen=True)
class _LowerBound:
    """The mean of the members' scores less `k` of their deviations."""

    members: tuple[Any, ...]
    k: float

    def made(self, here: _Place) -> Ensemble:
        if self.k < 0:
            raise ConfigError(f"k must be at least 0, it is {self.k}: less than the mean is what a lower bound is")
        return Ensemble(here.rewards("members", self.members), bonus=-self.k)


@dataclass(frozen=True)
class _Part:
    reward: Any
    weight: float = 1.0


@dataclass(frozen=True)
class _Sum:
    """Σ weight · reward."""

    parts: dict[str, Any]

    def made(self, here: _Place) -> WeightedSum:
        return WeightedSum({name: self._part(part, here.at(f"parts.{name}")) for name, part in self.parts.items()})

    def _part(self, value: Any, here: _Place) -> tuple[Any, float]:
        part = here.section(_Part, value)
        return here.at("reward").reward(part.reward), part.weight


@dataclass(frozen=True)
class _Rule:
    pattern: str | None = None
    broken: Any = None
    weight: float = 1.0

    def made(self, here: _Place) -> Rule:
        if (self.pattern is None) == (self.broken is None):
            raise ConfigError(f"{here.source}: {here.prefix}pattern or {here.prefix}broken says what breaks the rule")
        says = here.at("broken").reward(self.broken) if self.pattern is None else matches(self.pattern)
        return Rule(says, self.weight)


@dataclass(frozen=True)
class _Rules:
    """A preference less the weights of the rules broken."""

    preference: Any
    rules: dict[str, Any]

    def made(self, here: _Place) -> RuleReward:
        places = {name: here.at(f"rules.{name}") for name in self.rules}
        rules = {name: at.section(_Rule, self.rules[name]).made(at) for name, at in places.items()}
        return RuleReward(here.at("preference").reward(self.preference), rules)


@dataclass(frozen=True)
class _SafetyFirst:
    """The safety model's logit where it says unsafe or the prompt matches `tagged`, else the helpfulness model's."""

    safety: Any
    helpfulness: Any
    threshold: float = 0.15
    tagged: str | None = None

    def made(self, here: _Place) -> SafetyFirst:
        tagged = None if self.tagged is None else expression(self.tagged).search
        safety, helpfulness = here.at("safety").reward(self.safety), here.at("helpfulness").reward(self.helpfulness)
        return SafetyFirst(safety, helpfulness, self.threshold, tagged)


@dataclass(frozen=True)
class _Normalised:
    """(reward − mean) / std, estimated on the responses in the file `on`, or as given."""

    reward: Any
    on: str | None = None
    mean: float | None = None
    std: float | None = None

    def made(self, here: _Place) -> Normalised:
        reward = here.at("reward").reward(self.reward)
        if self.on is not None and self.mean is self.std is None:
            return normalised(reward, *_responses_in(self.on))
        if self.on is None and self.mean is not None and self.std is not None:
            return Normalised(reward, self.mean, self.std)
        raise ConfigError("normalised needs a file of responses as `on`, or both mean and std")


@dataclass(frozen=True)
class _WeightAverage:
    """The classifier of averaged weights, normalised on the responses in the file `on`."""

    members: tuple[str, ...]
    on: str | None = None

    def made(self, here: _Place) -> Any:
        from rlhf_env.reward_models.averaged import average_weights
        from rlhf_env.reward_models.classifier import ClassifierReward

        members = here.rewards("members", self.members)
        if not all(isinstance(member, ClassifierReward) for member in members):
            raise ConfigError("weights are averaged of classifiers: each member is a folder, or folder:label")
        return average_weights(members, *(() if self.on is None else _responses_in(self.on)))


@dataclass(frozen=True)
class _ByStep:
    """A model of steps that pays where each step ends."""

    reward: str

    def made(self, here: _Place) -> Any:
        from rlhf_env.reward_models.classifier import ClassifierReward
        from rlhf_env.reward_models.process import ByStep

        reward = here.at("reward").reward(self.reward)
        if not isinstance(reward, ClassifierReward):
            raise ConfigError("by_step needs the folder of a model of steps as its reward")
        return ByStep(reward)


@dataclass(frozen=True)
class _Cached:
    """A reward that is asked about no text twice."""

    reward: Any
    size: int = 2**16

    def made(self, here: _Place) -> Any:
        return cached(here.at("reward").reward(self.reward), self.size)


@dataclass(frozen=True)
class _Remote:
    """A reward server."""

    url: str
    batch_size: int = RemoteConfig.batch_size
    at_once: int = RemoteConfig.at_once
    http: HTTPConfig = field(default_factory=HTTPConfig)

    def made(self, here: _Place) -> RemoteReward:
        return RemoteReward(self.url, RemoteConfig(self.batch_size, self.at_once, self.http))


KINDS: dict[str, type[_Kind]] = {
    "mean": _Mean,
    "worst_case": _WorstCase,
    "quantile": _Quantile,
    "lower_bound": _LowerBound,
    "sum": _Sum,
    "rules": _Rules,
    "safety_first": _SafetyFirst,
    "normalised": _Normalised,
    "weight_average": _WeightAverage,
    "by_step": _ByStep,
    "cached": _Cached,
    "remote": _Remote,
}


def _responses_in(file: str) -> tuple[list[str], list[str]]:
    """Prompts and responses of a .jsonl file."""
    rows = read_jsonl(file, required={"prompt": str, "response": str})
    return [row["prompt"] for row in rows], [row["response"] for row in rows]
