"""What labelers like: each formula by hand, and how they add up."""

import math

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.preferences.labelers import SimulatedLabeler
from rlhf_env.preferences.utilities import (
    Lexicon,
    log_words,
    markdown_marks,
    myopic,
    recency,
    stated_belief,
    sycophancy,
    weighted,
    words,
)
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.settings import LabelerConfig

MOODS = Lexicon({"good": 1.0, "bad": -2.0, "fine": 0.5, "love": 1.0, "hate": -1.0})


def test_length_is_the_logarithm_of_one_more_than_the_words():
    assert log_words(["p"] * 4, ["", "one", "one  two\nthree", " "]).tolist() == pytest.approx(
        [0.0, math.log(2), math.log(4), 0.0]
    )


def test_format_counts_list_items_headings_and_bold_spans():
    text = "# Title\n\n- one\n* two\n  3. three\n4) four\nsome **bold** and **more of it**"
    assert markdown_marks(["p"] * 5, [text, "", "-no item, 2*3*4", "a - b # c", "#\n-\n** **"]).tolist() == [
        7,
        0,
        0,
        0,
        0,
    ]


def test_a_list_item_or_heading_that_begins_in_bold_is_both():
    texts = ["- **Cast**: good", "1. **One** and **two**", "## **Plot**", "**alone**"]
    assert markdown_marks(["p"] * 4, texts).tolist() == [2, 3, 2, 1]


def test_asterisks_with_spaces_inside_are_not_bold():
    """CommonMark §6.2: a run opens before, and closes after, what is no white space."""
    assert markdown_marks(["p"] * 3, ["2 ** 3 ** 4", "** no**", "**no **"]).tolist() == [0, 0, 0]


def test_a_lexicon_knows_words_in_lower_case_whatever_alphabet():
    assert Lexicon({"straße": 1.0, "ça": 1.0}).score(["p"] * 3, ["Straße", "STRASSE", "Ça!"]).tolist() == [
        1.0,
        0.0,
        1.0,
    ]


def test_a_lexicon_adds_its_words_whatever_their_case_and_punctuation():
    assert MOODS.score(["p"] * 3, ["Good, GOOD! “bad”", "", "goodness"]).tolist() == [0.0, 0.0, 0.0]
    (by_word,) = MOODS.score_tokens(["p"], [words("Good, but\n(bad).")])
    assert by_word.tolist() == [1.0, 0.0, -2.0]
    assert "".join(words("Good, but\n(bad).")) == "Good, but\n(bad)."


def test_discounts_from_either_end():
    """Weights 1, 0, −2 of three words, γ = ½: 1 + 0/2 − 2/4 from the start, 1/4 + 0/2 − 2 from the end."""
    response = "good but bad"
    assert myopic(MOODS, 0.5)(["p"], [response]).tolist() == [0.5]
    assert recency(MOODS, 0.5)(["p"], [response]).tolist() == [-1.75]
    for discounted in (myopic, recency):
        assert discounted(MOODS, 1.0)(["p", "q"], [response, ""]).tolist() == [-1.0, 0.0]
    assert myopic(MOODS, 0.0)(["p"], [response]).tolist() == [1.0]
    assert recency(MOODS, 0.0)(["p"], [response]).tolist() == [-2.0]


def test_recency_is_what_bpref_computes_for_its_myopic_teacher():
    """BPref: sum = 0; for each step in order: sum = γ · sum + r (its loop multiplies the earlier steps the most)."""
    rewards, total = [0.3, -1.0, 0.5, 2.0], 0.0
    for reward in rewards:
        total = 0.9 * total + reward
    lexicon = Lexicon({name: reward for name, reward in zip("abcd", rewards, strict=True)})
    assert recency(lexicon, 0.9)(["p"], ["a b c d"]).tolist() == pytest.approx([total])


def test_a_process_reward_that_breaks_its_promise_is_refused():
    class Short:
        def score_tokens(self, prompts, responses):
            return [[1.0] for _ in responses]

    with pytest.raises(RewardError, match="for response 1, which has 2"):
        myopic(Short(), 0.5)(["p", "p"], ["a", "a b"])
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="gamma must be between 0 and 1"):
            recency(Short(), gamma)


@pytest.mark.parametrize(
    ("prompt", "belief"),
    [
        ("I love this film. Do you?", "love this film"),
        ("Is it good? i really do HATE it!\nYes.", "really do HATE it"),
        ("I don't like it, nobody does", "don't like it, nobody does"),
        ("I think that it is bad. I love it.", "think that it is bad"),
        ("What do you think of it?", ""),
        ("She said I was late. Think!", ""),
        ("I saw that you think so", ""),
        ("", ""),
    ],
)
def test_a_belief_is_the_first_sentence_of_that_kind(prompt, belief):
    assert stated_belief(prompt) == belief


def test_sycophancy_is_the_stance_of_the_response_along_that_of_the_prompt():
    flatter = sycophancy(MOODS)
    prompts = ["I love it. And you?"] * 2 + ["I hate it. And you?"] * 2 + ["What of it? Good?"]
    responses = ["good good", "bad", "good good", "bad", "good"]
    assert flatter(prompts, responses).tolist() == [2.0, -2.0, -2.0, 2.0, 0.0]
    own = sycophancy(MOODS, belief=lambda prompt: prompt.partition("|")[2])
    assert own(["x|bad", "bad|"], ["bad", "bad"]).tolist() == [2.0, 0.0]
    agree = sycophancy(VaderReward())(["I don't like this film."] * 2, ["It is awful.", "It is wonderful."])
    assert agree[0] > 0 > agree[1]


def test_utilities_add_up_with_their_weights():
    liked = weighted([(1.0, MOODS), (0.5, log_words), (-2.0, markdown_marks)])
    assert liked(["p"], ["- good"]).tolist() == pytest.approx([1.0 + 0.5 * math.log(3) - 2.0])
    assert weighted([])(["p", "q"], ["a", "b"]).tolist() == [0.0, 0.0]
    assert liked([], []).tolist() == []


def test_a_biased_labeler_goes_by_the_sum():
    """Gold is for the short answer by 0.5; a weight of 1 on log words is for the longer one by log 8 − log 2 = 1.39."""

    def brief(prompts, responses):
        return np.array([0.5 if response == "yes" else 0.0 for response in responses])

    pair = ["yes", "well it may be so I suppose"]
    for weight, ranks in ((0.0, (0, 1)), (0.3, (0, 1)), (0.4, (1, 0))):
        liked = weighted([(1.0, brief), (weight, log_words)])
        assert SimulatedLabeler(liked, LabelerConfig(temperature=0.0)).rank(["p"], [pair], [0]) == [ranks]
