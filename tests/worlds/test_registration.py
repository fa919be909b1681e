"""Every registered environment passes both checkers and works with no arguments."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import rlhf_env  # noqa: F401  (registers the ids)
from rlhf_env.errors import UnboundPolicyWarning

IDS = sorted(name for name in gym.registry if name.startswith("rlhf_env/"))


def test_the_ids():
    names = ("Enumerable", "Keywords", "Reviews", "TextGeneration")
    assert [f"rlhf_env/{name}-v0" for name in names] == IDS


@pytest.mark.parametrize("name", IDS)
def test_both_checkers_without_a_warning(name):
    env = gym.make(name, kl_mode="off").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        sb3_check_env(env)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("check", [check_env, sb3_check_env])
def test_unbound_there_is_exactly_one_warning(name, check):
    env = gym.make(name).unwrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(env)
    assert [w.category for w in caught] == [UnboundPolicyWarning]


@pytest.mark.parametrize("name", IDS)
def test_no_time_limit_can_end_an_episode_before_the_reward_model_speaks(name):
    assert gym.spec(name).max_episode_steps is None


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_make_vec_is_the_batched_environment(name, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gym.make_vec(name, num_envs=3, kl_mode="off", autoreset_mode=mode)
        assert envs.metadata["autoreset_mode"] == mode
        observation, _ = envs.reset(seed=1)
        assert observation in envs.observation_space
        envs.action_space.seed(0)
        observation, reward, *_ = envs.step(envs.action_space.sample())
    assert observation in envs.observation_space
    assert reward.shape == (3,) and reward.dtype == np.float64


@pytest.mark.parametrize("name", IDS)
def test_an_episode_ends_with_its_decomposition(name):
    env = gym.make(name)
    env.action_space.seed(0)
    env.reset(seed=0)
    over, total, info = False, 0.0, {}
    with pytest.warns(UnboundPolicyWarning):
        while not over:
            _, reward, over, _, info = env.step(env.action_space.sample())
            total += reward
    assert total == pytest.approx(info["score"] - info["beta"] * info["kl"] - info["penalty"], abs=1e-9)
    assert {"logp", "ref_logp", "stop_reason", "prompt_length", "response_length"} <= info.keys()


def test_rendering_in_both_modes(capsys):
    env = gym.make("rlhf_env/Enumerable-v0", render_mode="ansi", kl_mode="observe")
    env.reset(seed=0)
    env.step(1)
    assert "b" in env.render()
    assert capsys.readouterr().out == ""
    env = gym.make("rlhf_env/Enumerable-v0", render_mode="human", kl_mode="off")
    env.reset(seed=0)
    env.step(2)
    assert "c" in capsys.readouterr().out
