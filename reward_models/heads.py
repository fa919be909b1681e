"""Heads with several logits, and how one number comes of them; config.json names the head as `reward_kind`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, Self

from torch import Tensor
from torch.nn.functional import logsigmoid, softplus
from torch.special import log_ndtr

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.records.config import Layer, build


class Head(Protocol):
    """What makes one number of a response's logits; a frozen dataclass whose fields are saved with the model."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its logits, [L]."""
        ...

    def reduce(self, logits: Tensor) -> Tensor:
        """One number for each response, [B, L] → [B]."""
        ...

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor | None:
        """log [P(first preferred) / P(second preferred)] as the model itself says, from logits [P, L] of each, [P].

        None where it says nothing of preferences.
        """
        ...

    def settled(self, logits: Tensor) -> Self:
        """The head as it is after its logits [N, L] of a reference's responses were seen."""
        ...


@dataclass(frozen=True)
class MeanVariance:
    """A score that is normally distributed over those who judge: μ − risk · σ, cautious where they disagree.

    Siththaranjan et al. 2024, arXiv 2312.08358.
    """

    risk: float = 0.0  #: deviations σ that are taken off; 1.28 is the score that nine of ten judges would exceed

    def __post_init__(self) -> None:
        if not -float("inf") < self.risk < float("inf"):
            raise ConfigError(f"risk must be finite, it is {self.risk}")

    @property
    def labels(self) -> tuple[str, ...]:  # noqa: D102 (as in Head)
        return "mean", "spread"

    def moments(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """μ [B] and σ² [B] > 0 from the logits [B, 2]: σ = softplus of the second."""
        return logits[:, 0], softplus(logits[:, 1]).square() + 1e-6

    def reduce(self, logits: Tensor) -> Tensor:  # noqa: D102
        mean, variance = self.moments(logits)
        return mean - self.risk * variance.sqrt()

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor:
        """log Φ(z) − log Φ(−z), z = (μ_1 − μ_2)/√(σ_1² + σ_2²), whatever the `risk`; [P, 2], [P, 2] → [P]."""
        (m1, v1), (m2, v2) = self.moments(first), self.moments(second)
        z = (m1 - m2) / (v1 + v2).sqrt()
        return log_ndtr(z) - log_ndtr(-z)

    def settled(self, logits: Tensor) -> Self:  # noqa: D102
        return self


@dataclass(frozen=True)
class Disentangled:
    """Quality and length on two heads, of which quality is the score. Chen et al. 2024 (ODIN), arXiv 2402.07319."""

    @property
    def labels(self) -> tuple[str, ...]:  # noqa: D102
        return "quality", "length"

    def reduce(self, logits: Tensor) -> Tensor:  # noqa: D102
        return logits[:, 0]

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor:
        """The difference of the sums of both, which is what learned to predict preferences; [P, 2], [P, 2] → [P]."""
        return (first - second).sum(-1)

    def settled(self, logits: Tensor) -> Self:  # noqa: D102
        return self


@dataclass(frozen=True)
class Rated:
    """One logit that predicts a rating, which says nothing of how probably people prefer the higher one."""

    mean: float = 0.0  #: of the ratings learned from
    std: float = 1.0  #: … and their deviation: the rating predicted is mean + std · logit

    def __post_init__(self) -> None:
        if not (-float("inf") < self.mean < float("inf") and 0 < self.std < float("inf")):
            raise ConfigError(f"ratings have a finite mean and a positive std; got {self.mean} and {self.std}")

    @property
    def labels(self) -> tuple[str, ...]:  # noqa: D102
        return ("rating",)

    def reduce(self, logits: Tensor) -> Tensor:
        """The rating predicted, in the unit of those learned from, [B, 1] → [B]."""
        return self.mean + self.std * logits[:, 0]

    def log_odds(self, first: Tensor, second: Tensor) -> None:  # noqa: D102
        return None

    def settled(self, logits: Tensor) -> Self:  # noqa: D102
        return self


@dataclass(frozen=True)
class Steps:
    """A logit for each step of a response: how probably it is right. The score is made of these probabilities.

    Their product is the probability that every step is right (Lightman et al. 2023, arXiv 2305.20050), which is
    smaller the more steps there are; the least of them is not.
    """

    aggregate: Literal["product", "min", "last"] = "product"  #: of the steps' probabilities, or that of the last step
    separator: str = "\n"  #: what stands between steps

    def __post_init__(self) -> None:
        if not self.separator:
            raise ConfigError("the separator of steps is a text of at least one character")

    @property
    def labels(self) -> tuple[str, ...]:  # noqa: D102
        return ("right",)

    def aggregated(self, logits: Tensor) -> Tensor:
        """The score of a response, in [0, 1], from the logits [S] of its steps; a number."""
        p = logits.sigmoid()
        return {"product": p.prod(), "min": p.amin(), "last": p[-1]}[self.aggregate]

    def reduce(self, logits: Tensor) -> Tensor:  # noqa: D102
        return logits[:, 0]

    def log_odds(self, first: Tensor, second: Tensor) -> None:  # noqa: D102
        return None

    def settled(self, logits: Tensor) -> Self:  # noqa: D102
        return self


@dataclass(frozen=True)
class Groups:
    """A logit for each group of people, or each person: the least of them, or their mean by weight.

    "min" scores a response by those who like it least (MaxMin-RLHF, Chakraborty et al. 2024, arXiv 2402.08925, which
    takes the least of the groups' *expected* scores: that of a policy is never below the expectation of this one).
    Each group's logits are brought to mean 0, variance 1 on the reference's responses first, as there is no other way
    to compare people.
    """

    names: tuple[str, ...]  #: of the groups
    weights: tuple[float, ...]  #: share of each, in sum 1
    aggregate: Literal["min", "mean"] = "min"  #: the least of the groups' scores, or their mean by weight
    means: tuple[float, ...] = ()  #: of each group's logits of the reference's responses; none: 0
    stds: tuple[float, ...] = ()  #: … and their deviations; none: 1

    def __post_init__(self) -> None:
        count = len(self.names)
        if count < 2 or len(set(self.names)) < count:
            raise ConfigError(f"there are at least two groups with different names; got {list(self.names)}")
        if len(self.weights) != count or min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6:
            raise ConfigError(f"{count} groups have {count} weights, none negative, in sum 1; got {list(self.weights)}")
        if len(self.means) != len(self.stds) or len(self.means) not in (0, count) or min(self.stds, default=1) <= 0:
            raise ConfigError(f"{count} groups have {count} means and positive stds, or none")

    @property
    def labels(self) -> tuple[str, ...]:  # noqa: D102
        return self.names

    def reduce(self, logits: Tensor) -> Tensor:  # noqa: D102
        scores = (logits - logits.new_tensor(self.means or 0.0)) / logits.new_tensor(self.stds or 1.0)
        return scores.amin(-1) if self.aggregate == "min" else scores @ logits.new_tensor(self.weights)

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor:
        """Those of somebody drawn by weight, P = Σ_g w_g σ(difference under g), whatever the `aggregate`; → [P]."""
        difference, share = first - second, first.new_tensor(self.weights).log()
        return (share + logsigmoid(difference)).logsumexp(-1) - (share + logsigmoid(-difference)).logsumexp(-1)

    def settled(self, logits: Tensor) -> Self:  # noqa: D102
        means, stds = logits.mean(0), logits.std(0, correction=0)
        if flat := [name for name, std in zip(self.names, stds.tolist(), strict=True) if std <= 1e-9]:
            raise RewardError(f"{', '.join(flat)} score all responses alike: no scale compares them with the others")
        return replace(self, means=tuple(means.tolist()), stds=tuple(stds.tolist()))


HEADS: dict[str, type[Any]] = {
    "mean_variance": MeanVariance,
    "disentangled": Disentangled,
    "rated": Rated,
    "steps": Steps,
    "groups": Groups,
}


def stored(head: Head | None) -> dict[str, Any]:
    """What config.json keeps of a head; of none, that of a plain classifier, too."""
    if head is None:
        return {"reward_kind": "label", "reward_head": {}}
    kind = next(name for name, cls in HEADS.items() if type(head) is cls)
    return {"reward_kind": kind, "reward_head": asdict(head)}  # type: ignore[call-overload]


def head_of(config: Any) -> Head | None:
    """The head that a model's configuration names; none for a plain classifier. `ConfigError` for an unknown kind."""
    kind = getattr(config, "reward_kind", "label")
    if kind == "label":
        return None
    if kind not in HEADS:
        raise ConfigError(f"the model is of the reward_kind {kind!r}; known are {', '.join(['label', *HEADS])}")
    fields = getattr(config, "reward_head", {})
    if not isinstance(fields, Mapping):
        raise ConfigError(f"reward_head holds the settings of {kind}; it is {fields!r}")
    head = build(HEADS[kind], Layer("config.json", fields), prefix="reward_head.")
    if len(head.labels) != config.num_labels:
        raise ConfigError(f"a head of the kind {kind} has {len(head.labels)} logits, the model {config.num_labels}")
    return head
