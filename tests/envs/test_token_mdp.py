"""The token MDP: states, ends, rewards and log-probabilities, as a specification."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlhf_env
from rlhf_env.envs.beta import AdaptiveBeta
from rlhf_env.envs.binding import bind_policy
from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.errors import (
    ConfigError,
    EmptyPromptError,
    NonFiniteError,
    PromptTooLongError,
    RewardError,
    TokenizerError,
    UnboundPolicyWarning,
)
from rlhf_env.text.tokenizers import char_tokenizer
from tests.builders import EOS, PROMPTS, letter_score, make_env, make_envs, random_model


def play(env: TextGenerationEnv, actions: list[int], prompt: str = "ab", seed: int = 0):
    """Step through one episode; returns rewards, last (terminated, truncated) and last info."""
    env.reset(seed=seed, options={"prompt": prompt})
    rewards, ends, info = [], (False, False), {}
    for action in actions:
        assert ends == (False, False)
        _, reward, *ends, info = env.step(action)
        rewards.append(reward)
        ends = tuple(ends)
    return rewards, ends, info


# --- states ----------------------------------------------------------------------------------------


def test_observation_by_hand():
    env = make_env(kl_mode="off")
    env.reset(seed=0, options={"prompt": "cab"})
    observation, *_ = env.step(4)
    # max_prompt_tokens is 6 (the longest prompt, "efghab"), so L = 12; <pad> is 10
    assert observation["input_ids"].tolist() == [2, 0, 1, 4] + [10] * 8
    assert observation["attention_mask"].tolist() == [1] * 4 + [0] * 8
    assert observation["response_mask"].tolist() == [0] * 3 + [1] + [0] * 8
    assert observation in env.observation_space


def test_returned_arrays_are_the_callers():
    envs = make_envs(2, kl_mode="off")
    observation, _ = envs.reset(options={"prompt": "abc"})
    for values in observation.values():
        values[:] = 7
    again, *_ = envs.step(np.array([4, 5]))
    assert again["input_ids"][:, :5].tolist() == [[0, 1, 2, 4, 10], [0, 1, 2, 5, 10]]
    assert again["response_mask"].sum(1).tolist() == [1, 1]


def test_reset_with_a_seed_repeats_the_prompts():
    env = make_env(kl_mode="off")
    first = [env.reset(seed=3)[0]["input_ids"].tolist()] + [env.reset()[0]["input_ids"].tolist() for _ in range(5)]
    second = [env.reset(seed=3)[0]["input_ids"].tolist()] + [env.reset()[0]["input_ids"].tolist() for _ in range(5)]
    assert first == second
    assert len(set(map(tuple, first))) > 1


# --- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "penalty", "reason"),
    [
        ([1, 2, EOS], 0.0, "eos"),
        ([EOS], 0.0, "eos"),
        ([1, 2, 3, 4, 5, 6], 2.5, "length"),
        ([1, 2, 3, 4, 5, EOS], 0.0, "eos"),  # EOS as the very last token still is an EOS
    ],
)
@pytest.mark.parametrize("prompt", ["ab", "a"])
def test_where_episodes_end_and_what_it_costs(actions, penalty, reason, prompt):
    rewards, ends, info = play(make_env(beta=0.0, missing_eos_penalty=2.5), actions, prompt)
    assert ends == (True, False)
    assert info["stop_reason"] == reason
    assert info["penalty"] == penalty
    assert info["response_length"] == len(actions)
    text = "".join("abcdefgh"[a] for a in actions if a != EOS)
    assert info["score"] == pytest.approx(letter_score([prompt], [text])[0])
    assert rewards[-1] == pytest.approx(info["score"] - penalty)
    assert not any(rewards[:-1])


def test_a_stop_string_ends_the_response_across_token_borders():
    _, ends, info = play(make_env(beta=0.0, stop_strings=("cde",), missing_eos_penalty=9.0), [1, 2, 3, 4])
    assert ends == (True, False)
    assert (info["stop_reason"], info["penalty"]) == ("stop_string", 0.0)


def test_eos_written_in_a_prompt_is_text_that_this_alphabet_lacks():
    with pytest.raises(TokenizerError):
        make_env().reset(options={"prompt": "<eos>"})


def test_truncation_is_neither_scored_nor_penalised():
    env = make_env(beta=0.0, length_limit="truncate", missing_eos_penalty=1.0)
    rewards, ends, info = play(env, [1, 2, 3, 4, 5, 6])
    assert ends == (False, True)
    assert "score" not in info and sum(rewards) == 0.0


def test_without_eos_only_the_length_ends_it():
    env = make_env(tokenizer=char_tokenizer("abcdefghijk", special=False), stop_at_eos=False, reference=None)
    bind_policy(env, lambda obs, actions: np.zeros(1))
    _, ends, info = play(env, [EOS] * 6)
    assert ends == (True, False) and info["stop_reason"] == "length"


def test_stepping_a_finished_episode_says_reset():
    env = make_env(kl_mode="off")
    play(env, [EOS])
    with pytest.raises(RuntimeError, match="reset it first"):
        env.step(1)


@pytest.mark.parametrize("action", [-1, 11])
def test_an_action_outside_the_vocabulary(action):
    env = make_env(kl_mode="off")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="outside the vocabulary of 11"):
        env.step(action)


def test_float_actions_are_refused():
    env = make_env(kl_mode="off")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="integers"):
        env.step(1.0)


def test_forbidden_actions_are_refused_and_masked():
    env = make_env(kl_mode="off", banned_tokens=(8, 10), min_new_tokens=1)
    env.reset(seed=0)
    assert env.action_masks().tolist() == [True] * 8 + [False, False, False]
    with pytest.raises(ValueError, match="action_masks"):
        env.step(EOS)
    env.step(0)
    assert env.action_masks()[EOS]


# --- rewards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["token", "terminal"])
@pytest.mark.parametrize("actions", [[1, 2, 3, 4, 5, 6], [4, 4, EOS], [EOS]])
def test_rewards_sum_to_score_minus_beta_kl_minus_penalty(placement, actions):
    env = make_env(kl_placement=placement, missing_eos_penalty=0.7)
    policy = random_model(seed=1)
    bind_policy(env, policy)
    rewards, _, info = play(env, actions)
    assert info["kl"] != 0
    assert sum(rewards) == pytest.approx(info["score"] - 0.3 * info["kl"] - info["penalty"], abs=1e-9)
    if placement == "terminal":
        assert not any(rewards[:-1])


def test_the_kl_is_that_of_the_two_models():
    """Against the Hugging Face models themselves, one unpadded row."""
    reference, policy = random_model(seed=0), random_model(seed=1)
    env = make_env(reference=reference)
    bind_policy(env, policy)
    _, _, info = play(env, [4, 2, EOS], prompt="ab")
    ids = torch.tensor([[0, 1, 4, 2, EOS]])
    logp, ref_logp = (
        m.model(ids).logits[0, 1:-1].log_softmax(-1).gather(-1, ids[0, 2:, None]).sum().item()  # type: ignore[operator]
        for m in (policy, reference)
    )
    assert info["kl"] == pytest.approx(logp - ref_logp, abs=1e-4)


def test_reference_mode_pays_beta_log_ref():
    rewards, _, info = play(make_env(kl_mode="reference"), [4, 2, EOS])
    ref = sum(rewards) - info["score"]
    bound = make_env()
    bind_policy(bound, lambda obs, actions: np.zeros(1))  # a deterministic policy: log π = 0
    same, _, _ = play(bound, [4, 2, EOS])
    assert ref < 0
    assert sum(rewards) == pytest.approx(sum(same), abs=1e-12)
    assert "kl" not in info and "logp" not in info


def test_observe_mode_reports_the_kl_and_charges_nothing():
    env = make_env(kl_mode="observe")
    bind_policy(env, random_model(seed=1))
    rewards, _, info = play(env, [4, 2, EOS])
    assert info["kl"] != 0
    assert sum(rewards) == info["score"]


def test_policy_equal_to_reference_has_no_kl_under_any_law():
    model = random_model()
    env = make_env(reference=model, temperature=0.6, min_new_tokens=3, banned_tokens=(8, 10))
    bind_policy(env, model)
    _, _, info = play(env, [1, 2, 3, EOS])
    assert info["kl"] == pytest.approx(0, abs=1e-5)


def test_unbound_the_kl_is_that_of_a_uniform_policy_and_one_warning_says_so():
    env = make_env(banned_tokens=(8, 10))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, first = play(env, [4, 2, EOS])
        play(env, [4, 2, EOS])
    assert [w.category for w in caught] == [UnboundPolicyWarning]
    assert first["logp"] == pytest.approx(-np.log(9))
    assert caught[0].filename == __file__, "the warning points at the caller's step"


def test_beta_zero_equals_no_reference():
    with_reference, without = make_env(beta=0.0), make_env(reference=None)
    for env in (with_reference, without):
        bind_policy(env, lambda obs, actions: np.full(1, -1.0))
    assert play(with_reference, [4, 2, EOS])[0] == play(without, [4, 2, EOS])[0]


def test_beta_is_fixed_at_reset_and_adapts_to_the_mean_of_many_episodes():
    env = make_env(beta=AdaptiveBeta(initial=0.1, target=1.0, horizon=640))
    bind_policy(env, lambda obs, actions: np.zeros(1))  # KL far above the target: the error is clipped to +20 %
    for _ in range(64):
        _, info = env.reset(seed=0)
        assert info["beta"] == 0.1
        _, _, last = play(env, [4, 2, EOS])
        assert last["beta"] == 0.1
    assert env.beta == pytest.approx(0.1 * (1 + 0.2 * 64 / 640))
    assert env.reset()[1]["beta"] == env.beta


@pytest.mark.parametrize("placement", ["token", "terminal"])
def test_an_episode_is_charged_the_beta_it_began_with(placement):
    env = make_env(kl_placement=placement)
    bind_policy(env, lambda obs, actions: np.zeros(1))
    env.reset(seed=0)
    rewards = 0.0
    for token in (1, 2, EOS):
        _, reward, _, _, info = env.step(token)
        rewards += reward
        env.beta = 7.0
    assert info["beta"] == 0.3 and info["kl"] > 0
    assert rewards == pytest.approx(info["score"] - 0.3 * info["kl"], abs=1e-9)
    assert env.reset()[1]["beta"] == 7.0


@pytest.mark.parametrize("scores", [[float("nan")], [1.0, 2.0], "x", [None]])
def test_a_broken_reward_model_stops_the_step(scores):
    env = make_env(kl_mode="off", reward_model=lambda prompts, responses: scores)
    with pytest.raises(RewardError):
        play(env, [EOS])


def test_after_a_broken_reward_nobody_goes_on_from_half_a_step():
    """The neighbour's token was written, but its reference never read it: its next KL would be wrong, unseen."""
    answers = iter([float("nan"), 1.0])
    envs = make_envs(2, reward_model=lambda prompts, responses: [next(answers)] * len(prompts))
    bind_policy(envs, random_model(seed=1))
    envs.reset(seed=0)
    with pytest.raises(RewardError):
        envs.step(np.array([EOS, 1]))
    envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(RuntimeError, match="environment 1 is over.*reset it first"):
        envs.step(np.array([EOS, 1]))
    envs.reset()
    assert envs.step(np.array([EOS, 1]))[2].tolist() == [True, False]


