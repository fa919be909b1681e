"""Soft Q-learning: what it remembers, whom its targets come from, and how it explores."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from rlhf_env.agents.soft_q import HeatedPolicy, SoftQ, SoftQConfig
from rlhf_env.errors import ConfigError
from rlhf_env.training.collect import collect
from rlhf_env.training.loop import next_rollouts, train
from rlhf_env.types import Rollout
from tests.agents.gradients import STILL, assert_gradient_is_that_of, float64_policy, read, sampled
from tests.builders import make_envs, random_model


def numbered(number: int):
    """A rollout that can be told from the others."""
    rollout = collect(random_model(seed=1), make_envs(4, kl_mode="reference"), episodes=4, seed=number)
    return dataclasses.replace(rollout, score=torch.full((4,), float(number)))


def test_an_update_is_the_method_written_out():
    """Targets are the slow network's, by a double sum over TD errors; the gradient is the policy's alone."""
    rollout, lam = sampled(kl_mode="reference"), 0.6
    rollout = dataclasses.replace(rollout, beta=torch.full_like(rollout.score, 0.35))
    policy, written, slow = float64_policy(), float64_policy(), float64_policy(seed=4)
    agent = SoftQ(policy, SoftQConfig(**STILL, batch_size=6, epochs=1, minibatches=1, lam=lam, target_rate=0.0))
    agent.target.load_state_dict(slow.state_dict())
    metrics = agent.update(rollout)
    losses = []
    for i, ((logp, _, values), (old_logp, _, old_values)) in enumerate(
        zip(read(written, rollout), read(slow, rollout), strict=True)
    ):
        n, beta = len(logp), float(rollout.beta[i])
        v, q = [*old_values.tolist(), 0.0], [(old_values[t] + beta * old_logp[t]).item() for t in range(n)]
        delta = [float(rollout.reward[i, t]) + v[t + 1] - q[t] for t in range(n)]
        for t in range(n):
            target = q[t] + sum(lam ** (k - t) * delta[k] for k in range(t, n))
            losses.append(0.5 * (values[t] + beta * logp[t] - target) ** 2)
    loss = torch.stack(losses).mean()
    assert metrics["q_loss"] == pytest.approx(loss.item())
    assert_gradient_is_that_of(loss, written, policy)
    assert all(p.grad is None for p in agent.target.parameters())


def test_the_newest_batches_are_remembered():
    agent = SoftQ(random_model(seed=1), SoftQConfig(learning_rate=0.0, batch_size=4, replay=3))
    for number, kept in enumerate(([0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4])):
        agent.update(numbered(number))
        assert [int(rollout.score[0]) for rollout in agent.replay] == kept


def test_each_pass_draws_one_batch_of_the_memory(monkeypatch):
    config = SoftQConfig(learning_rate=0.0, batch_size=4, replay=3, epochs=9, minibatches=2)
    agent, seen = SoftQ(random_model(seed=1), config), []
    loss_on = agent._loss_on

    def spied(memory: Rollout) -> Any:
        loss_of = loss_on(memory)
        return lambda rows: seen.append(int(memory.score[0])) or loss_of(rows)

    monkeypatch.setattr(agent, "_loss_on", spied)
    for number in range(4):
        agent.update(numbered(number))
    steps = seen[-18:]
    assert len(seen) == 4 * 18 and steps[::2] == steps[1::2]
    assert set(steps) == {1, 2, 3}


def test_the_target_follows_after_every_gradient_step():
    """One step: (1 − ρ) old + ρ new. At ρ = 1 it is the policy itself, at 0 it stays."""
    for rate in (0.0, 0.25, 1.0):
        policy = float64_policy()
        old = [p.detach().clone() for p in policy.parameters()]
        config = SoftQConfig(learning_rate=1e-2, batch_size=6, epochs=1, minibatches=1, target_rate=rate)
        agent = SoftQ(policy, config)
        agent.update(sampled(kl_mode="reference"))
        for slow, fast, before in zip(agent.target.parameters(), policy.parameters(), old, strict=True):
            assert not torch.equal(fast, before)
            torch.testing.assert_close(slow, (1 - rate) * before + rate * fast, atol=1e-12, rtol=0)


def test_exploring_heats_the_sampler_and_cools_to_the_law():
    """explore = 3 at first, 2 half-way, 1 at the end, times the law's ½; the log-probabilities are the sampler's."""
    policy = random_model(dtype="float64", seed=1)
    agent = SoftQ(policy, SoftQConfig(learning_rate=0.0, batch_size=8, explore=3.0))
    envs = make_envs(4, reference=random_model(dtype="float64"), temperature=0.5, kl_mode="reference")
    for progress, temperature in ((0.0, 1.5), (0.5, 1.0), (1.0, 0.5)):
        agent.progress = progress
        (rollout,) = next_rollouts(agent, envs, seed=1, start=0)
        hot = dataclasses.replace(rollout, law=dataclasses.replace(rollout.law, temperature=temperature))
        for i, (logp, _, _) in enumerate(read(policy, hot)):
            torch.testing.assert_close(rollout.logp[i, : len(logp)], logp.detach(), atol=1e-9, rtol=0)
        assert rollout.law.temperature == 0.5  # what is learned is the law's policy
        agent.update(rollout, progress)
        assert agent.progress == progress


def test_it_explores_less_as_the_budget_is_spent(monkeypatch):
    agent, heats = SoftQ(random_model(seed=1), SoftQConfig(batch_size=4, explore=3.0)), []

    def rollouts(sample):
        heats.append(agent.progress)
        return SoftQ.rollouts(agent, sample)

    monkeypatch.setattr(agent, "rollouts", rollouts)
    list(train(agent, make_envs(4, kl_mode="reference"), updates=4))
    assert heats == [0, 0, 0.25, 0.5]  # the update that is now sampled for has not begun


@pytest.mark.parametrize("kl_mode", ["reward", "observe", "off"])
def test_rewards_that_hold_the_policys_own_log_probabilities_are_refused(kl_mode):
    agent = SoftQ(random_model(seed=1), SoftQConfig(batch_size=4))
    with pytest.raises(ConfigError, match="SoftQ learns from rewards of kl_mode='reference'"):
        next(train(agent, make_envs(4, kl_mode=kl_mode), updates=1))


@pytest.mark.parametrize(
    "settings", [{"replay": 0}, {"lam": 1.1}, {"target_rate": -0.1}, {"explore": 0.9}, {"minibatches": 0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"SoftQ needs {next(iter(settings))}"):
        SoftQConfig(**settings)


@pytest.mark.parametrize("betas", [(0.0,), (0.3, 0.4)])
def test_its_temperature_is_one_beta_above_0(betas):
    """At β = 0 the policy would have no part in Q; in the memory two β would contradict each other."""
    agent = SoftQ(random_model(seed=1), SoftQConfig(learning_rate=0.0, batch_size=4))
    with pytest.raises(ConfigError, match="one β above 0 that stays"):
        for beta in betas:
            agent.update(dataclasses.replace(numbered(0), beta=torch.full((4,), beta)))


def test_a_heated_policy_can_be_copied():
    heated = HeatedPolicy(random_model(), 2.0)
    assert copy.deepcopy(heated).heat == 2.0 and heated.tokenizer is heated.policy.tokenizer
