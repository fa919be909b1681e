"""A preference less what rules say, by numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.reward_models.rules import Rule, RuleReward, matches


def length(prompts, responses):
    return [len(r) for r in responses]


def repeats_the_prompt(prompts, responses):
    return [0.5 * (p in r) for p, r in zip(prompts, responses, strict=True)]


REWARD = RuleReward(
    length, {"no_link": Rule(matches(r"https?://"), 3.0), "own_words": Rule(repeats_the_prompt, weight=4.0)}
)


def test_broken_rules_are_subtracted_each_by_name():
    """ "see http://x" has 12 characters and breaks one rule, "ask, you ask" half of the other."""
    texts = ["ask"] * 3, ["see http://x", "ask, you ask", "fine"]
    parts = REWARD.score(*texts)
    assert list(parts) == ["preference", "rule_no_link", "rule_own_words"]
    assert parts["rule_no_link"].tolist() == [-3, 0, 0] and parts["rule_own_words"].tolist() == [0, -2, 0]
    np.testing.assert_array_equal(scores_of(REWARD, *texts), [9, 10, 4])


def test_a_score_is_at_most_the_preference_and_that_where_nothing_is_broken():
    for text in ("", "http://", "ask", "plain\nhttps://a"):
        score, preference = scores_of(REWARD, ["ask"], [text])[0], len(text)
        assert score <= preference and (score == preference) == ("ask" not in text and "http" not in text)


def test_what_is_no_probability_is_refused():
    reward = RuleReward(length, {"short": Rule(length)})
    with pytest.raises(RewardError, match=r"the rule 'short' says 3.0 of row 1, .* the response is \"a‹U\+001B›b\""):
        reward.score(["", ""], ["a", "a\x1bb"])
    with pytest.raises(RewardError, match="says -1.0 of row 0"):
        RuleReward(length, {"odd": Rule(lambda p, r: [-1.0])}).score([""], ["a"])


def test_what_is_no_rule_is_refused():
    with pytest.raises(ConfigError, match="at least one rule"):
        RuleReward(length, {})
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression: missing \)"):
        matches("(")
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="weight of a rule must be at least 0"):
            Rule(length, weight)
