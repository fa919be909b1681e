"""Many responses side by side: step for step as many single environments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlhf_env.envs.binding import bind_policy
from tests.builders import EOS, make_env, make_envs, random_model


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray) and a.dtype == object:
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (np.ndarray, float, np.floating)) and np.asarray(a).dtype.kind == "f":
        return np.allclose(a, b, atol=1e-5, rtol=0)
    return type(a) is type(b) and bool(np.all(a == b)) and getattr(a, "dtype", None) == getattr(b, "dtype", None)


@pytest.mark.parametrize(
    ("mode", "limit"),
    list(itertools.product(AutoresetMode, ["terminate", "truncate"])),
    ids=lambda x: getattr(x, "name", x),
)
def test_the_batch_is_step_for_step_that_many_single_environments(mode, limit):
    kwargs = {"length_limit": limit, "missing_eos_penalty": 0.4, "max_new_tokens": 4}
    batch = make_envs(3, autoreset_mode=mode, **kwargs)
    sync = SyncVectorEnv([lambda: make_env(**kwargs)] * 3, autoreset_mode=mode)
    for envs in (batch, sync):
        bind_policy(envs, random_model(seed=1))
    assert batch.observation_space == sync.observation_space and batch.action_space == sync.action_space
    ours, theirs = batch.reset(seed=5), sync.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(40):
        assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if mode == AutoresetMode.DISABLED and len(ours) == 5 and (over := ours[2] | ours[3]).any():
            ours, theirs = (e.reset(options={"reset_mask": over.copy()}) for e in (batch, sync))
            continue
        actions = rng.choice([1, 2, 3, EOS], 3)
        ours, theirs = batch.step(actions), sync.step(actions)


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
