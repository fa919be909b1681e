"""Best-of-n: its metrics are the mean of the best over all subsets, and nothing is learned."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations

import pytest
import torch

from rlhf_env.agents.best_of_n import BestOfN, BestOfNConfig
from rlhf_env.errors import ConfigError
from rlhf_env.training.collect import collect
from tests.builders import make_envs, random_model


def test_metrics_are_those_of_all_subsets():
    """Six draws for each of two prompts, n = 5: of 1, 2, 4 and 5, by listing every subset."""
    scores = [[0.3, -1.0, 2.0, 0.5, 0.3, 1.5], [5.0, 4.0, 3.0, 2.0, 1.0, 9.0]]
    rollout = collect(random_model(seed=1), make_envs(4), episodes=12, group_size=6)
    rollout = dataclasses.replace(rollout, score=torch.tensor(scores).flatten())
    agent = BestOfN(random_model(seed=1), BestOfNConfig(n=5, draws=6, prompts=2))
    assert (agent.batch_size, agent.group_size, agent.best_of) == (12, 6, 5)
    metrics = agent.update(rollout)
    assert set(metrics) == {"kl_bound", *(f"score_best_of_{n}" for n in (1, 2, 4, 5))}
    for n in (1, 2, 4, 5):
        best = [sum(max(some) for some in combinations(row, n)) / math.comb(6, n) for row in scores]
        assert metrics[f"score_best_of_{n}"] == pytest.approx(sum(best) / 2)
    assert metrics["kl_bound"] == pytest.approx(math.log(5) - 4 / 5)


def test_a_power_of_two_comes_once():
    rollout = collect(random_model(seed=1), make_envs(4), episodes=8, group_size=4)
    metrics = BestOfN(random_model(seed=1), BestOfNConfig(n=4, draws=4, prompts=2)).update(rollout)
    assert list(metrics) == ["score_best_of_1", "score_best_of_2", "score_best_of_4", "kl_bound"]
    assert metrics["score_best_of_1"] == pytest.approx(float(rollout.score.mean()))


@pytest.mark.parametrize("settings", [{"n": 0}, {"n": 8, "draws": 7}, {"n": 1, "draws": 1}, {"prompts": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"needs"):
        BestOfNConfig(**settings)
