"""Wrappers, vectors, specs, copies and pickles: the environment among what others put around it."""

from __future__ import annotations

import copy
import pickle
import warnings

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import nn

import rlhf_env
from rlhf_env.agents.sb3 import SB3VecEnv
from rlhf_env.envs.beta import AdaptiveBeta
from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import ConfigError, MissingLogProbError
from tests.builders import EOS, PROMPTS, letter_score, make_env, make_envs, random_model

ID = "rlhf_env/TextGeneration-v0"
FEATURES = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_k": 3, "action": "candidate"},
    {"group_size": 3, "context_length": 8},
]


def silent(env):
    bind_policy(env, lambda observation, actions: np.full(len(actions), -0.5))
    return env


@pytest.mark.parametrize("features", FEATURES[2:], ids="-".join)
def test_both_checkers_are_content(features):
    """Where any action is allowed: they act at random, and what top-k leaves of a vocabulary they do not ask."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make_env(kl_mode="off", **features), skip_render_check=True)
        sb3_check_env(make_env(kl_mode="off", **features))


# --- action masks -----------------------------------------------------------------------------------


def test_masks_have_the_shape_that_maskable_algorithms_want():
    env = make_env(kl_mode="off", top_k=3, min_new_tokens=1)
    env.reset(seed=0)
    assert env.action_masks().shape == (11,) and env.action_masks().dtype == np.bool_
    assert env.action_masks().sum() == 3 and not env.action_masks()[EOS]
    ranks = make_env(kl_mode="off", top_k=3, action="candidate")
    ranks.reset(seed=0)
    assert ranks.action_masks().tolist() == [True] * 3
    both = DummyVecEnv([lambda: Monitor(make_env(kl_mode="off", top_k=3))] * 2)
    both.reset()
    assert np.stack(both.env_method("action_masks")).sum(1).tolist() == [3, 3]


def test_sampling_with_the_mask_is_never_refused():
    envs = make_envs(2, kl_mode="off", top_k=4, top_p=0.8, min_new_tokens=2, autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        masks = envs.action_masks()
        over = envs._over
        assert (masks.sum(1) > 0).tolist() == (~over).tolist(), "of an episode that is over nothing is left"
        envs.step(np.array([rng.choice(np.flatnonzero(row)) if row.any() else 99 for row in masks]))


def test_unbound_a_row_that_only_resets_disturbs_nobody():
    envs = make_envs(2, top_k=3, autoreset_mode=AutoresetMode.NEXT_STEP, max_new_tokens=3)
    envs.reset(seed=0)
    envs.core._warned = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            *_, infos = envs.step(envs.action_masks().argmax(1))
            if "logp" in infos:
                assert np.allclose(infos["logp"][infos["_logp"]], -np.log(3))


# --- wrappers ---------------------------------------------------------------------------------------


def test_episode_statistics_of_one_and_of_many():
    env = gym.wrappers.RecordEpisodeStatistics(silent(make_env()))
    env.reset(seed=0)
    total = sum(env.step(token)[1] for token in (1, 2))
    *_, info = env.step(EOS)
    assert info["episode"]["l"] == 3
    assert info["episode"]["r"] == pytest.approx(info["score"] - 0.3 * info["kl"], abs=1e-5) and total != 0
    envs = gym.wrappers.vector.RecordEpisodeStatistics(silent(make_envs(2)))
    envs.reset(seed=0)
    envs.step(np.array([1, 2]))
    *_, infos = envs.step(np.array([EOS, 2]))
    final = infos["final_info"]
    assert infos["episode"]["l"].tolist() == [2, 0]
    assert infos["episode"]["r"][0] == pytest.approx(final["score"][0] - 0.3 * final["kl"][0], abs=1e-5)


def test_monitors_report_the_parts_of_the_return():
    keys = ("score", "kl", "penalty", "response_length")
    monitor = Monitor(silent(make_env()), info_keywords=keys)
    monitor.reset(seed=0)
    monitor.step(1)
    *_, info = monitor.step(EOS)
    assert info["episode"]["r"] == pytest.approx(info["score"] - 0.3 * info["kl"] - info["penalty"], abs=1e-5)
    assert set(keys) <= info["episode"].keys() and info["episode"]["response_length"] == 2
    many = VecMonitor(SB3VecEnv(silent(make_envs(2))), info_keywords=keys)
    many.reset()
    many.step(np.array([1, 1]))
    *_, infos = many.step(np.array([EOS, 1]))
    assert infos[0]["episode"]["r"] == pytest.approx(infos[0]["score"] - 0.3 * infos[0]["kl"], abs=1e-4)
    assert "episode" not in infos[1]


@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_the_batch_as_sb3_sees_it_is_a_dummy_vec_env(features):
    dummy, ours = DummyVecEnv([lambda: make_env(**features)] * 2), SB3VecEnv(make_envs(2, **features))
    for envs in (dummy, ours):
        silent(envs)
        envs.seed(4)
    first, second = dummy.reset(), ours.reset()
    rng = np.random.default_rng(0)
    for _ in range(16):
        assert all(
            (first[k] == second[k]).all() if k != "candidate_logp" else np.allclose(first[k], second[k], atol=1e-5)
            for k in first
        )
        masks = np.stack(dummy.env_method("action_masks"))
        assert (masks == ours.venv_.action_masks()).all()
        actions = np.array([rng.choice(np.flatnonzero(row)) for row in masks])
        first, reward, done, infos = dummy.step(actions)
        second, same, also_done, same_infos = ours.step(actions)
        np.testing.assert_allclose(reward, same, atol=1e-5)
        assert (done == also_done).all()
        for a, b in zip(infos, same_infos, strict=True):
            assert a.keys() - {"TimeLimit.truncated"} == b.keys() - {"TimeLimit.truncated"}
            assert a["TimeLimit.truncated"] == b.get("TimeLimit.truncated", False)
            assert a.get("stop_reason") == b.get("stop_reason")


# --- made by Gymnasium ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", AutoresetMode)
def test_make_vec_sync_and_batched_are_the_same(mode):
    kwargs = {"prompts": PROMPTS, "reference": random_model(), "max_new_tokens": 3, "reward_model": letter_score}
    batch = gym.make_vec(ID, num_envs=2, **kwargs, autoreset_mode=mode)
    sync = gym.make_vec(ID, num_envs=2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **kwargs)
    for envs in (batch, sync):
        silent(envs)
        envs.reset(seed=1)
    for actions in ([1, 2], [EOS, 3], [1, 4]):
        if mode == AutoresetMode.DISABLED and actions == [1, 4]:
            break
        ours, theirs = (envs.step(np.array(actions)) for envs in (batch, sync))
        assert (ours[0]["input_ids"] == theirs[0]["input_ids"]).all()
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


def test_in_other_processes_there_is_no_kl_and_binding_says_so():
    envs = gym.make_vec("rlhf_env/Enumerable-v0", num_envs=2, vectorization_mode="async", kl_mode="off")
    try:
        observation, _ = envs.reset(seed=3)
        expected = gym.make_vec("rlhf_env/Enumerable-v0", num_envs=2, vectorization_mode="sync", kl_mode="off")
        assert (observation["input_ids"] == expected.reset(seed=3)[0]["input_ids"]).all()
        assert envs.step(np.array([1, 2]))[1].shape == (2,)
        with pytest.raises(ConfigError, match="AsyncVectorEnv keeps its environments in other processes"):
            bind_policy(envs, random_model())
    finally:
        envs.close()


def test_a_time_limit_is_refused_wherever_it_comes_from():
    message = "TimeLimit .*before the reward model speaks.*max_new_tokens"
    with pytest.raises(ConfigError, match=message):
        gym.make_vec(ID, num_envs=2, max_episode_steps=5)
    limited = gym.make(ID, max_episode_steps=5)
    with pytest.raises(ConfigError, match=message):
        bind_policy(limited, random_model())
    with pytest.raises(ConfigError, match=message):
        rlhf_env.push_logprobs(gym.wrappers.RecordEpisodeStatistics(limited), -1.0, 1)


def test_a_policy_whose_dropout_is_on_is_refused():
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.1)

        def forward(self, observation, actions):
            return np.zeros(len(actions))

    policy = Policy()
    with pytest.raises(ConfigError, match=r"dropout is on in drop.*policy.eval\(\)"):
        bind_policy(make_env(), policy)
    bind_policy(make_env(), policy.eval())
    policy.train().drop.p = 0.0
    bind_policy(make_env(), policy)


# --- specs and copies -------------------------------------------------------------------------------


class Uncopied:
    """A reward model that no one may copy."""

    def __deepcopy__(self, memo):
        raise AssertionError("a model was copied")

    def score(self, prompts, responses):
        return letter_score(prompts, responses)


class UncopiedReference:
    """A reference that no one may copy."""

    def __init__(self) -> None:
        self.model = random_model()
        self.tokenizer = self.model.tokenizer

    def decoder(self, num_rows, law):
        return self.model.decoder(num_rows, law)

    def __deepcopy__(self, memo):
        raise AssertionError("a model was copied")


def test_no_way_to_make_and_wrap_an_environment_copies_a_model():
    reference, reward = UncopiedReference(), Uncopied()
    kwargs = {"reference": reference, "tokenizer": reference.tokenizer, "reward_model": reward, "prompts": PROMPTS}
    env = gym.make(ID, **kwargs, kl_mode="off", render_mode="ansi")
    wrapped = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.OrderEnforcing(env))
    for made in (wrapped.spec.make(), gym.make(wrapped.spec), gym.make(env.spec)):
        task = made.unwrapped.task
        assert task.reference is reference and task.reward_model is reward
    check_env(gym.make(ID, **kwargs, kl_mode="off", render_mode="ansi").unwrapped)
    envs = gym.make_vec(ID, num_envs=2, **kwargs, kl_mode="off")
    assert gym.make_vec(envs.spec).task.reference is reference
    copy.deepcopy(env.spec)


def test_a_controller_of_beta_belongs_to_one_environment():
    env = gym.make(ID, beta=AdaptiveBeta(initial=0.2))
    other = gym.make(env.spec)
    env.unwrapped.core.observe_kl([100.0] * 1000)
    assert (env.unwrapped.beta > 0.2, other.unwrapped.beta) == (True, 0.2)


@pytest.mark.parametrize("name", ["rlhf_env/Enumerable-v0", "rlhf_env/Keywords-v0", ID])
def test_a_spec_survives_json(name):
    env = gym.make(name, kl_mode="off", top_k=3, action="candidate", max_new_tokens=4)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    for each in (env, again):
        each.reset(seed=3)
    for action in (0, 1):
        first, second = env.step(action), again.step(action)
        assert all((first[0][k] == second[0][k]).all() for k in first[0])
        assert first[1:] == second[1:]


@pytest.mark.parametrize("name", [ID, "rlhf_env/Enumerable-v0"])
def test_both_forms_of_an_id_have_the_same_spaces(name):
    one, many = gym.make(name, top_p=0.5, kl_mode="off"), gym.make_vec(name, num_envs=2, top_p=0.5, kl_mode="off")
    assert one.observation_space == many.single_observation_space
    assert one.action_space == many.single_action_space
    assert one.observation_space.law == many.single_observation_space.law == one.unwrapped.task.law


# --- pickles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize(
    "features",
    [{}, {"top_k": 3, "group_size": 2}, {"reference_backend": "full"}, {"reference_backend": "deferred"}],
    ids=str,
)
def test_a_pickle_taken_within_an_episode_goes_on_bit_by_bit(pickler, features):
    envs = make_envs(2, beta=AdaptiveBeta(initial=0.3), **features)
    bind_policy(envs, random_model(seed=1))
    envs.reset(seed=3)
    envs.step(envs.action_masks().argmax(1))
    again = pickle.loads(pickler.dumps(envs))
    assert again.task.reference is not envs.task.reference
    assert again.observation_space == envs.observation_space and again.task.law == envs.task.law
    for _ in range(8):
        masks = envs.action_masks()
        assert (masks == again.action_masks()).all()
        actions = masks.shape[1] - 1 - masks[:, ::-1].argmax(1)
        first, second = envs.step(actions), again.step(actions)
        assert all((first[0][k] == second[0][k]).all() for k in first[0])
        assert all((a == b).all() for a, b in zip(first[1:4], second[1:4], strict=True))
    assert envs.core.prompts == again.core.prompts and envs.render() == again.render()


def test_a_deep_copy_shares_the_models():
    reference, reward = random_model(), Uncopied()
    env = make_env(reference=reference, tokenizer=reference.tokenizer, reward_model=reward)
    policy = random_model(seed=1)
    bind_policy(env, policy)
    env.reset(seed=0)
    env.step(1)
    for other in (copy.deepcopy(env), copy.deepcopy(gym.wrappers.RecordEpisodeStatistics(env)).unwrapped):
        assert other is not env and other.core is not env.core
        assert other.task.reference is reference and other.task.reward_model is reward
        assert other.core._decoder.model is reference and other.core.log_pi.fn.args[-1] is policy
        again = copy.deepcopy(env)
        assert other.step(2)[1] == again.step(2)[1] != 0.0


def test_a_deep_copy_goes_on_alone():
    env = make_env(kl_mode="off")
    env.reset(seed=0, options={"prompt": "ab"})
    env.step(1)
    other = copy.deepcopy(env)
    env.step(EOS)
    observation, *_ = other.step(2)
    assert observation["input_ids"][:4].tolist() == [0, 1, 1, 2]
    assert not other.core.attention_mask[0, 4:].any()


def test_a_push_of_what_was_pickled_is_kept():
    env = make_env()
    env.reset(seed=0)
    env.push_logprobs(-1.0, 3)
    again = pickle.loads(pickle.dumps(env))
    assert env.step(3)[1:] == again.step(3)[1:]
    with pytest.raises(MissingLogProbError):
        again.step(3)
