"""Two reward models: safety where it is at stake, helpfulness elsewhere.

Touvron et al. 2023 (Llama 2, arXiv 2307.09288), §3.2.3. With R = σ(logit) of either model,

    R_c = R_s  where the prompt is tagged or R_s < 0.15,  R_h elsewhere;    score = WHITEN(LOGIT(R_c)).

LOGIT undoes σ, so what is chosen are the logits. To whiten is `normalised`, on a reference's responses: by the moments
of its batch, a score would depend on its batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.rewards import ScoreFn, require_whole, scores_of
from rlhf_env.errors import ConfigError
from rlhf_env.reward_models.cache import Cached
from rlhf_env.types import RewardModel


@dataclass(frozen=True)
class SafetyFirst:
    """The logit of `safety` where it says "unsafe" or the prompt is `tagged`, and that of `helpfulness` elsewhere.

    A classifier's are its `label_log_odds`, before it is normalised, since σ of nothing else is a probability; the
    scores of any other model are taken for logits as they are. A cached classifier gives scores alone and is refused:
    the cache belongs around the whole.
    """

    safety: RewardModel | ScoreFn
    helpfulness: RewardModel | ScoreFn
    threshold: float = 0.15  #: of σ(logit of safety): below it a response is unsafe
    tagged: Callable[[str], Any] | None = None  #: whether a prompt is about safety; none: no prompt is

    def __post_init__(self) -> None:
        require_whole("a choice between two rewards", self.safety, self.helpfulness)
        if not 0 < self.threshold < 1:
            raise ConfigError(f"the threshold must be a probability between 0 and 1, it is {self.threshold}")
        for model in (self.safety, self.helpfulness):
            if isinstance(model, Cached) and _logits_of(model.reward) is not model.reward:
                raise ConfigError("a cached classifier gives scores and no logits: cache the choice, not its members")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The logit that counts for each response, [B]."""
        safety, helpfulness = (
            scores_of(_logits_of(model), prompts, responses) for model in (self.safety, self.helpfulness)
        )
        unsafe = safety < math.log(self.threshold / (1 - self.threshold))  # σ(safety) < threshold
        if self.tagged is not None:
            unsafe |= np.array([bool(self.tagged(prompt)) for prompt in prompts], dtype=np.bool_)
        return np.where(unsafe, safety, helpfulness)


def _logits_of(model: Any) -> Any:
    """What says the log-odds of `model`: a method of it, or the model itself."""
    return getattr(model, "label_log_odds", None) or getattr(model, "logits", model)
