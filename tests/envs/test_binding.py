"""Where log π comes from: pushed, bound, found through wrappers; and silence, which is an error."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rlhf_env
from rlhf_env.envs.binding import bind_policy, find_cores
from rlhf_env.errors import ConfigError, MissingLogProbError
from rlhf_env.models.reading import left_padded
from tests.builders import EOS, make_env, make_envs, random_model


def test_push_and_bind_are_bitwise_equal():
    policy = random_model(seed=1)
    bound, pushed = make_envs(4), make_envs(4)
    bind_policy(bound, policy)
    obs, _ = bound.reset(seed=0)
    other, _ = pushed.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        actions = rng.integers(0, 11, 4)
        pushed.push_logprobs(policy.action_log_probs(other, actions, pushed.task.law), actions)
        obs, r1, *_ = bound.step(actions)
        other, r2, *_ = pushed.step(actions)
        assert (r1 == r2).all()


def test_a_stale_push_names_the_environment():
    envs = make_envs(2)
    envs.reset(seed=0)
    envs.push_logprobs([-1.0, -1.0], [3, 4])
    with pytest.raises(MissingLogProbError, match="told action 4 for environment 1, but 5"):
        envs.step(np.array([3, 5]))


def test_a_push_is_consumed_once():
    envs = make_envs(2)
    envs.reset(seed=0)
    envs.push_logprobs([-1.0, -1.0], [3, 4])
    envs.step(np.array([3, 4]))
    with pytest.raises(MissingLogProbError, match="before every step"):
        envs.step(np.array([3, 4]))


def test_a_row_that_is_only_reset_ignores_its_push():
    envs = make_envs(2, autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    envs.push_logprobs([-1.0, -1.0], [EOS, 4])
    _, _, terminated, *_ = envs.step(np.array([EOS, 4]))
    assert terminated.tolist() == [True, False]
    envs.push_logprobs([np.nan, -1.0], [0, 4])
    observation, reward, *_ = envs.step(np.array([7, 4]))  # 7 is ignored
    assert reward[0] == 0.0
    assert not observation["response_mask"][0].any()


@pytest.mark.parametrize("ignored", [-1, 10**6])
def test_a_bound_policy_is_never_asked_about_an_action_that_is_ignored(ignored):
    envs = make_envs(2, autoreset_mode=AutoresetMode.NEXT_STEP)
    bind_policy(envs, random_model(seed=1))
    envs.reset(seed=0)
    envs.step(np.array([EOS, 4]))
    _, reward, *_ = envs.step(np.array([ignored, 4]))
    assert reward[0] == 0.0 != reward[1]


def test_a_log_probability_that_is_not_finite():
    envs = make_envs(2)
    envs.reset(seed=0)
    envs.push_logprobs([-1.0, -np.inf], [3, 4])
    with pytest.raises(MissingLogProbError, match="environment 1 is -inf"):
        envs.step(np.array([3, 4]))


def test_bind_policy_goes_through_wrappers_and_refuses_other_processes():
    env = gym.make("rlhf_env/TextGeneration-v0")
    vector = gym.make_vec("rlhf_env/TextGeneration-v0", num_envs=2)
    sync = gym.make_vec("rlhf_env/TextGeneration-v0", num_envs=2, vectorization_mode="sync")
    assert [len(find_cores(e)) for e in (gym.wrappers.RecordEpisodeStatistics(env), vector, sync)] == [1, 1, 2]
    with pytest.raises(ConfigError, match="no text-generation environment inside"):
        find_cores(gym.make("CartPole-v1"))
    bind_policy(gym.wrappers.vector.RecordEpisodeStatistics(vector), lambda obs, actions: np.zeros(2))
    vector.reset(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector.step(np.array([1, 2]))


def test_top_level_push_goes_through_wrappers_and_takes_tensors():
    sync = SyncVectorEnv([lambda: gym.wrappers.RecordEpisodeStatistics(make_env())] * 2)
    batch = gym.wrappers.vector.RecordEpisodeStatistics(make_envs(2))
    logp, actions = torch.tensor([-1.5, -0.5], requires_grad=True), torch.tensor([4, 2])
    rewards = []
    for envs in (sync, batch):
        envs.reset(seed=0)
        rlhf_env.push_logprobs(envs, logp, actions)
        rewards.append(envs.step(actions.numpy())[1])
    np.testing.assert_allclose(rewards[0], rewards[1], atol=1e-5)


def test_an_agents_trained_weights_are_bitwise_equal_however_log_pi_is_told():
    """REINFORCE on stepped rewards: pushed, bound as a function, and bound as the model itself."""

    def trained(told: str) -> list[torch.Tensor]:
        envs, policy = make_envs(4), random_model(seed=1)
        law = envs.task.law
        if told == "bound":
            bind_policy(envs, lambda observation, actions: policy.action_log_probs(observation, actions, law))
        elif told == "the model":
            bind_policy(envs, policy)
        optimizer, rng = torch.optim.Adam(policy.parameters(), lr=1e-2), np.random.default_rng(0)
        observation, _ = envs.reset(seed=0)
        for _ in range(6):
            actions = rng.integers(0, 9, 4)
            if told == "pushed":
                envs.push_logprobs(policy.action_log_probs(observation, actions, law), actions)
            tensors = {name: torch.as_tensor(values) for name, values in observation.items()}
            ids, mask = left_padded(tensors["input_ids"], tensors["attention_mask"].bool())
            logits, _ = policy(ids, mask, keep=1)
            logp = law.log_probs(logits[:, -1], tensors["response_mask"].sum(1))[torch.arange(4), actions]
            observation, reward, *_ = envs.step(actions)
            optimizer.zero_grad()
            (-torch.as_tensor(reward).float() * logp).mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in policy.parameters()]

    pushed, bound, model = (trained(told) for told in ("pushed", "bound", "the model"))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(pushed, bound, model, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(pushed, random_model(seed=1).parameters(), strict=True))
