"""Minibatches of whole episodes, and the KL of a deferred reference on the tokens that it belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rlhf_env.agents.sb3 import (
    EpisodeRolloutBuffer,
    GRUExtractor,
    MaskableEpisodeRolloutBuffer,
    SB3VecEnv,
    attach_sb3,
)
from rlhf_env.agents.sb3 import buffer as buffer_module
from rlhf_env.agents.sb3.buffer import _balanced
from rlhf_env.errors import ConfigError
from rlhf_env.models.scoring import teacher_forced_logp
from tests.agents.sb3 import furthest, make_model, weights
from tests.builders import make_env, make_envs, random_model


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000, None])
@pytest.mark.parametrize("law", [{}, {"top_k": 4}], ids=["plain", "top_k"])
def test_minibatches_are_whole_episodes_and_each_transition_comes_once(batch_size, law):
    model = make_model(SB3VecEnv(make_envs(4, **law)), n_steps=12)
    model.learn(48)
    buffer = model.rollout_buffer
    seen, sizes = [], []
    for batch in buffer.get(batch_size):
        obs = batch.observations
        assert len(obs.row) == len(obs["input_ids"]) == len(batch.actions)
        assert obs.row.unique().tolist() == list(range(len(obs.last["input_ids"])))
        for row in range(len(obs.last["input_ids"])):  # within an episode: consecutive states up to the last
            mine = obs.row == row
            ends = obs.before_end[mine].tolist()
            assert ends == list(range(len(ends)))[::-1]
            lengths = obs["attention_mask"][mine].sum(1).tolist()
            assert lengths == [int(obs.last["attention_mask"][row].sum()) - end for end in ends]
            for ids, length in zip(obs["input_ids"][mine], lengths, strict=True):
                assert torch.equal(ids[:length], obs.last["input_ids"][row, :length])
        if law:
            assert obs["candidates"].shape == (len(batch.actions), 4)
            assert (obs["candidates"] == batch.actions).any(1).all(), "each action was among its own candidates"
        seen.extend(zip(batch.old_log_prob.tolist(), batch.returns.tolist(), strict=True))
        sizes.append(len(batch.actions))
    assert min(sizes) > 1
    assert sorted(seen) == sorted(
        zip(buffer.log_probs.flatten().tolist(), buffer.returns.flatten().tolist(), strict=True)
    )


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([4, 4, 4, 4], 8, [8, 8]),
        ([5, 3, 3, 3, 2], 8, [8, 8]),  # 5 + 3 and 3 + 3 + 2
        ([7, 1, 1, 1], 5, [3, 7]),
        ([5, 5, 1, 1], 1, [2, 5, 5]),  # never one transition alone
        ([1, 1, 1], 1, [3]),  # nor where that leaves one group
        ([1], 4, [1]),
        ([9], 3, [9]),  # nor an empty one
    ],
)
def test_groups_are_as_equal_as_whole_episodes_allow(lengths, size, expected):
    borders = np.cumsum([0, *lengths])
    episodes = [np.arange(a, b) for a, b in zip(borders, borders[1:], strict=False)]
    groups = list(_balanced(episodes, size))
    assert sorted(sum(map(len, group)) for group in groups) == expected
    members = [t for group in groups for episode in group for t in episode.tolist()]
    assert sorted(members) == list(range(sum(lengths)))


def test_groups_change_from_epoch_to_epoch():
    episodes = [np.arange(4 * i, 4 * i + 4) for i in range(16)]
    np.random.seed(0)
    epochs = [sorted(sorted(e[0] for e in group) for group in _balanced(episodes, 16)) for _ in range(2)]
    assert epochs[0] != epochs[1]


def collected(env: Any, rollouts: int = 2, **kwargs: Any) -> list[dict[str, np.ndarray]]:
    """What the buffer held after each rollout; nothing is learned, so that all see the same policy."""
    if kwargs.get("algorithm") is not A2C:
        kwargs["batch_size"] = 12
    model = make_model(env, learning_rate=0.0, n_steps=9, **kwargs)
    held = []
    for _ in range(rollouts):
        model.learn(36, reset_num_timesteps=False)
        buffer = model.rollout_buffer
        held.append(
            {name: getattr(buffer, name).copy() for name in ("rewards", "lump", "episode_starts", "advantages")}
        )
    return held


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"temperature": 0.7, "min_new_tokens": 2},
        {"length_limit": "truncate"},
        {"kl_placement": "terminal"},
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_a_deferred_reference_pays_what_a_cached_one_pays(env, algorithm):
    """The same rewards at every token and so the same advantages, also of episodes that two rollouts share."""
    cached, deferred = (
        collected(SB3VecEnv(make_envs(4, reference_backend=backend, **env)), algorithm=algorithm)
        for backend in ("cached", "deferred")
    )
    for ours, theirs in zip(deferred, cached, strict=True):
        np.testing.assert_array_equal(ours["episode_starts"], theirs["episode_starts"])
        np.testing.assert_allclose(ours["rewards"], theirs["rewards"], atol=1e-4)
        np.testing.assert_allclose(ours["advantages"], theirs["advantages"], atol=1e-3)
        assert (theirs["lump"] == 0).all()
    if "kl_placement" not in env:
        assert all((ours["lump"] != 0).any() for ours in deferred), "something was moved"


def test_the_reference_reads_a_whole_episode_once(monkeypatch):
    """Where its environment ends it; the buffer reads those that go on after the rollout."""
    read: list[int] = []

    def counted(policy: Any, rollout: Any) -> Any:
        read.append(len(rollout))
        return teacher_forced_logp(policy, rollout)

    monkeypatch.setattr(buffer_module, "teacher_forced_logp", counted)
    for tokens, expected in ((3, []), (4, [4])):  # rollouts of 9 steps, episodes of exactly so many tokens
        envs = make_envs(4, reference_backend="deferred", stop_at_eos=False, max_new_tokens=tokens)
        collected(SB3VecEnv(envs), rollouts=1)
        assert read == expected


def test_moving_the_charge_keeps_the_sum_of_every_episode():
    """Σ rewards of the episodes inside one rollout, with what the environment itself paid for them."""
    env, paid = SB3VecEnv(make_envs(4, reference_backend="deferred")), []
    model = make_model(env, learning_rate=0.0, n_steps=40, batch_size=40)
    model.learn(160, callback=lambda found, _: paid.append(found["rewards"].copy()) or True)
    before, after, starts = np.array(paid), model.rollout_buffer.rewards, model.rollout_buffer.episode_starts
    assert not np.allclose(before, after)
    checked = 0
    for column in range(4):
        borders = np.flatnonzero(starts[:, column]).tolist()
        for a, b in zip(borders, borders[1:], strict=False):
            assert after[a:b, column].sum() == pytest.approx(before[a:b, column].sum(), abs=1e-4)
            checked += 1
    assert checked > 20


def test_environments_of_their_own_are_relabelled_each():
    def one(**kwargs: Any) -> Any:
        reference = random_model()
        return lambda: make_env(reference=reference, tokenizer=reference.tokenizer, **kwargs)

    cached, deferred = (one(reference_backend=backend) for backend in ("cached", "deferred"))
    held = []
    for envs in ([cached] * 3, [deferred] * 3, [deferred, cached, deferred]):
        model = make_model(DummyVecEnv(envs), n_steps=12, batch_size=12, learning_rate=0.0)
        held.append(model.learn(36).rollout_buffer.rewards)
    np.testing.assert_allclose(held[1], held[0], atol=1e-4)
    np.testing.assert_allclose(held[2], held[0], atol=1e-4)


def small(**policy: Any) -> dict[str, Any]:
    """Settings of an agent with SB3's own policy."""
    return {"policy": "MultiInputPolicy", "policy_kwargs": {"features_extractor_class": GRUExtractor, **policy}}


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO, MaskablePPO])
def test_small_agents_are_relabelled_too(algorithm):
    """Rewards are moved to their tokens, and SB3's own policies read the minibatches of whole episodes."""
    buffer = MaskableEpisodeRolloutBuffer if algorithm is MaskablePPO else EpisodeRolloutBuffer
    held = []
    for backend in ("cached", "deferred"):
        env = SB3VecEnv(make_envs(4, reference_backend=backend))
        model = make_model(env, algorithm, rollout_buffer_class=buffer, **small())
        start = weights(model)
        held.append(model.learn(32).rollout_buffer.rewards)
        assert furthest(start, model) > 1e-5, "it learns"
    np.testing.assert_allclose(*held, atol=1e-4)


