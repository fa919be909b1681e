"""RLOO: each response against the others to its prompt, written out."""

from __future__ import annotations

import torch

from rlhf_env.agents.rloo import RLOO, RLOOConfig
from tests.agents.gradients import STILL, assert_gradient_is_that_of, float64_policy, read, sampled


def test_an_update_is_the_method_written_out():
    """The whole response is one action: all its tokens have the advantage of its return."""
    rollout, policy, written = sampled(6, group_size=3), float64_policy(), float64_policy()
    RLOO(policy, RLOOConfig(**STILL, batch_size=6, group_size=3)).update(rollout)
    returns = [float(rollout.reward[i, :n].sum()) for i, n in enumerate(rollout.lengths.tolist())]
    losses = []
    for i, (logp, _, _) in enumerate(read(written, rollout)):
        others = [returns[j] for j in range(i - i % 3, i - i % 3 + 3) if j != i]
        losses += [-(returns[i] - sum(others) / 2) * each for each in logp]
    assert_gradient_is_that_of(torch.stack(losses).mean(), written, policy)
