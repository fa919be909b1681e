"""What `describe` says of comparisons: every number is counted by hand, and of real files from the raw rows."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_env.intervals import rate_interval
from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.preferences.statistics import describe, logistic_slope, preferred_rate
from rlhf_env.types import Comparison

A_OVER_B = (0, 1)


def judged(prompt, first, second, ranks=A_OVER_B, labeler="ann", **known):
    return Comparison(prompt, (first, second), ranks, labeler, **known)


# --- counts ----------------------------------------------------------------------------------------


def test_what_there_is():
    comparisons = [
        judged("p", "a", "b", policies=("sft", "ppo"), strength=2, time="2026-01-01"),
        judged("P ", "a", "b", (1, 0), "bob", policy="sft", order=(1, 0), preference=0.3),
        Comparison("q", ("a", "b", "c"), (0, 0, 1)),
        Comparison("q", ("same", "same"), (0, 0)),
    ]
    found = describe(comparisons)
    expected = {
        "comparisons": 4,
        "prompts": 3,
        "near_duplicate_prompts": 1,
        "responses": {"2": 3, "3": 1},
        "pairs": 1 + 1 + 3 + 0,
        "ties": 1,
        "labelers": 2,
        "policies": 2,
        "soft_labels": 1,
        "strengths": 1,
        "orders": 1,
        "times": 1,
        "identical": 1,
    }
    assert {key: found[key] for key in expected} == expected
    json.dumps(found)


# --- consistency -----------------------------------------------------------------------------------

CONSISTENT = {"repeated": 0, "judged_again": 0, "contradictions": 0, "cycles": 0, "cycles_of_all": 0}


def consistency(*comparisons):
    found = describe(comparisons)
    return {key: found[key] for key in CONSISTENT if found[key]}


def test_a_repeated_comparison_is_a_repetition_and_nothing_more():
    assert consistency(judged("p", "a", "b"), judged("p", "a", "b"), judged("p", "a", "b")) == {"repeated": 2}


def test_the_same_pair_may_be_judged_again_the_same_or_the_other_way():
    again = judged("p", "a", "b", time="later")
    assert consistency(judged("p", "a", "b"), again) == {"judged_again": 1}
    assert consistency(judged("p", "a", "b"), judged("p", "b", "a", (1, 0))) == {"judged_again": 1}  # turned round
    assert consistency(judged("p", "a", "b"), judged("p", "b", "a")) == {"judged_again": 1, "contradictions": 1}
    assert consistency(judged("p", "a", "b"), judged("p", "a", "b", (0, 0))) == {"judged_again": 1}  # a tie is neither


def test_different_labelers_prompts_and_unknown_labelers_contradict_nobody():
    assert consistency(judged("p", "a", "b"), judged("p", "b", "a", labeler="bob")) == {}
    assert consistency(judged("p", "a", "b"), judged("q", "b", "a")) == {}
    assert consistency(judged("p", "a", "b", labeler=""), judged("p", "b", "a", labeler="")) == {}


def test_preferences_that_run_in_a_circle():
    circle = [judged("p", "a", "b"), judged("p", "b", "c"), judged("p", "c", "a")]
    assert consistency(*circle) == {"cycles": 1, "cycles_of_all": 1}
    assert consistency(*circle[:2], judged("p", "a", "c")) == {}
    assert consistency(*circle[:2], judged("q", "c", "a")) == {}
    assert consistency(*circle[:2], judged("p", "c", "a", labeler="bob")) == {"cycles_of_all": 1}
    assert consistency(*circle[:2], judged("p", "c", "a", (0, 0))) == {}


def test_a_contradiction_is_no_circle_and_the_majority_of_judgements_decides():
    both_ways = [judged("p", "a", "b"), judged("p", "b", "a")]
    assert "cycles" not in consistency(*both_ways)
    three = [judged("p", "a", "b"), judged("p", "b", "c"), judged("p", "c", "a"), judged("p", "a", "c", time="2")]
    assert "cycles" not in consistency(*three)  # c over a and a over c: neither
    assert consistency(*three, judged("p", "c", "a", time="3"))["cycles"] == 1


# --- biases ----------------------------------------------------------------------------------------


def test_the_longer_is_preferred_by_words_and_by_characters():
    comparisons = [
        judged("p", "one two", "x"),  # longer in both, preferred
        judged("p", "one two three", "extraordinarily", (1, 0)),  # more words, fewer characters, not preferred
        judged("p", "ab", "cd"),  # of equal length
        judged("p", "long text", "x", (0, 0)),  # a tie
    ]
    length = describe(comparisons)["length"]
    assert (length["words"]["longer_preferred"], length["words"]["longer_preferred_pairs"]) == (1 / 2, 2)
    assert (length["characters"]["longer_preferred"], length["characters"]["longer_preferred_pairs"]) == (1, 2)


def test_an_interval_counts_a_ranking_once():
    ranking = Comparison("p", ("aaaa", "aa", "aaa"), (0, 1, 2))  # 4 over 2, 4 over 3, 2 over 3: two of three
    rate = preferred_rate("longer", [ranking], lambda c, i, j: len(c.responses[i]) - len(c.responses[j]))
    assert rate == {**rate_interval("longer", 2 / 3, 1), "longer_pairs": 3}
    assert preferred_rate("longer", [], lambda c, i, j: 1) == {}


def test_the_first_shown_is_told_from_the_order_not_from_the_place_in_the_file():
    comparisons = [
        judged("p", "a", "b", order=(0, 1)),  # first shown, preferred
        judged("p", "a", "b", order=(1, 0)),  # second shown
        Comparison("q", ("a", "b", "c"), (0, 1, 2), order=(2, 0, 1)),  # c a b: a over b only
        judged("q", "a", "b"),  # order not known
    ]
    found = describe(comparisons)
    assert found["position"]["first_shown_preferred"] == pytest.approx(2 / 5)
    assert found["position"]["first_shown_preferred_pairs"] == 5
    assert found["first_stored_preferred"] == 1


def test_without_an_order_nothing_is_said_of_position():
    assert describe([judged("p", "a", "b")] * 3)["position"] == {}


# --- the slope -------------------------------------------------------------------------------------


def test_two_kinds_of_pairs_give_the_slope_by_hand():
    """3 of 4 with x = log 2: σ(b log 2) = 3/4, so b = log 3 / log 2.

    Fisher's information is 4 · 3/16 · log² 2, and U = (y − 3/4) log 2. Of four prompts ΣU² = (3 · 1/16 + 9/16) log² 2,
    of two, the first with two that go with x, (1/4 + 1/4) log² 2. Student's t is 3.182446 of three degrees of freedom
    and 12.706205 of one.
    """
    unit = math.log(2)
    for prompts, squares, groups, t in [("abcd", 0.75, 4, 3.182446), ("aabb", 0.5, 2, 12.706205)]:
        found = logistic_slope([unit] * 4, [1, 1, 1, 0], prompts)
        assert found["slope"] == pytest.approx(math.log(3) / unit, rel=1e-10)
        half = t * math.sqrt(squares / 0.75**2 * groups / (groups - 1)) / unit
        assert found["slope_high"] - found["slope"] == pytest.approx(half, rel=1e-10)
        assert found["slope"] - found["slope_low"] == pytest.approx(half, rel=1e-10)
    assert logistic_slope([unit] * 4, [1, 1, 1, 0], "aaaa") == {"slope": found["slope"]}


def test_pairs_without_a_difference_are_no_prompts_that_are_known():
    assert logistic_slope([1, 1, 0, 0], [1, 0, 1, 1], "abcd") == logistic_slope([1, 1], [1, 0], "ab")


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=30),
    st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_the_slope_is_where_the_likelihood_is_flat_and_turning_pairs_changes_nothing(pairs, unit):
    x, y = (np.array(column) for column in zip(*pairs, strict=True))
    x = np.where(abs(x) < 0.1, 0, x) * unit
    found = logistic_slope(x, y, range(len(x)))
    with_x = np.where(x > 0, y, 1 - y)[x != 0]
    if not len(with_x) or with_x.min() == 1 or with_x.max() == 0:
        assert found == {}
        return
    gradient = ((y - 1 / (1 + np.exp(-found["slope"] * x))) * x / unit).sum()
    assert abs(gradient) < 1e-6
    turned = logistic_slope(-x, 1 - y, range(len(x)))
    assert turned["slope"] == pytest.approx(found["slope"], rel=1e-9, abs=1e-12 / unit)


@pytest.mark.parametrize("y", [[1, 0], [0, 1]])
def test_where_all_pairs_go_one_way_no_slope_is_likeliest(y):
    assert logistic_slope([0.5, -1.0], y, "ab") == {}
    assert logistic_slope([], [], []) == {} and logistic_slope([0.0], [1], "a") == {}


# --- labelers --------------------------------------------------------------------------------------


def test_each_labeler_has_a_row_the_busiest_first():
    comparisons = [
        judged("p", "long", "s", order=(1, 0)),
        judged("q", "long", "s", (0, 0)),
        judged("p", "long", "s", (1, 0), "bob"),
        Comparison("p", ("x", "y"), (0, 1)),  # by nobody known
    ]
    ann, bob = describe(comparisons)["by_labeler"]
    assert (ann["labeler"], ann["comparisons"], ann["ties"]) == ("ann", 2, 0.5)
    assert (ann["longer_preferred"], ann["first_shown_preferred"], ann["first_stored_preferred"]) == (1, 0, 1)
    assert (bob["labeler"], bob["comparisons"], bob["ties"], bob["longer_preferred"]) == ("bob", 1, 0, 0)
    assert "first_shown_preferred" not in bob


# --- real data -------------------------------------------------------------------------------------


def test_the_longer_reply_is_chosen_in_45_percent_of_hh(shared_data):
    found = describe(read_comparisons(shared_data / "preferences" / "hh_harmless_base.jsonl"))
    published = json.loads((shared_data / "expected" / "preference_checks.json").read_text())
    length = found["length"]["characters"]
    assert length["longer_preferred_pairs"] == 1807 - 7  # those of equal length
    assert round(length["longer_preferred"], 2) == 0.45
    # The published figure counts the seven as "the longer one was not chosen".
    share = length["longer_preferred"] * 1800 / 1807
    assert round(share, 2) == published["length_baseline_accuracy_longer_wins"]["hh_harmless"]
    assert (found["position"], found["first_stored_preferred"]) == ({}, 1)


def test_tulus_labelers_are_those_of_the_raw_rows(shared_data):
    """Counted from the rows themselves: ties, the longer and the first response preferred, of pairs of two texts."""
    file = shared_data / "preferences" / "tulu_human_eval.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = describe(read_comparisons(file))["by_labeler"]
    assert [(row["labeler"], row["comparisons"]) for row in found[:3]] == [("se", 190), ("yi", 154), ("yo", 137)]
    for row in found:
        theirs = [r for r in rows if r["labeller"] == row["labeler"] and r["response_a"] != r["response_b"]]
        decided = [r for r in theirs if r["preference"] != 0]
        leads = [(len(r["response_a"]) - len(r["response_b"])) * r["preference"] for r in decided]
        longer = [lead > 0 for lead in leads if lead]
        assert row["ties"] == pytest.approx(1 - len(decided) / len(theirs))
        assert row["longer_preferred"] == pytest.approx(np.mean(longer))
        assert row["longer_preferred_pairs"] == len(longer)
        assert row["first_stored_preferred"] == pytest.approx(np.mean([r["preference"] > 0 for r in decided]))


def test_the_annotators_of_pandalm(shared_data):
    file = shared_data / "preferences" / "pandalm_3annotators.jsonl"
    labels = [json.loads(line)["human_labels"] for line in file.read_text(encoding="utf-8").splitlines()]
    found = describe(read_comparisons(file))
    assert [row["ties"] for row in found["by_labeler"]] == [
        sum(row[number] == 0 for row in labels) / 999 for number in range(3)
    ]
    assert (found["labelers"], found["policies"], found["ties"]) == (3, 5, 326)