def test_whole_episodes_teach_a_small_agent_what_token_rows_teach_it():
    models = []
    for buffer in (EpisodeRolloutBuffer, DictRolloutBuffer):
        env = SB3VecEnv(make_envs(4, kl_mode="off"))
        settings = {"batch_size": 32, "n_epochs": 1, "learning_rate": 0.1, **small(optimizer_class=torch.optim.SGD)}
        model = make_model(env, attach=False, rollout_buffer_class=buffer, **settings)
        start = weights(model)
        models.append(model.learn(32))
        assert furthest(start, model) > 1e-3
    assert furthest(*models) < 1e-6


def test_what_cannot_be_relabelled_is_refused():
    def attach(env: Any, **kwargs: Any) -> None:
        attach_sb3(make_model(env, attach=False, **kwargs))

    deferred = {"reference_backend": "deferred"}
    with pytest.raises(ConfigError, match="rollout_buffer_class=EpisodeRolloutBuffer, or make .*='cached'"):
        attach(SB3VecEnv(make_envs(2, **deferred)), rollout_buffer_class=DictRolloutBuffer)
    attach(SB3VecEnv(make_envs(2, **deferred, kl_placement="terminal")), rollout_buffer_class=DictRolloutBuffer)
    with pytest.raises(ConfigError, match="rollout_buffer_class=MaskableEpisodeRolloutBuffer, or make"):
        attach(SB3VecEnv(make_envs(2, **deferred)), algorithm=MaskablePPO, policy="MultiInputPolicy")
    with pytest.raises(ConfigError, match="cannot put it on its tokens: make .*='cached'"):
        attach(SB3VecEnv(make_envs(2, **deferred)), algorithm=RecurrentPPO, policy="MultiInputLstmPolicy")
    for norm_reward in (False, True):
        env = VecNormalize(SB3VecEnv(make_envs(2, **deferred)), norm_obs=False, norm_reward=norm_reward)
        if not norm_reward:
            attach(env)
            continue
        with pytest.raises(ConfigError, match="norm_reward=False"):
            attach(env)


def test_the_first_ratio_is_one():
    model = make_model(SB3VecEnv(make_envs(4, top_k=5, min_new_tokens=2)), learning_rate=0.0)
    model.learn(64)
    assert model.logger.name_to_value["train/clip_fraction"] == 0
    assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-8
    assert isinstance(model.rollout_buffer, EpisodeRolloutBuffer)
