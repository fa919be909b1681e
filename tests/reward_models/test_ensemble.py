"""An ensemble: the mean of its members, and a bonus for disagreement that training sees and evaluation does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import ConfigError
from rlhf_env.reward_models.ensemble import Ensemble
from rlhf_env.reward_models.load import load_reward
from rlhf_env.training.assemble import assemble
from rlhf_env.training.config import TrainConfig
from rlhf_env.worlds.reviews import ASSETS


def long(prompts, responses):
    return [float(len(r)) for r in responses]


def short(prompts, responses):
    return [-float(len(r)) + 4 for r in responses]


def test_mean_and_bonus_by_hand():
    """Of "ab" the members say 2 and 2, of "abcd" 4 and 0: means 2 and 2, deviations 0 and 2."""
    texts = ["", ""], ["ab", "abcd"]
    np.testing.assert_array_equal(scores_of(Ensemble([long, short]), *texts), [2, 2])
    parts = Ensemble([long, short], bonus=0.5).score(*texts)
    np.testing.assert_array_equal(parts["mean"], [2, 2])
    np.testing.assert_array_equal(parts["bonus"], [0, 1])
    np.testing.assert_array_equal(scores_of(Ensemble([long, short], bonus=-0.5), *texts), [2, 1])


def test_equal_members_are_that_member():
    np.testing.assert_array_equal(scores_of(Ensemble([long, long], bonus=9.0), ["", ""], ["a", "abc"]), [1, 3])


def test_an_ensemble_has_several_members():
    with pytest.raises(ConfigError, match="at least two members, this one has 1"):
        Ensemble([long])


def test_the_command_line_names_them_with_commas():
    ensemble = load_reward(f"{__name__}:long, vader")
    assert isinstance(ensemble, Ensemble) and len(ensemble.members) == 2 and ensemble.bonus == 0
    with pytest.raises(ConfigError, match="unknown reward model 'vadr'"):
        load_reward("vader,vadr")


def test_training_sees_the_bonus_and_evaluation_does_not():
    config = TrainConfig(
        policy=str(ASSETS / "reference"), prompts="builtin:reviews", reward=f"{__name__}:long,vader", bonus=0.5
    )
    parts = assemble(config)
    assert (parts.envs.task.reward_model.bonus, parts.eval_envs.task.reward_model.bonus) == (0.5, 0)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="name them with commas"):
        assemble(dataclasses.replace(config, reward="vader"))


class Process:
    def score_tokens(self, prompts, responses):
        return [[1.0] * len(r) for r in responses]


def test_a_member_that_scores_tokens_is_refused():
    with pytest.raises(ConfigError, match="score whole responses"):
        Ensemble([long, Process()])
