"""ReMax: each response against the greedy one to its own prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from rlhf_env.agents.remax import ReMax, ReMaxConfig
from rlhf_env.training.loop import next_rollouts
from tests.agents.gradients import STILL, assert_gradient_is_that_of, float64_policy, read, sampled
from tests.builders import make_envs, random_model


def test_an_update_is_the_method_written_out():
    rollout, greedy, policy, written = sampled(), sampled(), float64_policy(), float64_policy()
    baseline = torch.tensor([3.0, 1, 4, 1, 5, 9], dtype=torch.float64)
    reward = torch.zeros_like(greedy.reward)
    reward[:, 0] = baseline
    greedy = dataclasses.replace(greedy, reward=reward)
    metrics = ReMax(policy, ReMaxConfig(**STILL, batch_size=6)).update(rollout, greedy)
    losses = []
    for i, (logp, _, _) in enumerate(read(written, rollout)):
        advantage = float(rollout.reward[i, : len(logp)].sum()) - float(baseline[i])
        losses += [-advantage * each for each in logp]
    assert_gradient_is_that_of(torch.stack(losses).mean(), written, policy)
    assert metrics["greedy_score"] == 2.5  # of the scores 0 … 5


def test_the_baseline_is_the_likeliest_token_at_every_step_of_the_same_prompts():
    policy = random_model(seed=1)
    agent: Any = ReMax(policy, ReMaxConfig(batch_size=8))
    own, greedy = next_rollouts(agent, make_envs(4), seed=1, start=8)
    assert torch.equal(own.prompt_ids, greedy.prompt_ids)
    assert not torch.equal(own.response_ids, greedy.response_ids)
    for i, n in enumerate(greedy.lengths.tolist()):
        ids = greedy.prompt_ids[i][greedy.prompt_mask[i]].tolist()
        for token in greedy.response_ids[i, :n].tolist():
            assert int(policy.model(torch.tensor([ids])).logits[0, -1].argmax()) == token  # type: ignore[operator]
            ids.append(token)
