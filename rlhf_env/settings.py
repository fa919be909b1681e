"""Settings of the learning stages and of servers, apart from the code that uses them: `--help` imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rlhf_env.errors import ConfigError


@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning."""

    learning_rate: float = 1e-3  #: of AdamW, falling linearly to 0; large pretrained models want some 1e-5
    epochs: int = 3  #: passes over the demonstrations
    batch_size: int = 64  #: demonstrations per gradient step
    weight_decay: float = 0.01  #: of AdamW

    def __post_init__(self) -> None:
        _require_step_sizes(self)


@dataclass(frozen=True)
class LabelerConfig:
    """How a simulated labeler errs."""

    temperature: float = 0.25  #: in units of gold: a difference of one temperature is seen 73 % of the time; 0: always
    flip_rate: float = 0.0  #: share of rankings that come out upside down; ½: no information, 1: an adversary
    flip_scale: float | None = None  #: in units of gold: so much more difference, e times fewer flips; none: as many
    tie_within: float = 0.0  #: in units of gold: responses that differ by less are called a tie
    skip_below: float | None = None  #: no answer where the best response has less gold than this; none: always one
    first_bonus: float = 0.0  #: gold that what is shown first seems to have more than what is shown last
    fatigue: float = 0.0  #: temperature gained with each query's number, in units of gold

    def __post_init__(self) -> None:
        for name in ("temperature", "tie_within", "fatigue"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"the labeler's {name} must be at least 0 and finite, it is {value}")
        if not 0 <= self.flip_rate <= 1:
            raise ConfigError(f"the labeler's flip_rate must be between 0 and 1, it is {self.flip_rate}")
        if self.flip_scale is not None and not 0 < self.flip_scale < math.inf:
            raise ConfigError(f"the labeler's flip_scale must be positive and finite, it is {self.flip_scale}")
        for name in ("skip_below", "first_bonus"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ConfigError(f"the labeler's {name} must be finite, it is {value}")


@dataclass(frozen=True)
class BradleyTerryConfig:
    """Settings of learning a reward model from comparisons."""

    learning_rate: float = 1e-3  #: of AdamW, falling linearly to 0; large pretrained models want some 1e-5
    epochs: int = 2  #: passes over the comparisons
    batch_size: int = 32  #: comparisons per gradient step
    weight_decay: float = 0.01  #: of AdamW
    loss: Literal["pairs", "plackett_luce", "best"] = "pairs"  #: what counts of a ranking: pairs, all of it, its best
    ties: Literal["half", "davidson", "rao_kupper"] = "half"  #: a tie is half a win for each, or a third outcome
    tie_parameter: float | None = None  #: Davidson's ν > 0 or Rao and Kupper's θ > 1; none: learned
    margin: float = 0.0  #: logits by which the preferred is to lead, per unit of a comparison's strength
    label_smoothing: float = 0.0  #: every label is believed with 1 − this only, whether or not labels err
    flip_rate: float = 0.0  #: known share of labels that were turned over, corrected so that the mean loss is unbiased
    center: float = 0.0  #: weight of (r_i + r_j)², which keeps the logits of a pair around 0; 0.01 is common
    l2: float = 0.0  #: weight of the mean squared logit
    freeze_layers: int = 0  #: keep the embeddings and this many of the first blocks as they are
    lora_rank: int = 0  #: learn the head and adapters of this rank, merged into the body at the end; 0: no adapters

    def __post_init__(self) -> None:
        _require_step_sizes(self)
        require(self, margin=(0, None), center=(0, None), l2=(0, None), freeze_layers=(0, None), lora_rank=(0, None))
        for name in ("label_smoothing", "flip_rate"):
            if not 0 <= (rate := getattr(self, name)) < 0.5:
                raise ConfigError(f"{name} must be at least 0 and below 0.5, where labels say nothing; it is {rate}")
        for name, known in (("loss", ("pairs", "plackett_luce", "best")), ("ties", tuple(_LEAST_TIE))):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}; it is {value!r}")
        if self.label_smoothing and self.flip_rate:
            raise ConfigError(
                "label_smoothing doubts the labels and flip_rate undoes known flips: at equal rates they cancel out; "
                "leave one of them out"
            )
        if self.loss != "pairs" and (told := [name for name in _OF_PAIRS if getattr(self, name) != _OF_PAIRS[name]]):
            raise ConfigError(f"{' and '.join(told)} say what a pair costs: they need loss=pairs, not {self.loss}")
        least = _LEAST_TIE[self.ties]
        if self.tie_parameter is not None and (least is None or not least < self.tie_parameter < math.inf):
            need = "needs ties=davidson or rao_kupper" if least is None else f"of {self.ties} must be above {least}"
            raise ConfigError(f"tie_parameter {need}, it is {self.tie_parameter}")
        if self.freeze_layers and self.lora_rank:
            raise ConfigError("lora_rank keeps the whole body as it is already: leave freeze_layers out")


_LEAST_TIE = {"half": None, "davidson": 0, "rao_kupper": 1}
_OF_PAIRS = {"ties": "half", "margin": 0.0, "label_smoothing": 0.0, "flip_rate": 0.0}


