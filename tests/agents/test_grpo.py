"""GRPO in every form, written out."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch

from rlhf_env.agents.grpo import GRPO, GRPOConfig
from tests.agents.gradients import STILL, assert_gradient_is_that_of, float64_policy, read, sampled


@pytest.mark.parametrize("kl", ["reward", "k2", "k3"])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("average", ["response", "constant"])
def test_an_update_is_the_method_written_out(kl, scale, average):
    """Three responses to each of two prompts, with ratios that are clipped and penalties that count."""
    rollout, policy, written = sampled(6, group_size=3), float64_policy(), float64_policy()
    noise = torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    penalty, beta = torch.tensor([0.0, 0.5, 0, 0, 0, 2], dtype=torch.float64), 0.1 + 0.1 * rollout.score
    rollout = dataclasses.replace(rollout, logp=rollout.logp + 0.2 * noise, penalty=penalty, beta=beta)
    config = GRPOConfig(
        **STILL, batch_size=6, group_size=3, minibatches=1, clip=0.1, kl=kl, scale=scale, average=average
    )
    metrics = GRPO(policy, config).update(rollout)
    assert 0 < metrics["clip_fraction"] < 1

    lengths, longest = rollout.lengths.tolist(), rollout.response_ids.shape[1]
    worth = (rollout.score - rollout.penalty).tolist()
    if kl == "reward":
        worth = [float(rollout.reward[i, :n].sum()) for i, n in enumerate(lengths)]
    losses, deviations = [], []
    for i, (logp, _, _) in enumerate(read(written, rollout)):
        group = worth[i - i % 3 : i - i % 3 + 3]
        advantage = worth[i] - sum(group) / 3
        deviations.append(statistics.stdev(group))
        if scale:
            advantage /= deviations[i] + 1e-4
        terms = []
        for t in range(lengths[i]):
            ratio = (logp[t] - rollout.logp[i, t]).exp()
            term = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
            ahead = logp[t] - rollout.ref_logp[i, t]
            estimate = {"reward": 0 * ahead, "k2": ahead**2 / 2, "k3": (-ahead).exp() - 1 + ahead}[kl]
            terms.append(term - beta[i] * estimate)
        losses.append(-torch.stack(terms).sum() / (lengths[i] if average == "response" else longest))
    loss = torch.stack(losses).mean()
    assert metrics["policy_loss"] == pytest.approx(loss.item())
    assert metrics["group_deviation"] == pytest.approx(sum(deviations) / 6)
    assert_gradient_is_that_of(loss, written, policy)


def test_a_group_whose_members_are_worth_the_same_teaches_nothing():
    rollout, policy = sampled(6, group_size=3), float64_policy()
    equal = dataclasses.replace(rollout, reward=torch.zeros_like(rollout.reward))
    metrics = GRPO(policy, GRPOConfig(**STILL, batch_size=6, group_size=3, minibatches=1)).update(equal)
    assert metrics["gradient_norm"] == metrics["group_deviation"] == 0