def test_a_broken_reference_stops_the_step():
    reference = random_model()
    with torch.no_grad():
        reference.model.get_input_embeddings().weight[3] = torch.nan  # type: ignore[operator]
    envs = make_envs(2, reference=reference)
    bind_policy(envs, lambda obs, actions: np.zeros(2))
    envs.reset(options={"prompt": ["d", "d"]})
    with pytest.raises(NonFiniteError, match="reference's log-probability of action 4 in environment 0 is nan"):
        envs.step(np.array([4, 5]))


# --- bad input, before the first step --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"prompts": ["ab", ""]}, EmptyPromptError, "prompt 1"),
        ({"prompts": []}, ConfigError, "no prompts"),
        ({"prompts": "ab"}, ConfigError, "not one string"),
        ({"prompts": ["ab", 3]}, ConfigError, "prompt 1 must be a text"),
        ({"prompts": ["a" * 60]}, PromptTooLongError, "prompt 0 has 60 tokens.*context of 64"),
        ({"prompts": ["abc"], "max_prompt_tokens": 2}, PromptTooLongError, "prompt 0 has 3 tokens"),
        ({"tokenizer": char_tokenizer("abcdefgh", special=False)}, TokenizerError, "stop_at_eos=False"),
        ({"reference": None, "beta": 0.1}, ConfigError, "frozen_copy"),
        ({"temperature": 0.0}, ConfigError, "temperature must be positive"),
        ({"kl_mode": "rewards"}, ConfigError, "kl_mode must be one of"),
        ({"max_new_tokens": 1, "length_limit": "truncate"}, ConfigError, "too small"),
        ({"min_new_tokens": 7, "max_new_tokens": 6}, ConfigError, "min_new_tokens=7 is more than"),
        ({"stop_strings": "gh"}, ConfigError, "stop_strings must be a sequence"),
        ({"stop_strings": ["gh", ""]}, ConfigError, "not empty"),
        ({"beta": -0.1}, ConfigError, "beta must be a finite number of at least 0"),
        ({"beta": float("nan")}, ConfigError, "beta must be a finite number"),
        ({"missing_eos_penalty": float("inf")}, ConfigError, "missing_eos_penalty must be"),
        ({"temperature": float("inf")}, ConfigError, "positive and finite"),
        ({"tokenizer": char_tokenizer("hgfedcba")}, TokenizerError, "another vocabulary"),
        ({"banned_tokens": (11,)}, ConfigError, "outside the vocabulary"),
        ({"kl_mode": "reference", "kl_placement": "terminal"}, ConfigError, "kl_placement"),
        ({"render_mode": "rgb_array"}, TypeError, "render_mode"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        make_env(**kwargs)


def test_a_prompt_longer_than_the_observation_is_refused_at_reset():
    with pytest.raises(PromptTooLongError, match="options\\['prompt'\\] has 9 tokens"):
        make_env().reset(options={"prompt": "abcabcabc"})


# --- registration ----------------------------------------------------------------------------------


def test_models_are_shared_by_copies_of_the_spec():
    model = random_model()
    kwargs = {"reference": model, "tokenizer": model.tokenizer, "prompts": PROMPTS, "reward_model": letter_score}
    env = gym.make("rlhf_env/TextGeneration-v0", **kwargs)
    again = gym.wrappers.RecordEpisodeStatistics(env).spec.make()
    assert again.unwrapped.task.reference is model
    assert gym.make_vec("rlhf_env/TextGeneration-v0", num_envs=2, **kwargs).task.reference is model


def test_public_names_resolve():
    for name in rlhf_env._PUBLIC:
        assert getattr(rlhf_env, name).__name__ == name
