"""Evaluation: numbers by hand, and anchors whose value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_env.envs.beta import AdaptiveBeta
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import DataError
from rlhf_env.training.evaluate import distinct_n, evaluate, mean_interval, perplexity, rate_interval
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.builders import make_envs, make_rollout, random_model


def test_mean_interval_by_hand():
    # mean 3, sd √2.5 (n − 1 = 4), standard error √0.5
    interval = mean_interval("x", np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 1.959964 * math.sqrt(0.5)
    assert interval == pytest.approx({"x": 3.0, "x_low": 3 - half, "x_high": 3 + half}, abs=1e-6)
    assert mean_interval("x", np.array([2.0])) == {"x": 2.0}


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I: 81/263 and 0/20, method 3
    assert rate_interval("r", 81, 263) == pytest.approx({"r": 81 / 263, "r_low": 0.2553, "r_high": 0.3662}, abs=5e-5)
    assert rate_interval("r", 0, 20) == pytest.approx({"r": 0, "r_low": 0.0, "r_high": 0.1611}, abs=5e-5)


def test_distinct_n_by_hand():
    rollout = make_rollout(random_model(), [[0], [0]], [[1, 2, 1, 2], [3]], right=2)
    assert distinct_n(rollout, 1) == 3 / 5  # 1 2 1 2 3
    assert distinct_n(rollout, 2) == 2 / 3  # 12 21 12


def test_the_reference_ties_with_itself():
    model = random_model()
    result = evaluate(model, make_envs(4, reference=model), episodes=32)
    assert result.metrics["win_rate"] == 0.5
    assert abs(result.metrics["kl"]) < 1e-4
    assert result.metrics["score"] == pytest.approx(result.metrics["reference_score"])
    assert all(row["response"] == row["reference_response"] for row in result.samples)


def test_intervals_cover_what_they_should():
    """On an enumerable world the truth is known: of 60 intervals of 95 %, binomially 51 to 60 hold it (p > 0.999)."""
    world, policy = (
        EnumerableWorld.make(0, vocab_size=4, length=3),
        EnumerableWorld.make(1, vocab_size=4, length=3).policy(),
    )
    envs = TextGenerationVectorEnv(128, **world.env_kwargs())
    with torch.no_grad():
        log_probs = world.sequence_log_probs(policy)
    kl, gold = float(world.kl(log_probs)), float(world.expected_gold(log_probs))
    covered = {"kl": 0, "gold": 0}
    for seed in range(60):
        m = evaluate(policy, envs, episodes=128, gold=world.reward_model, seed=seed).metrics
        assert m["gold"] == pytest.approx(m["score"])
        covered["kl"] += m["kl_low"] < kl < m["kl_high"]
        covered["gold"] += m["gold_low"] < gold < m["gold_high"]
    assert all(51 <= count <= 60 for count in covered.values()), covered


def test_perplexity_is_that_of_the_model_itself_across_windows():
    policy = random_model()
    envs = make_envs(1, reference=policy)
    text = "abcdefghhgfedcba" * 10  # 160 tokens in a context of 64
    ids = torch.tensor(policy.tokenizer.encode(text))
    total = 0.0
    for start in range(0, 159, 63):
        piece = ids[start : start + 64][None]
        logits = policy.model(piece).logits[0, :-1].log_softmax(-1)  # type: ignore[operator]
        total -= logits.gather(-1, piece[0, 1:, None]).sum().item()
    assert perplexity(policy, envs.task, text) == pytest.approx(math.exp(total / 159), rel=1e-4)
    with pytest.raises(DataError, match="two tokens"):
        perplexity(policy, envs.task, "a")


def test_evaluation_leaves_an_adaptive_beta_alone():
    envs = make_envs(4, beta=AdaptiveBeta(initial=0.1, target=0.001, horizon=10))
    evaluate(random_model(seed=1), envs, episodes=8)
    assert envs.beta == pytest.approx(0.1)


def test_gold_sees_the_prompts_as_they_were_given():
    seen = []

    def gold(prompts, responses):
        seen.extend(prompts)
        return np.zeros(len(prompts))

    evaluate(random_model(), make_envs(2), ["abc", "d"], gold=gold)
    assert seen == ["abc", "d"]
