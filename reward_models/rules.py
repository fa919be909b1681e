"""A preference less what rules say: score = r − Σ weight · P(the rule is broken).

After Sparrow (Glaese et al. 2022, arXiv 2209.14375), which adds what models of single rules say to what a preference
model says. A rule here is a regular expression, or anything that says how surely a response breaks it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.rewards import ScoreFn, require_whole, scores_of
from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.records.safe_text import safe_text
from rlhf_env.types import RewardModel


@dataclass(frozen=True)
class Rule:
    """What is subtracted where `broken`, which says of (prompts, responses) how surely, [B] in [0, 1]."""

    broken: RewardModel | ScoreFn
    weight: float = 1.0  #: subtracted from the score where the rule is surely broken

    def __post_init__(self) -> None:
        require_whole("a rule", self.broken)
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"the weight of a rule must be at least 0 and finite, it is {self.weight}")


def matches(pattern: str) -> Callable[[Sequence[str], Sequence[str]], Any]:
    """Says 1 of each response in which the regular expression is found, and 0 of the others.

    A pattern that backtracks, such as (a+)+b, can take forever on a response: a policy may find one that does.
    """
    return partial(_found, expression(pattern))


def expression(pattern: str) -> re.Pattern[str]:
    """The regular expression, compiled; `ConfigError` where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None


def _found(pattern: re.Pattern[str], prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(pattern.search(response) is not None) for response in responses]


@dataclass(frozen=True)
class RuleReward:
    """`preference` less the weights of the `rules` that a response breaks."""

    preference: RewardModel | ScoreFn
    rules: Mapping[str, Rule]

    def __post_init__(self) -> None:
        require_whole("a reward with rules", self.preference)
        if not self.rules:
            raise ConfigError("a reward with rules has at least one rule, this one has none")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """The part "preference" and, for each rule, "rule_NAME", which is at most 0; of each response, [B]."""
        parts = {"preference": scores_of(self.preference, prompts, responses)}
        for name, rule in self.rules.items():
            broken = scores_of(rule.broken, prompts, responses)
            if outside := np.flatnonzero((broken < 0) | (broken > 1)).tolist():
                row = outside[0]
                raise RewardError(
                    f"the rule {name!r} says {broken[row]} of row {row}, and how surely it is broken is between 0 and "
                    f'1; the response is "{safe_text(responses[row][:80])}"'
                )
            parts[f"rule_{name}"] = -rule.weight * broken
        return parts
