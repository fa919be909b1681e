"""`check_token_env` accepts what keeps the contract, and names the promise that anything else breaks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import rlhf_env
from rlhf_env.envs.checker import check_token_env
from rlhf_env.errors import ConfigError, ContractError
from tests.builders import make_env, make_envs, random_model

IDS = sorted(name for name in gym.registry if name.startswith("rlhf_env/"))


@pytest.mark.parametrize("name", IDS)
def test_every_registered_world_keeps_the_contract(name):
    check_token_env(gym.make(name), steps=50)
    check_token_env(gym.make_vec(name, num_envs=3), steps=30)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"top_k": 3},
        {"top_k": 3, "action": "candidate"},
        {"top_p": 0.6, "temperature": 1.5},
        {"reference_backend": "deferred"},
        {"kl_mode": "reference"},
        {"kl_mode": "observe"},
        {"kl_mode": "off"},
        {"kl_placement": "terminal"},
        {"length_limit": "truncate"},
        {"missing_eos_penalty": 0.3, "length_penalty": 0.1, "min_new_tokens": 2, "banned_tokens": (10,)},
    ],
    ids=str,
)
def test_every_mode_and_setting_keeps_the_contract(mode, kwargs):
    check_token_env(make_envs(2, autoreset_mode=mode, **kwargs), steps=16)


def test_it_is_public():
    assert rlhf_env.check_token_env is check_token_env and issubclass(rlhf_env.ContractError, AssertionError)


class Spoiled(gym.Wrapper):
    """An environment of which one promise is broken by `spoil(wrapper, observation, reward, info, at_reset)`."""

    def __init__(self, env: gym.Env, spoil: Any) -> None:
        super().__init__(env)
        self.spoil, self.count, self.episode = spoil, 0, 0

    def reset(self, **kwargs: Any) -> Any:
        observation, info = self.env.reset(**kwargs)
        self.episode += 1
        observation, _, info = self.spoil(self, observation, 0.0, info, True)
        return observation, info

    def step(self, action: Any) -> Any:
        self.count += 1
        observation, reward, terminated, truncated, info = self.env.step(action)
        observation, reward, info = self.spoil(self, observation, reward, info, False)
        return observation, reward, terminated, truncated, info


def left_padded(env, observation, reward, info, at_reset):
    n = int(observation["attention_mask"].sum())
    return {k: np.roll(v, len(v) - n) for k, v in observation.items()}, reward, info


def shows_the_response_as_prompt(env, observation, reward, info, at_reset):
    return observation | {"response_mask": np.zeros_like(observation["response_mask"])}, reward, info


def floats(env, observation, reward, info, at_reset):
    return observation | {"input_ids": observation["input_ids"] / 10}, reward, info


def writes_another_token(env, observation, reward, info, at_reset):
    ids = observation["input_ids"].copy()
    if not at_reset:
        last = int(observation["attention_mask"].sum()) - 1
        ids[last] = (ids[last] + 1) % 11
    return observation | {"input_ids": ids}, reward, info


def forgets_the_score(env, observation, reward, info, at_reset):
    return observation, reward, {k: v for k, v in info.items() if k != "score"}


def pays_too_much(env, observation, reward, info, at_reset):
    return observation, reward + 0.001, info


def says_nan(env, observation, reward, info, at_reset):
    return observation, reward, info | {"surprise": float("nan")}


def says_an_array(env, observation, reward, info, at_reset):
    return observation, reward, info | {"logits": np.zeros(11)}


def changes_beta(env, observation, reward, info, at_reset):
    return observation, reward, info | ({"beta": 0.4} if at_reset else {})


def rolls_dice(env, observation, reward, info, at_reset):
    return observation, reward + 1e-6 * env.count, info


def reads_a_clock(env, observation, reward, info, at_reset):
    return observation, reward, info | {"time": env.count}


def draws_from_elsewhere(env, observation, reward, info, at_reset):
    ids = observation["input_ids"].copy()
    ids[0] = env.episode % 7
    return observation | {"input_ids": ids}, reward, info


def miscounts(env, observation, reward, info, at_reset):
    return observation, reward, info | ({"response_length": 1} if "score" in info else {})


def invents_a_reason(env, observation, reward, info, at_reset):
    return observation, reward, info | ({"stop_reason": "bored"} if "score" in info else {})


def misreports_kl(env, observation, reward, info, at_reset):
    return observation, reward, info | ({"kl": info["kl"] + 0.01} if "kl" in info else {})


def reuses_its_arrays(env, observation, reward, info, at_reset):
    kept = env.__dict__.setdefault("kept", {k: v.copy() for k, v in observation.items()})
    for name, values in observation.items():
        kept[name][...] = values
    return dict(kept), reward, info


@pytest.mark.parametrize(
    ("spoil", "promise"),
    [
        (left_padded, "right-padded"),
        (shows_the_response_as_prompt, "response_mask marks"),
        (floats, "in the observation space"),
        (writes_another_token, "appends its action|stay as they were"),
        (forgets_the_score, "score missing"),
        (pays_too_much, "sum to score − β·KL − penalty"),
        (says_nan, "finite numbers: surprise"),
        (says_an_array, "hold scalars: logits"),
        (changes_beta, "β stays"),
        (rolls_dice, "the same rewards"),
        (reads_a_clock, "the same infos"),
        (draws_from_elsewhere, "the same observations"),
        (miscounts, "response_length counts"),
        (invents_a_reason, "stop_reason is one of"),
        (misreports_kl, "kl = Σ"),
        (reuses_its_arrays, "fresh arrays|the same observations|response_mask marks"),
    ],
)
def test_a_broken_promise_is_named(spoil, promise):
    with pytest.raises(ContractError, match=promise):
        check_token_env(Spoiled(make_env(), spoil), steps=20)


def test_the_wrapper_itself_breaks_nothing():
    check_token_env(Spoiled(make_env(), lambda env, observation, reward, info, at_reset: (observation, reward, info)))


def test_a_temperature_on_one_side_only_is_kl_that_nobody_has():
    class Cooler:
        """A reference that is asked at another temperature than it decodes at."""

        def __init__(self) -> None:
            self.model = random_model()
            self.tokenizer = self.model.tokenizer
            self.decoder, self.evaluate = self.model.decoder, self.model.evaluate

        def action_log_probs(self, observation, actions, law):
            import dataclasses

            return self.model.action_log_probs(observation, actions, dataclasses.replace(law, temperature=0.5))

    with pytest.raises(ContractError, match="reference has KL to itself: token 0"):
        check_token_env(make_env(reference=Cooler()), steps=40)
    with pytest.raises(ContractError, match=r"reference has KL to itself: -?\d+\.\d+ nats over"):
        check_token_env(make_env(reference=Cooler(), reference_backend="deferred"), steps=40)


def test_no_end_in_sight():
    with pytest.raises(ContractError, match="no episode ended: in 3 steps"):
        check_token_env(make_env(min_new_tokens=6), steps=3)


def test_spaces_that_are_none_of_ours():
    with pytest.raises(ContractError, match="do not flatten"):
        check_token_env(gym.make("CartPole-v1"))
    with pytest.raises(ContractError, match="do not flatten"):
        check_token_env(gym.wrappers.FlattenObservation(make_env()))


def test_environments_in_other_processes_are_refused_with_the_reason():
    envs = gym.make_vec("rlhf_env/Enumerable-v0", num_envs=2, vectorization_mode="async", kl_mode="off")
    try:
        with pytest.raises(ConfigError, match="other processes"):
            check_token_env(envs)
    finally:
        envs.close()
