"""Probes on rewards whose answers are known exactly."""

from collections import Counter

import numpy as np
import pytest

from rlhf_env.errors import DataError, RewardError
from rlhf_env.preferences.probes import AGREE, DISAGREE, PADDING, PRAISE, PROBES, is_defect, probe, with_typos

HOSTILE = ["", " ", "\x1b[2J", "‮abc‬", "a" * 3000, "(.*)[\\", "ﬀ ß İstanbul", "👩‍👩‍👧 ok", "\ud800 half"]


def length(prompts, responses):
    return [len(response) for response in responses]


def rows_of(reward, prompts=("p", "q"), responses=("ab", "abcd"), **settings):
    return {row["probe"]: row for row in probe(reward, prompts, responses, **settings)}


def test_a_reward_of_length_rises_by_what_is_added():
    """Lengths 2 and 4 have deviation 1, so changes are in characters."""
    rows = rows_of(length)
    assert rows["padding"]["change"] == len(PADDING)
    assert rows["praise"]["change"] == len(PRAISE)
    assert rows["repeated"]["change"] == (3 + 5) / 2  # the response again, and a space
    assert rows["agreement"]["change"] == len(AGREE) - len(DISAGREE)
    assert rows["empty"]["change"] == (-2 - 4) / 2
    assert rows["echo"]["change"] == (1 - 2 + 1 - 4) / 2
    assert rows["upper case"]["change"] == 0
    assert rows["white space"]["change"] == 2
    assert (rows["padding"]["raised"], rows["padding"]["lowered"]) == (1, 0)
    assert (rows["empty"]["raised"], rows["empty"]["lowered"]) == (0, 1)
    assert (rows["typos"]["change"], rows["typos"]["responses"]) == (0, 1)  # a word of two letters cannot have one


def test_which_change_is_a_defect():
    assert {name for name, row in rows_of(length).items() if is_defect(row)} == {"padding", "praise", "white space"}

    def brevity(prompts, responses):
        return [-len(response) for response in responses]

    assert is_defect(rows_of(brevity)["white space"]) and not is_defect(rows_of(brevity)["padding"])


def test_a_rise_within_chance_is_no_defect():
    assert rows_of(length)["repeated"]["change_low"] < 0 and not is_defect(rows_of(length)["repeated"])


def test_every_prompt_weighs_the_same():
    """Lengths 2, 2, 2 and 8: an empty response changes them by −2 and −8, the mean of the prompts is −5."""
    rows = rows_of(length, ["p", "p", "p", "q"], ["ab", "cd", "ef", "abcdefgh"])
    assert rows["empty"]["change"] == pytest.approx(-5 / np.std([2, 2, 2, 8]))


def test_the_unit_of_the_score_does_not_matter():
    def other(prompts, responses):
        return [1000 - 0.25 * len(response) for response in responses]

    for name, row in rows_of(other).items():
        assert row["change"] == pytest.approx(-rows_of(length)[name]["change"])


def test_a_unit_may_be_given():
    """Such as that of more responses than are changed, which may all score alike."""
    assert rows_of(length, responses=("ab", "cd"), unit=4.0)["white space"]["change"] == 0.5


def test_the_space_before_a_response_stays_there():
    seen = []

    def spy(prompts, responses):
        seen.extend(responses)
        return length(prompts, responses)

    rows_of(spy, responses=(" so good.", "bad"))
    assert {f" {PRAISE}so good.", f"{PRAISE}bad", f" {AGREE}so good.", " so good. so good."} <= {*seen}


def test_a_probe_that_cannot_be_scored_is_told_and_the_others_go_on():
    def picky(prompts, responses):
        if "" in responses:
            raise RewardError("nothing to read")
        return length(prompts, responses)

    rows = rows_of(picky)
    assert rows["empty"]["error"] == "nothing to read" and is_defect(rows["empty"])
    assert {name for name, row in rows.items() if "change" in row} == {each.name for each in PROBES} - {"empty"}


def test_the_seed_alone_decides_on_typos():
    def positions(prompts, responses):
        return [sum(i * ord(c) for i, c in enumerate(response)) for response in responses]

    texts = ["several words that can have errors", "another of them, somewhat longer"]
    first, again, other = (rows_of(positions, responses=texts, seed=seed)["typos"] for seed in (0, 0, 1))
    assert first == again != other


def test_scores_that_never_differ_have_no_unit():
    with pytest.raises(DataError, match="all 2 responses score the same"):
        rows_of(lambda prompts, responses: [1.0] * len(responses))
    with pytest.raises(DataError, match="2 prompts were given with 1"):
        rows_of(length, responses=["a"])


def test_typos_exchange_inner_letters_and_nothing_else():
    rng = np.random.default_rng(0)
    text = "Seven words of which three may change: 1234567 aaaa."
    for _ in range(50):
        wrong = with_typos(text, rng)
        assert wrong != text and Counter(wrong) == Counter(text)
        for old, new in zip(text.split(), wrong.split(), strict=True):
            assert (old[0], old[-1]) == (new[0], new[-1])
    assert with_typos("a bc def 1234 aaaa", rng) == "a bc def 1234 aaaa"


def test_hostile_texts():
    rows = rows_of(length, ["p"] * len(HOSTILE), HOSTILE)
    assert all("change" in row for row in rows.values())
