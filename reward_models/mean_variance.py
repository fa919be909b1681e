"""A score with an uncertainty: how much the people who judge, or what they had in mind, differ about a response.

Siththaranjan, Laidlaw & Hadfield-Menell 2024 (distributional preference learning), arXiv 2312.08358. Each response has
μ and σ, the first of two is preferred with probability Φ((μ_1 − μ_2)/√(σ_1² + σ_2²)), and the score may be cautious:
μ − risk · σ. Only ratios of μ and σ count in the loss, so both have a unit of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf_env.errors import ConfigError
from rlhf_env.preference_losses import centering_penalty, less_margin, probit_loss, smoothed, unflipped
from rlhf_env.reward_models.bradley_terry import accuracy_of, flat_pairs, require_learnable, rows_of
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.heads import MeanVariance
from rlhf_env.reward_models.learning import learn, require_taken
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.types import Comparison


def fit_mean_variance(
    reward: ClassifierReward,
    comparisons: Sequence[Comparison],
    config: BradleyTerryConfig = BradleyTerryConfig(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Minimise the mean over comparisons of the mean `probit_loss` of their pairs; yields metrics per step.

    `reward` has the head `MeanVariance`. A margin and the centering are in units of μ.
    """
    head = reward.head
    if not isinstance(head, MeanVariance):
        raise ConfigError("a model with an uncertainty has the head MeanVariance: new_reward_model(body, head=…)")
    require_taken(config, "a model with an uncertainty", ("margin", "label_smoothing", "flip_rate", "center"))
    require_learnable(comparisons, config)
    rows = [rows_of(reward, c) for c in comparisons]

    def loss_of(batch: list[int]) -> tuple[Tensor, dict[str, float]]:
        mean, variance = head.moments(reward.read([row for i in batch for row in rows[i]]))
        those = [comparisons[i] for i in batch]
        pairs = flat_pairs(those)
        preference, strength, share = map(mean.new_tensor, (pairs.preference, pairs.strength, pairs.share))
        first, second = mean[pairs.first], mean[pairs.second]
        costs = probit_loss(
            less_margin(first - second, preference, config.margin * strength),
            variance[pairs.first] + variance[pairs.second],
            unflipped(smoothed(preference, config.label_smoothing), config.flip_rate),
        )
        costs = costs + config.center * centering_penalty(first, second)
        spread = {"spread": float(variance.detach().sqrt().mean())}
        return share @ costs / len(batch), accuracy_of(mean, those) | spread

    yield from learn(reward, len(rows), loss_of, config, seed)


def preferred(reward: ClassifierReward, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Tensor:
    """P(the first response is preferred to the second), [B], under the head `MeanVariance`."""
    if not isinstance(reward.head, MeanVariance):
        raise ConfigError("this reward model has no uncertainty: its head is not MeanVariance")
    logits = (torch.from_numpy(reward.all_logits(prompts, those)) for those in (first, second))
    return reward.head.log_odds(*logits).sigmoid()
