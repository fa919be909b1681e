"""Quality apart from length: two heads predict preferences together, and only one of them may know the length.

Chen et al. 2024 (ODIN), arXiv 2402.07319. People often prefer the longer of two responses, reward models
learn that, and policies then write at length. The score of the head `Disentangled` is that of the quality head alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from rlhf_env.errors import ConfigError
from rlhf_env.reward_models.bradley_terry import accuracy_of, comparison_costs, require_learnable, rows_of
from rlhf_env.reward_models.classifier import ClassifierReward, linear_head
from rlhf_env.reward_models.heads import Disentangled
from rlhf_env.reward_models.learning import learn, require_taken
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.types import Comparison


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's ρ of two vectors [N], in [−1, 1]; 0 where one of them does not vary."""
    return cosine_similarity(x - x.mean(), y - y.mean(), dim=0)


def length_penalty(quality: Tensor, length_score: Tensor, lengths: Tensor) -> Tensor:
    """abs ρ(quality, length) − ρ(length score, length), from [N] responses of a batch.

    −1 at best, where all length is in the length head and none in the other.
    """
    return correlation(quality, lengths).abs() - correlation(length_score, lengths)


def fit_disentangled(
    reward: ClassifierReward,
    comparisons: Sequence[Comparison],
    config: BradleyTerryConfig = BradleyTerryConfig(),  # noqa: B008 (frozen)
    *,
    of_length: float = 1.0,
    orthogonal: float = 1.0,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Minimise `comparison_costs` of the sum of both heads with two penalties, yielding metrics per step.

    They are `of_length` times `length_penalty`, and `orthogonal` times the absolute cosine of the heads' weights.
    Lengths are in characters of the response. A correlation needs a batch: of few responses it is mostly chance.
    """
    if not isinstance(reward.head, Disentangled):
        raise ConfigError("quality apart from length needs the head Disentangled: new_reward_model(body, head=…)")
    require_taken(config, "a model of quality and length", ("loss", "margin", "label_smoothing", "flip_rate", "center"))
    require_learnable(comparisons, config)
    rows = [rows_of(reward, c) for c in comparisons]
    weight = linear_head(reward.model).weight

    def loss_of(batch: list[int]) -> tuple[Tensor, dict[str, float]]:
        quality, length_score = reward.read([row for i in batch for row in rows[i]]).unbind(-1)
        those = [comparisons[i] for i in batch]
        lengths = quality.new_tensor([len(response) for c in those for response in c.responses])
        ranking = comparison_costs(quality + length_score, those, config).mean()
        apart = cosine_similarity(weight[0], weight[1], dim=0).abs()
        loss = ranking + of_length * length_penalty(quality, length_score, lengths) + orthogonal * apart
        known = {"length_correlation": float(correlation(quality.detach(), lengths))}
        return loss, accuracy_of(quality, those) | known

    yield from learn(reward, len(rows), loss_of, config, seed)
