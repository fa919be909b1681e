"""A score with an uncertainty: the probabilities that it was made of come back, and caution costs σ."""

import itertools
import math

import numpy as np
import pytest
import torch

from rlhf_env.errors import ConfigError
from rlhf_env.reward_models import load_reward
from rlhf_env.reward_models.bradley_terry import measure_comparisons, new_reward_model
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.heads import MeanVariance
from rlhf_env.reward_models.mean_variance import fit_mean_variance, preferred
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.types import Comparison
from tests.reward_models.test_bradley_terry import write_body

TEXTS = {"sure": (1.0, 0.3), "split": (1.2, 2.0), "dull": (0.0, 0.3), "bad": (-1.0, 0.5)}  # μ, σ


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return write_body(tmp_path_factory.mktemp("body"))


def probability(a, b):
    (m1, s1), (m2, s2) = TEXTS[a], TEXTS[b]
    return 0.5 * (1 + math.erf((m1 - m2) / math.hypot(s1, s2) / math.sqrt(2)))


def test_moments_and_caution_by_hand():
    """softplus(0) = log 2; softplus(log(e − 1)) = 1."""
    logits = torch.tensor([[3.0, 0.0], [1.0, math.log(math.e - 1)]], dtype=torch.float64)
    mean, variance = MeanVariance().moments(logits)
    assert mean.tolist() == [3, 1] and variance.tolist() == pytest.approx([math.log(2) ** 2, 1], abs=2e-6)
    assert MeanVariance().reduce(logits).tolist() == [3, 1]
    assert MeanVariance(risk=2).reduce(logits).tolist() == pytest.approx([3 - 2 * math.log(2), -1], abs=1e-5)
    with pytest.raises(ConfigError, match="risk must be finite"):
        MeanVariance(risk=math.nan)


def test_the_first_step_costs_what_the_formula_says(body):
    reward = new_reward_model(body, head=MeanVariance(), dtype=torch.float64)
    (m1, r1), (m2, r2) = reward.all_logits(["p "] * 2, ["good", "bad"]).tolist()
    # σ² is kept above 0 by 1e-6
    sigma = math.sqrt(math.log1p(math.exp(r1)) ** 2 + math.log1p(math.exp(r2)) ** 2 + 2e-6)
    p = 0.5 * math.erfc(-(m1 - m2) / sigma / math.sqrt(2))
    row = next(fit_mean_variance(reward, [Comparison("p ", ("good", "bad"), (0, 1))]))
    assert row["loss"] == pytest.approx(-math.log(p))
    assert preferred(new_reward_model(body, head=MeanVariance()), ["p "], ["good"], ["bad"]).item() == pytest.approx(
        p, abs=1e-4
    )


def test_who_is_divisive_is_found_and_scored_with_caution(body, tmp_path):
    reward = new_reward_model(body, head=MeanVariance(risk=1.0))
    pairs = list(itertools.combinations(TEXTS, 2))
    told = [(a, b, probability(a, b)) for a, b in pairs]
    judged = [Comparison("", (a, b), (0, 1) if p > 0.5 else (1, 0), preference=p) for a, b, p in told]
    list(fit_mean_variance(reward, judged, BradleyTerryConfig(learning_rate=1e-2, epochs=150, weight_decay=0)))
    found = preferred(reward, [""] * 6, [a for a, _ in pairs], [b for _, b in pairs])
    assert found.tolist() == pytest.approx([p for *_, p in told], abs=0.03)
    mean, variance = reward.head.moments(torch.from_numpy(reward.all_logits([""] * 4, list(TEXTS))))
    assert mean[1] > mean[0] and variance.argmax() == 1  # most like the split one best, and it is the most divisive
    sure, split, *_ = reward.score([""] * 4, list(TEXTS))
    assert sure > split
    reward.save_pretrained(tmp_path)
    again = load_reward(str(tmp_path))
    assert again.head == MeanVariance(risk=1.0)
    np.testing.assert_array_equal(again.score([""] * 4, list(TEXTS)), reward.score([""] * 4, list(TEXTS)))


def test_it_is_measured_by_the_probability_that_it_states():
    """μ − σ and Φ(z) disagree: 3 ± 4 against 0 ± 0.5 leads by −0.5 and is preferred with Φ(3/√16.25) = 0.7716."""

    class Told(ClassifierReward):
        head, label = MeanVariance(risk=1.0), None

        def __init__(self):
            pass

        def all_logits(self, prompts, responses):
            told = {"wild": [3.0, math.log(math.expm1(4))], "tame": [0.0, math.log(math.expm1(0.5))]}
            return np.array([told[r] for r in responses])

    p = 0.5 * (1 + math.erf(3 / math.sqrt(16.25) / math.sqrt(2)))
    measured = measure_comparisons(Told(), [Comparison("", ("wild", "tame"), (0, 1))])
    assert measured["log_loss"] == pytest.approx(-math.log(p), abs=1e-6) == pytest.approx(0.2593, abs=1e-3)
    assert measured["brier"] == pytest.approx((1 - p) ** 2, abs=1e-6)
    assert measured["ece"] == pytest.approx(1 - p, abs=1e-6)
    assert (measured["accuracy"], measured["margin"]) == (0.0, pytest.approx(-0.5, abs=1e-5))  # of the score


def test_certainty_beyond_what_a_probability_can_hold_is_finite():
    far, near = torch.tensor([[1e3, 0.0]], dtype=torch.float64), torch.tensor([[-1e3, 0.0]], dtype=torch.float64)
    odds = MeanVariance().log_odds(far, near)
    assert torch.isfinite(odds).all() and odds[0] > 1e5 and MeanVariance().log_odds(near, far)[0] == -odds[0]


def test_what_does_not_fit_is_refused(body):
    judged = [Comparison("p ", ("good", "bad"), (0, 1))]
    with pytest.raises(ConfigError, match="has the head MeanVariance"):
        next(fit_mean_variance(new_reward_model(body), judged))
    with pytest.raises(ConfigError, match="knows nothing of loss and l2"):
        config = BradleyTerryConfig(loss="best", l2=0.1)
        next(fit_mean_variance(new_reward_model(body, head=MeanVariance()), judged, config))
    with pytest.raises(ConfigError, match="no uncertainty"):
        preferred(new_reward_model(body), ["p"], ["a"], ["b"])