@dataclass(frozen=True)
class BradleyTerryKind:
    """One score, such that differences predict preferences; how it learns, `fit` says."""


@dataclass(frozen=True)
class AnnotatorsKind:
    """A score for each labeler, learned from their own judgements."""

    aggregate: Literal["min", "mean"] = "min"  #: the least of the labelers' scores, or their mean by judgements


@dataclass(frozen=True)
class MixtureKind:
    """A score for each of a few groups of labelers, who belongs where being found by expectation–maximisation."""

    groups: int = 2  #: how many, called group1, group2 …
    rounds: int = 5  #: of asking anew where labelers belong; each is fit.epochs of learning
    aggregate: Literal["min", "mean"] = "min"  #: the least of the groups' scores, or their mean by share of labelers

    def __post_init__(self) -> None:
        require(self, groups=(2, None), rounds=(1, None))


@dataclass(frozen=True)
class MeanVarianceKind:
    """A mean and a deviation of each response, over those who judge; preferences are probit."""

    risk: float = 0.0  #: deviations that are taken off the mean; 1.28 is the score that nine of ten would exceed


@dataclass(frozen=True)
class DisentangledKind:
    """Quality and length on two heads, of which quality is the score (ODIN)."""

    of_length: float = 1.0  #: weight of the correlations with length
    orthogonal: float = 1.0  #: weight of the cosine between the heads

    def __post_init__(self) -> None:
        require(self, of_length=(0, None), orthogonal=(0, None))


@dataclass(frozen=True)
class RatingsKind:
    """A score that predicts ratings: rows of "prompt", "response" and "rating"."""


@dataclass(frozen=True)
class StepsKind:
    """A probability that each step of a response is right: rows of "prompt", "steps" and "labels"."""

    aggregate: Literal["product", "min", "last"] = "product"  #: what makes one score of the steps' probabilities
    separator: str = "\n"  #: what stands between steps


#: The kinds of reward model that can be learned, each with what its settings are.
REWARD_KINDS: dict[str, type] = {
    "bradley_terry": BradleyTerryKind,
    "annotators": AnnotatorsKind,
    "mixture": MixtureKind,
    "mean_variance": MeanVarianceKind,
    "disentangled": DisentangledKind,
    "ratings": RatingsKind,
    "steps": StepsKind,
}


@dataclass(frozen=True)
class HTTPConfig:
    """How patient a client is with a server."""

    connect_timeout: float = 10.0  #: seconds until a connection must stand
    read_timeout: float = 300.0  #: seconds that a server may be silent, also while it works on its answer
    timeout: float = 900.0  #: seconds for one request in all: every attempt, and the waits between them
    attempts: int = 5  #: how often a request is sent where the server is away, busy (429) or broken (5xx)
    first_wait: float = 0.5  #: seconds before the second attempt, at random half to all of it; then twice as long …
    longest_wait: float = 30.0  #: … up to this many seconds

    def __post_init__(self) -> None:
        require(self, attempts=(1, None), first_wait=(0, None), longest_wait=(0, None))
        for name in ("connect_timeout", "read_timeout", "timeout"):
            if not 0 < (seconds := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} must be a positive number of seconds, it is {seconds}")


@dataclass(frozen=True)
class ServerConfig:
    """The server that a policy's URL names: what it serves, and how it is asked."""

    model: str | None = None  #: where the policy is a URL: the name under which the server knows the model
    tokenizer: str | None = None  #: where the policy is a URL: folder or hub name of the model's tokenizer
    logprobs: Literal["raw", "processed"] = "raw"  #: the server's log-probabilities: before the temperature, or after
    http: HTTPConfig = field(default_factory=HTTPConfig)  #: how patiently it is asked


def require(config: object, **limits: tuple[float, float | None]) -> None:
    """Raise `ConfigError` where a setting is below the first of its limits, or above the second if there is one.

    Settings that are none are left alone.
    """
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is None or (least <= value and (most is None or value <= most) and value < math.inf):
            continue
        who = type(config).__name__.removesuffix("Config")
        between = f"of at least {least}" if most is None else f"between {least} and {most}"
        raise ConfigError(f"{who} needs {name} {between}, it is {value}")


def require_groups(config: object, batch_size: int, group_size: int) -> None:
    """Raise `ConfigError` where a batch is not made of whole groups of at least two."""
    who = type(config).__name__.removesuffix("Config")
    if group_size < 2 or batch_size < group_size or batch_size % group_size:
        raise ConfigError(
            f"{who} compares responses to the same prompt, so it needs group_size of at least 2 and a batch_size that "
            f"is a multiple of it; they are {group_size} and {batch_size}"
        )


def _require_step_sizes(config: SFTConfig | BradleyTerryConfig) -> None:
    for name, least in (("epochs", 1), ("batch_size", 1)):
        if (value := getattr(config, name)) < least:
            raise ConfigError(f"{name} must be at least {least}, it is {value}")
    if not 0 < config.learning_rate < math.inf:
        raise ConfigError(f"learning_rate must be positive and finite, it is {config.learning_rate}")
    if not 0 <= config.weight_decay < math.inf:
        raise ConfigError(f"weight_decay must be at least 0 and finite, it is {config.weight_decay}")
