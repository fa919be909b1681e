"""Safety where it is at stake, helpfulness elsewhere: Llama 2's choice, by numbers worked by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rlhf_env.errors import ConfigError
from rlhf_env.reward_models.cache import cached
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.normalise import normalised
from rlhf_env.reward_models.safety_first import SafetyFirst
from tests.reward_models.test_classifier import save

LOGITS = {"rude": -2.0, "borderline": -1.74, "so so": -1.73, "nice": 3.0}  # σ: 0.119, 0.1493, 0.1506, 0.953


def safety(prompts, responses):
    return [LOGITS[r] for r in responses]


def helpfulness(prompts, responses):
    return [7.0] * len(responses)


def test_below_015_it_is_safety_and_above_helpfulness():
    scores = SafetyFirst(safety, helpfulness).score([""] * 4, list(LOGITS))
    np.testing.assert_array_equal(scores, [-2.0, -1.74, 7, 7])


def test_the_threshold_is_of_the_probability():
    scores = SafetyFirst(safety, helpfulness, threshold=0.96).score([""] * 4, list(LOGITS))
    np.testing.assert_array_equal(scores, list(LOGITS.values()))


def test_a_tagged_prompt_is_always_judged_by_safety():
    reward = SafetyFirst(safety, helpfulness, tagged=re.compile("bomb").search)
    np.testing.assert_array_equal(reward.score(["a bomb", "a cake"], ["nice", "nice"]), [3, 7])


def test_a_classifiers_logit_counts_before_it_is_normalised():
    class Classifier:
        def score(self, prompts, responses):
            return [0.0] * len(responses)

        def logits(self, prompts, responses):
            return np.array([-5.0] * len(responses))

    np.testing.assert_array_equal(SafetyFirst(Classifier(), helpfulness).score([""], ["rude"]), [-5])


def test_one_label_of_several_is_judged_by_its_probability_not_by_its_logit(tmp_path):
    """Of labels that exclude each other, p is the softmax's: logits of 2 and 4 say 0.119, unsafe, not σ(2) = 0.881."""
    save(tmp_path, labels=2)
    reward = ClassifierReward(tmp_path, label=0)
    reward.all_logits = lambda prompts, responses: np.array([[2.0, 4.0], [2.0, 1.0]])
    np.testing.assert_allclose(reward.label_log_odds([""] * 2, ["a", "b"]), [-2, 1])
    np.testing.assert_allclose(SafetyFirst(reward, helpfulness).score([""] * 2, ["a", "b"]), [-2, 7])
    reward.model.config.problem_type = "multi_label_classification"
    np.testing.assert_allclose(reward.label_log_odds([""] * 2, ["a", "b"]), [2, 2])


def test_the_log_odds_of_three_labels_are_those_of_their_softmax(tmp_path):
    save(tmp_path, labels=3)
    for label in range(3):
        reward = ClassifierReward(tmp_path, label=label)
        z = reward.all_logits([""], ["abc"])[0]
        p = np.exp(z[label]) / np.exp(z).sum()
        np.testing.assert_allclose(reward.label_log_odds([""], ["abc"]), [np.log(p / (1 - p))], rtol=1e-6)


def test_a_cached_classifier_is_refused_since_its_logits_are_lost(tmp_path):
    save(tmp_path)
    for members in ((cached(ClassifierReward(tmp_path)), helpfulness), (safety, cached(ClassifierReward(tmp_path)))):
        with pytest.raises(ConfigError, match="cache the choice, not its members"):
            SafetyFirst(*members)
    assert SafetyFirst(cached(safety), helpfulness).score([""], ["rude"]) == [-2]


def test_whitened_the_reference_scores_mean_0_and_variance_1_whatever_the_batch():
    reward = normalised(SafetyFirst(safety, helpfulness), [""] * 4, list(LOGITS))
    scores = reward.score([""] * 4, list(LOGITS))
    assert scores.mean() == pytest.approx(0) and scores.std() == pytest.approx(1)
    assert [reward.score([""], [text])[0] for text in LOGITS] == scores.tolist()


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ConfigError, match="a probability between 0 and 1"):
        SafetyFirst(safety, helpfulness, threshold)
