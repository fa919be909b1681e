"""Best-of-n: no learning at all; of n responses the one is given that the reward model likes best.

Stiennon et al. 2020 (arXiv 2009.01325); the estimator is that of Nakano et al. 2021 (arXiv 2112.09332).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_env.errors import ConfigError
from rlhf_env.functional import best_of_n, best_of_n_kl_bound
from rlhf_env.settings import require
from rlhf_env.types import Policy, Rollout


@dataclass(frozen=True)
class BestOfNConfig:
    """Settings of best-of-n."""

    n: int = 16  #: responses from which the best is chosen
    draws: int = 64  #: responses drawn for each prompt to estimate the best of 1, 2, 4 … n without bias, at least n
    prompts: int = 4  #: prompts per update

    def __post_init__(self) -> None:
        require(self, n=(1, None), prompts=(1, None))
        if self.draws < max(self.n, 2):
            raise ConfigError(f"the best of {self.n} needs at least as many draws (and 2), there are {self.draws}")


class BestOfN:
    """No learning: the best of n responses by the score, and unbiased estimates of what smaller n would give."""

    def __init__(self, policy: Policy, config: BestOfNConfig = BestOfNConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.policy, self.config = policy, config
        self.group_size, self.best_of = config.draws, config.n
        self.batch_size = config.draws * config.prompts

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        """The expected score of the best of 1, 2, 4 … n, and the KL that the choice costs at most, in nats."""
        scores = rollout.require_finite().score.reshape(-1, self.group_size)
        path = {2**k for k in range(self.config.n.bit_length()) if 2**k <= self.config.n} | {self.config.n}
        means = {f"score_best_of_{n}": float(best_of_n(scores, n).mean()) for n in sorted(path)}
        return {**means, "kl_bound": best_of_n_kl_bound(self.config.n)}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: there is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""
