import math

import numpy as np
import pytest

from rlhf_env.errors import ConfigError
from rlhf_env.reward_models import VaderReward


def compound(valence: float) -> float:
    """VADER's normalisation of summed valences, x / √(x² + 15), to four decimals."""
    return round(valence / math.sqrt(valence**2 + 15), 4)


def test_scores_are_the_compound_sentiment_of_the_response():
    scores = VaderReward().score(["awful: "] * 3, ["the film is good", "the film is bad", "the film"])
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [compound(1.9), compound(-2.5), 0.0])  # lexicon: good 1.9, bad −2.5


def test_scoring_the_whole_text_hears_the_prompt():
    whole = VaderReward(of="text").score(["the film is not", "a bad film, "], [" good", "good music"])
    # "not" turns 1.9 around by the factor −0.74; bad −2.5 and good 1.9 add up
    np.testing.assert_array_equal(whole, [compound(-0.74 * 1.9), compound(-2.5 + 1.9)])


def test_text_without_known_words_scores_zero():
    np.testing.assert_array_equal(VaderReward().score([""] * 4, ["", "\n", "qwrt", "\x1b[2J"]), np.zeros(4))


def test_no_responses_no_scores():
    assert VaderReward().score([], []).shape == (0,)


def test_a_score_does_not_depend_on_batch_mates():
    reward, texts = VaderReward(), ["a lovely film", "a dull one", "good, bad"]
    np.testing.assert_array_equal(reward.score([""] * 3, texts), [reward.score([""], [text])[0] for text in texts])


def test_an_unknown_part_of_the_text_is_refused():
    with pytest.raises(ConfigError, match="'prompt'"):
        VaderReward(of="prompt")
