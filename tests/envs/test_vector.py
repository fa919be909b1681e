"""Many responses side by side: step for step as many single environments."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import ConfigError
from tests.builders import EOS, make_env, make_envs, random_model


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray) and a.dtype == object:
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (np.ndarray, float, np.floating)) and np.asarray(a).dtype.kind == "f":
        return np.allclose(a, b, atol=1e-5, rtol=1e-5)  # kl_k3 is an exponential
    return type(a) is type(b) and bool(np.all(a == b)) and getattr(a, "dtype", None) == getattr(b, "dtype", None)


class Tokens:
    """A process reward with named parts for the whole."""

    def score_tokens(self, prompts, responses):
        return [
            [0.1 * len(p) + 0.01 * ord(piece[:1] or "-") for piece in r]
            for p, r in zip(prompts, responses, strict=True)
        ]

    def score(self, prompts, responses):
        return {"length": [len(r) for r in responses], "prompt": [0.5 * len(p) for p in prompts]}


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "candidates": {"top_k": 4, "action": "candidate", "group_size": 2},
    "top-p": {"top_p": 0.9, "min_new_tokens": 2, "temperature": 1.5},
    "deferred": {"reference_backend": "deferred", "reward_model": Tokens(), "length_penalty": 0.1},
    "context": {"context_length": 8, "kl_placement": "terminal", "stop_strings": ("bc",), "group_size": 3},
    "reference": {"kl_mode": "reference", "reward_model": Tokens(), "beta": 0.4},
}


def unlikely(observation, actions):
    """A policy that costs no time, of states and actions alike; of what it is not asked about it knows nothing."""
    return -0.1 - 0.01 * observation["input_ids"].sum(1) - 0.2 * actions


@pytest.mark.parametrize(
    ("mode", "limit", "features"),
    list(itertools.product(AutoresetMode, ["terminate", "truncate"], FEATURES)),
    ids=lambda x: getattr(x, "name", x),
)
def test_the_batch_is_step_for_step_that_many_single_environments(mode, limit, features):
    kwargs = {"length_limit": limit, "missing_eos_penalty": 0.4, "max_new_tokens": 4, **FEATURES[features]}
    batch = make_envs(3, autoreset_mode=mode, **copy.deepcopy(kwargs))
    sync = SyncVectorEnv([lambda: make_env(**copy.deepcopy(kwargs))] * 3, autoreset_mode=mode)
    for envs in (batch, sync):
        bind_policy(envs, random_model(seed=1) if features == "plain" else unlikely)
    assert batch.observation_space == sync.observation_space and batch.action_space == sync.action_space
    ours, theirs = batch.reset(seed=5), sync.reset(seed=5)
    rng, ended = np.random.default_rng(0), 0
    for _ in range(24):
        assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))
        masks = np.stack([env.action_masks() for env in sync.envs])
        assert (masks == batch.action_masks()).all()
        if mode == AutoresetMode.DISABLED and len(ours) == 5 and (over := ours[2] | ours[3]).any():
            ours, theirs = (e.reset(options={"reset_mask": over.copy()}) for e in (batch, sync))
            continue
        masks[:, 4:EOS] = False  # often EOS, and seldom the same letter in all
        actions = np.array([rng.choice(np.flatnonzero(row)) if row.any() else 0 for row in masks])
        ours, theirs = batch.step(actions), sync.step(actions)
        ended += int((ours[2] | ours[3]).sum())
    assert ended > 8


def test_vector_reset_takes_prompts_for_each_environment():
    envs = make_envs(2, kl_mode="off")
    observation, info = envs.reset(options={"prompt": ["abc", "d"]})
    assert info["prompt_length"].tolist() == [3, 1]
    assert observation["input_ids"][:, 0].tolist() == [0, 3]
    observation, info = envs.reset(seed=3, options={"prompt": ["abcabc", None]})
    assert info["prompt_length"].tolist() == [6, envs.reset(seed=3)[1]["prompt_length"][1]]
    with pytest.raises(ValueError, match="1 texts for 2"):
        envs.reset(options={"prompt": ["abc"]})


def test_a_reset_by_hand_leaves_no_reset_for_the_next_step():
    envs = make_envs(2, kl_mode="off", autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    assert envs.step(np.array([EOS, 4]))[2].tolist() == [True, False]
    envs.reset(options={"reset_mask": np.array([True, False])})
    observation, *_ = envs.step(np.array([3, 4]))
    assert observation["response_mask"].sum(1).tolist() == [1, 2]


def test_final_information_is_of_the_state_that_ended():
    envs = make_envs(2, kl_mode="off", max_new_tokens=3)
    envs.reset(options={"prompt": ["ab", "c"]})
    envs.step(np.array([3, 4]))
    observation, _, terminated, _, infos = envs.step(np.array([EOS, 5]))
    assert terminated.tolist() == [True, False] and infos["_final_obs"].tolist() == [True, False]
    assert infos["final_obs"][0]["input_ids"][:5].tolist() == [0, 1, 3, EOS, 10] and infos["final_obs"][1] is None
    assert infos["final_info"]["response_length"].tolist() == [2, 0]
    assert not observation["response_mask"][0].any(), "and a new episode stands there"
    assert infos["_prompt_length"].tolist() == [True, False]
    infos["final_obs"][0]["input_ids"][:] = 7
    assert (envs.core.input_ids != 7).any()


def test_one_environment_whose_step_only_resets():
    envs = make_envs(1, autoreset_mode=AutoresetMode.NEXT_STEP, top_k=3)
    bind_policy(envs, random_model(seed=1))
    envs.reset(seed=0)
    while not envs.step(envs.action_masks().argmax(1))[2].any():
        pass
    assert not envs.action_masks().any()
    observation, reward, terminated, truncated, infos = envs.step(np.array([-5]))
    assert (reward.tolist(), terminated.tolist(), truncated.tolist()) == ([0.0], [False], [False])
    assert not observation["response_mask"].any() and infos["_prompt_length"].all()
    assert envs.action_masks().sum() == 3


def test_a_reset_that_is_refused_changes_nothing():
    envs = make_envs(2, kl_mode="off", autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    envs.step(np.array([EOS, 4]))
    for prompt in ("a" * 40, ["a"]):
        with pytest.raises(ValueError):
            envs.reset(options={"prompt": prompt})
    observation, *_ = envs.step(np.array([99, 4]))
    assert observation["response_mask"].sum(1).tolist() == [0, 2]


@pytest.mark.parametrize("mask", [[True], [1, 0], [False, False], [[True, False]]])
def test_a_reset_mask_that_is_none(mask):
    envs = make_envs(2, kl_mode="off")
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"reset_mask'\] must be bool \[2\] with at least one True"):
        envs.reset(options={"reset_mask": np.array(mask)})


def test_a_number_of_seeds_or_environments_that_is_none():
    with pytest.raises(ValueError, match="got 3 seeds for 2 environments"):
        make_envs(2, kl_mode="off").reset(seed=[1, 2, 3])
    with pytest.raises(ConfigError, match="num_envs must be at least 1, got 0"):
        make_envs(0)


def test_modes_by_their_names_and_seeds_as_they_were_given():
    assert make_envs(2, autoreset_mode="NEXT_STEP").autoreset_mode == AutoresetMode.NEXT_STEP
    assert make_envs(2, autoreset_mode="SameStep").autoreset_mode == AutoresetMode.SAME_STEP
    envs = make_envs(2)
    envs.reset(seed=7)
    assert envs.np_random_seed == (7, 8)
