"""REINFORCE: what comes after a token, less what the others got, written out."""

from __future__ import annotations

import torch

from rlhf_env.agents.reinforce import Reinforce, ReinforceConfig
from tests.agents.gradients import (
    STILL,
    assert_gradient_is_that_of,
    float64_policy,
    read,
    returns_to_go,
    sampled,
)


def test_an_update_is_the_method_written_out():
    rollout, policy, written = sampled(), float64_policy(), float64_policy()
    config = ReinforceConfig(**STILL, batch_size=6, entropy_coef=0.2, final_entropy_coef=0.0)
    metrics = Reinforce(policy, config).update(rollout, progress=0.25)
    rewards = [rollout.reward[i, :n].tolist() for i, n in enumerate(rollout.lengths.tolist())]
    losses = []
    for i, (logp, entropy, _) in enumerate(read(written, rollout)):
        others = [sum(r) for j, r in enumerate(rewards) if j != i]
        baseline = sum(others) / len(others)
        losses += [
            -(to_go - baseline) * logp[t] - 0.15 * entropy[t] for t, to_go in enumerate(returns_to_go(rewards[i]))
        ]
    assert_gradient_is_that_of(torch.stack(losses).mean(), written, policy)
    assert "entropy" in metrics and "policy_loss" in metrics
