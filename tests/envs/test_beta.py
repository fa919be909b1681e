"""β: fixed, adaptive or scheduled; constant within an episode; and what a checkpoint needs to go on with it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_env.envs.beta import AdaptiveBeta, ScheduledBeta
from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import ConfigError
from rlhf_env.training.collect import collect
from rlhf_env.training.evaluate import evaluate
from tests.builders import EOS, make_env, make_envs, random_model
from tests.envs.playing import play


def silent(env):
    """A deterministic policy, whose KL to the reference is what the reference finds unlikely."""
    bind_policy(env, lambda observation, actions: np.zeros(len(actions)))
    return env


# --- the controllers by hand ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "value"),
    [
        ([2.0] * 100, 0.1),  # on target
        ([2.2] * 100, 0.1 * (1 + 0.1 * 100 / 1000)),  # 10 % above
        ([1.0, 3.4] * 50, 0.1 * (1 + 0.1 * 100 / 1000)),  # the mean counts
        ([100.0] * 100, 0.1 * (1 + 0.2 * 100 / 1000)),  # clipped
        ([-3.0] * 100, 0.1 * (1 - 0.2 * 100 / 1000)),
        ([2.2, np.nan] * 100, 0.1 * (1 + 0.1 * 100 / 1000)),  # what is not known counts for nothing
        ([np.nan] * 100, 0.1),
        ([], 0.1),
    ],
)
def test_an_adaptive_beta_by_hand(kl, value):
    beta = AdaptiveBeta(initial=0.1, target=2.0, horizon=1000)
    beta.observe(np.array(kl))
    assert beta.value == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(
    ("episodes", "value"),
    [(0, 0.4), (10, 0.4), (15, 0.3), (20, 0.2), (30, 0.15), (40, 0.1), (41, 0.1), (10_000, 0.1)],
)
def test_a_scheduled_beta_by_hand(episodes, value):
    beta = ScheduledBeta(((10, 0.4), (20, 0.2), (40, 0.1)))
    assert beta.value == 0.4
    beta.observe([np.nan] * episodes)  # their KL does not matter, known or not
    assert beta.value == pytest.approx(value, abs=1e-15)
    assert beta.episodes == episodes


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), "ascending numbers of episodes, got"),
        (((-1, 0.1),), "ascending"),
        (((5, 0.1), (5, 0.2)), "ascending"),
        (((5, 0.1), (4, 0.2)), "ascending"),
        (((0, -0.1),), "every β must be a finite number of at least 0"),
        (((0, float("nan")),), "every β"),
        (((0, float("inf")),), "every β"),
    ],
)
def test_a_schedule_that_is_none(points, message):
    with pytest.raises(ConfigError, match=message):
        ScheduledBeta(points)


# --- in the environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["token", "terminal"])
@pytest.mark.parametrize("backend", ["auto", "deferred"])
def test_a_schedule_moves_with_every_episode_and_none_is_charged_two_betas(placement, backend):
    env = silent(make_env(beta=ScheduledBeta(((0, 0.5), (40, 0.1))), kl_placement=placement, reference_backend=backend))
    for episode in range(45):
        rewards, infos = play(env, [4, EOS])
        expected = 0.5 - 0.01 * min(episode, 40)
        last = infos[-1]
        assert last["beta"] == pytest.approx(expected)
        assert sum(rewards) == pytest.approx(last["score"] - expected * last["kl"], abs=1e-9)


def test_a_neighbour_that_began_earlier_keeps_its_beta():
    envs = silent(make_envs(2, beta=ScheduledBeta(((0, 0.5), (1, 0.1)))))
    envs.reset(seed=0, options={"prompt": "ab"})
    total = np.zeros(2)
    for actions in ([1, 2], [EOS, 3], [EOS, EOS]):
        *_, infos = (step := envs.step(np.array(actions)))
        total[1] += step[1][1]
        envs.core.observe_kl([1.0])  # as a batch of finished episodes would
        assert envs.beta == 0.1
        if actions == [EOS, 3]:
            assert infos["final_info"]["beta"][0] == 0.5 and infos["beta"][0] == 0.1
    final = infos["final_info"]
    assert final["beta"].tolist() == [0.1, 0.5]
    assert total[1] == pytest.approx(final["score"][1] - 0.5 * final["kl"][1], abs=1e-9)


def test_without_a_policys_kl_a_schedule_still_counts_episodes():
    env = make_env(beta=ScheduledBeta(((0, 0.5), (64, 0.1))), kl_mode="reference")
    for _ in range(64):
        play(env, [EOS])
    assert env.beta == pytest.approx(0.1)


def test_collecting_counts_its_episodes_at_once_and_evaluating_none():
    envs, policy = make_envs(4, beta=ScheduledBeta(((0, 0.5), (100, 0.0)))), random_model(seed=1)
    assert collect(policy, envs, episodes=10).beta.unique().tolist() == [0.5]
    assert envs.beta == pytest.approx(0.45)
    evaluate(policy, envs, episodes=8)
    assert envs.beta == pytest.approx(0.45)
    collect(policy, envs, episodes=10, greedy=True)  # no sample of the policy
    assert envs.beta == pytest.approx(0.45)
    assert collect(policy, envs, episodes=10).beta.tolist() == pytest.approx([0.45] * 10)


def test_beta_may_be_set_by_hand_between_episodes():
    env = silent(make_env())
    env.beta = 0.7
    rewards, infos = play(env, [1, EOS])
    assert infos[-1]["beta"] == 0.7
    assert sum(rewards) == pytest.approx(infos[-1]["score"] - 0.7 * infos[-1]["kl"], abs=1e-9)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_beta_by_hand_must_be_one(value):
    with pytest.raises(ConfigError, match="beta must be a finite number of at least 0"):
        make_env().beta = value


def test_environments_made_with_the_same_controller_do_not_steer_each_other():
    given = ScheduledBeta(((0, 0.5), (10, 0.1)))
    first, second = (silent(make_env(beta=given)) for _ in range(2))
    for _ in range(5):
        play(first, [EOS])
    assert (first.beta, second.beta, given.value) == (pytest.approx(0.3), 0.5, 0.5)


def test_a_saved_beta_of_another_kind_is_refused():
    fixed, scheduled = make_env(), make_env(beta=ScheduledBeta(((0, 0.5),)))
    adaptive = make_env(beta=AdaptiveBeta())
    for one, other in ((fixed, scheduled), (scheduled, adaptive), (adaptive, fixed)):
        with pytest.raises(ConfigError, match="the same kind of beta"):
            one.load_state_dict(other.state_dict())


# --- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beta",
    [
        lambda: 0.3,
        lambda: AdaptiveBeta(initial=0.1, target=1.0, horizon=640),
        lambda: ScheduledBeta(((0, 0.5), (128, 0.1))),
    ],
    ids=["fixed", "adaptive", "scheduled"],
)
@pytest.mark.parametrize("kl_mode", ["reward", "reference"])
def test_an_interrupted_environment_goes_on_with_the_same_betas(beta, kl_mode):
    """Also with the episodes that β's controller had not heard of yet: an adaptive one hears of 64 at a time."""
    if kl_mode == "reference" and isinstance(beta(), AdaptiveBeta):
        with pytest.raises(ConfigError, match="which kl_mode='reference' does not know"):
            make_env(beta=beta(), kl_mode=kl_mode)
        return
    first, second = (silent(make_env(beta=beta(), kl_mode=kl_mode)) for _ in range(2))
    for _ in range(70):
        play(first, [4, EOS])
    first.beta = first.beta * 1.5
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for _ in range(60):
        betas = [play(env, [2, EOS])[1][-1]["beta"] for env in (first, second)]
        assert betas[0] == betas[1]
    assert first.beta == second.beta


def test_taking_a_state_and_putting_it_back_changes_nothing():
    envs = silent(make_envs(2, beta=AdaptiveBeta(initial=0.1, target=1.0)))
    envs.core.observe_kl([5.0] * 100)
    state = envs.core.beta_state()
    value = envs.beta
    envs.core.observe_kl([0.0] * 5000)
    assert envs.beta < value
    envs.core.load_beta_state(state)
    assert envs.beta == value
