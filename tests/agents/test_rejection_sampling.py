"""Rejection sampling: of each group the best by its return is imitated, and nobody else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf_env.agents.rejection_sampling import RejectionSampling, RejectionSamplingConfig, best_of_groups
from tests.agents.gradients import STILL, assert_gradient_is_that_of, float64_policy, read, sampled


def test_the_best_of_each_group_and_of_equals_the_first():
    worth = torch.tensor([0.0, 3.0, -1.0, 5.0, 5.0, 5.0, 1.0, 2.0, 2.0])
    assert best_of_groups(worth, 3).tolist() == [1, 3, 7]
    assert best_of_groups(worth[:4], 2).tolist() == [1, 3]


def test_an_update_is_the_likelihood_of_the_best_by_return():
    """Every token of what was chosen weighs the same; the scores, 0 … 5, would choose others."""
    rollout, policy, written = sampled(6, group_size=3), float64_policy(), float64_policy()
    returns = torch.tensor([1.0, 4.0, 4.0, 7.0, 0.0, 2.0], dtype=torch.float64)
    reward = torch.zeros_like(rollout.reward)
    reward[:, 0] = returns
    rollout = dataclasses.replace(rollout, reward=reward)
    metrics = RejectionSampling(policy, RejectionSamplingConfig(**STILL, batch_size=6, group_size=3)).update(rollout)
    rows = read(written, rollout)
    loss = -torch.cat([rows[1][0], rows[3][0]]).mean()
    assert_gradient_is_that_of(loss, written, policy)
    assert metrics["nll"] == pytest.approx(loss.item())
    assert (metrics["chosen_score"], metrics["chosen_return"]) == (2, 5.5)


def test_nothing_of_the_others_matters():
    rollout = sampled(6, group_size=3)
    best = best_of_groups(rollout.returns, 3).tolist()
    rest = [i for i in range(6) if i not in best]
    other = dataclasses.replace(rollout, response_ids=rollout.response_ids.clone(), score=rollout.score.clone())
    other.response_ids[rest], other.score[rest] = 3, -7.0
    policies = []
    for data in (rollout, other):
        policies.append(policy := float64_policy())
        config = RejectionSamplingConfig(learning_rate=1e-2, batch_size=6, group_size=3, epochs=2, minibatches=2)
        RejectionSampling(policy, config).update(data)
    assert all(torch.equal(a, b) for a, b in zip(*(p.parameters() for p in policies), strict=True))
