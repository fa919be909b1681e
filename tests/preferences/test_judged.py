"""Comparisons matched to each other, and the report of agreement; PandaLM's published figures."""

import json

import numpy as np
import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.agreement import kendall_w, majority, percent_agreement
from rlhf_env.preferences.dawid_skene import dawid_skene
from rlhf_env.preferences.judged import agreement_report, judged_items, label_table
from rlhf_env.records.jsonl import read_jsonl
from rlhf_env.types import Comparison

PREFERS = {"first": (0, 1), "second": (1, 0), "tie": (0, 0)}


def judged(labeler, says="first", prompt="p", responses=("a", "b")):
    return Comparison(prompt, responses, PREFERS[says], labeler)


# --- matching --------------------------------------------------------------------------------------


def test_the_same_question_is_one_item_whatever_the_order_of_its_responses():
    items = judged_items([judged("ann"), judged("ben", responses=("b", "a")), judged("ann", prompt="q")])
    assert [(item.prompt, item.ranks) for item in items] == [
        ("p", {"ann": (0, 1), "ben": (1, 0)}),
        ("q", {"ann": (0, 1)}),
    ]
    assert items[0].responses == ("a", "b")


def test_labels_are_the_preference_for_the_response_stored_first():
    items = judged_items([judged("ben", "tie"), judged("ann", "second"), judged("carl"), judged("ann", prompt="q")])
    labels, labelers = label_table(items)
    assert labelers == ("ann", "ben", "carl")
    np.testing.assert_array_equal(labels, [[0, 0.5, 1], [1, np.nan, np.nan]])


def test_who_judges_the_same_twice_is_matched_to_the_second_time_of_others():
    items = judged_items([judged("ann"), judged("ben"), judged("ann", "second"), judged("ben", "tie")])
    assert [item.ranks for item in items] == [{"ann": (0, 1), "ben": (0, 1)}, {"ann": (1, 0), "ben": (0, 0)}]


def test_rankings_are_matched_response_by_response():
    one, two = (Comparison("p", r, (0, 1, 2), who) for r, who in ((("a", "b", "c"), "ann"), (("c", "a", "b"), "ben")))
    assert judged_items([one, two])[0].ranks == {"ann": (0, 1, 2), "ben": (1, 2, 0)}
    with pytest.raises(DataError, match="item 0 has 3 responses"):
        label_table(judged_items([one]))


def test_other_responses_are_another_item():
    assert len(judged_items([judged("ann"), judged("ben", responses=("a", "c"))])) == 2


# --- the report ------------------------------------------------------------------------------------


@pytest.fixture
def small():
    """Four pairs. Ann, Ben: FF, FF, SS, SF; Carl judged the first three: F, S, S."""
    says = {"ann": "first first second second", "ben": "first first second first", "carl": "first second second"}
    return [judged(who, word, prompt=f"p{i}") for who, words in says.items() for i, word in enumerate(words.split())]


def test_a_report_by_hand(small):
    report = agreement_report([*small, judged("dora", prompt="alone"), judged(""), judged("ann", responses=("x", "x"))])
    counts = ("comparisons", "without_labeler", "same_text_twice", "labelers", "pairs")
    assert [report[name] for name in counts] == [14, 1, 1, 4, 4]
    assert report["percent_agreement"] == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    assert "fleiss_kappa" not in report  # the last pair has two labels, the others three
    votes = ("majority_first", "majority_second", "majority_tie", "no_majority")
    assert [report[name] for name in votes] == [2, 1, 0, 1]
    assert "rankings" not in report and "kendall_w" not in report


def test_each_two_labelers_by_hand(small):
    ann_ben, ann_carl, ben_carl = agreement_report(small)["between"]
    assert (ann_ben["labelers"], ann_ben["pairs"]) == (["ann", "ben"], 4)
    assert ann_ben["cohen_kappa"] == pytest.approx(0.5)  # p_o = ¾, p_e = ½ · ¾ + ½ · ¼
    assert ann_carl["pairs"] == 3 and ann_carl["cohen_kappa"] == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    assert "cohen_kappa_low" not in ann_carl
    assert ben_carl["labelers"] == ["ben", "carl"]


def test_from_ten_pairs_on_kappa_has_an_interval_and_the_most_pairs_come_first(small):
    more = [judged(who, "second", prompt=f"q{i}") for who in ("ben", "carl") for i in range(7)]
    between = agreement_report([*small, *more])["between"]
    assert [row["pairs"] for row in between] == [10, 4, 3] and between[0]["labelers"] == ["ben", "carl"]
    assert between[0]["cohen_kappa_low"] <= between[0]["cohen_kappa"] <= between[0]["cohen_kappa_high"]


def test_each_labeler_against_the_majority_of_the_others(small):
    ann, ben, carl = agreement_report(small)["each"]
    # Ben and Carl disagree about the second pair, so it has no majority for Ann; of the last, Ben alone is one.
    assert (ann["labeler"], ann["pairs"], ann["agrees_with_others"]) == ("ann", 4, pytest.approx(2 / 3))
    assert (ben["labeler"], ben["agrees_with_others"]) == ("ben", pytest.approx(2 / 3))
    assert (carl["labeler"], carl["pairs"], carl["agrees_with_others"]) == ("carl", 3, pytest.approx(2 / 3))


def test_rankings_have_kendalls_w():
    def ranking(who, *ranks, prompt="p"):
        return Comparison(prompt, ("a", "b", "c"), ranks, who)

    rankings = [
        *(ranking(who, 0, 1, 2) for who in ("ann", "ben", "carl")),
        *(ranking(who, *ranks, prompt="q") for who, ranks in (("ann", (0, 1, 2)), ("ben", (2, 1, 0)))),
        *(ranking(who, 0, 0, 0, prompt="r") for who in ("ann", "ben")),  # tells nothing apart
    ]
    report = agreement_report(rankings)
    assert report["rankings"] == 3 and "pairs" not in report
    assert report["kendall_w"] == pytest.approx((1 + 0) / 2)
    assert report["kendall_w_by_chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


def test_nothing_but_ties_has_no_coefficient_and_no_warning():
    all_tied = [Comparison("p", ("a", "b", "c"), (0, 0, 0), who) for who in ("ann", "ben")]
    assert "kendall_w" not in agreement_report(all_tied)
    report = agreement_report([judged(who, "tie", prompt=p) for who in ("ann", "ben") for p in "pq"])
    assert report["percent_agreement"] == 1
    assert not {"fleiss_kappa", "krippendorff_nominal", "krippendorff_ordinal"} & report.keys()
    assert "cohen_kappa" not in report["between"][0]


def test_a_report_is_plain_numbers_and_names(small):
    assert json.loads(json.dumps(agreement_report(small))) == agreement_report(small)


@pytest.mark.parametrize("comparisons", [[], [judged("ann")], [judged(""), judged("")]])
def test_what_nobody_judged_twice_has_no_agreement(comparisons):
    with pytest.raises(DataError, match=f"nothing among {len(comparisons)} comparisons was judged by two labelers"):
        agreement_report(comparisons)


# --- real people -----------------------------------------------------------------------------------


@pytest.fixture
def pandalm(shared_data):
    return read_jsonl(shared_data / "preferences" / "pandalm_3annotators.jsonl")


def test_pandalm_has_its_published_agreement(pandalm):
    says = {0: "tie", 1: "first", 2: "second"}
    comparisons = [
        judged(f"annotator{k}", says[label], row["prompt"], (row["response_1"], row["response_2"]))
        for row in pandalm
        for k, label in enumerate(row["human_labels"], start=1)
    ]
    report = agreement_report(comparisons, draws=100)
    kappas = [row["cohen_kappa"] for row in report["between"]]
    assert kappas == pytest.approx([0.852, 0.879, 0.862], abs=5e-4)
    assert report["fleiss_kappa"] == pytest.approx(0.8642, abs=5e-5)
    assert report["krippendorff_nominal"] == pytest.approx(0.8642, abs=5e-5)
    assert report["pairs"] == 999  # some were asked twice
    votes = ("majority_tie", "majority_first", "majority_second", "no_majority")
    assert [report[name] for name in votes] == [105, 422, 472, 0]


def test_pandalms_judges_are_as_right_as_published(pandalm):
    winner, _ = majority([row["human_labels"] for row in pandalm])
    np.testing.assert_array_equal(winner, [row["majority"] for row in pandalm])
    for judge, accuracy in (("ai_gpt35", 0.7107), ("ai_pandalm7b", 0.6677)):
        said = [row[judge] or 0 for row in pandalm]  # what could not be read counts as a tie
        assert percent_agreement(np.column_stack([winner, said])) == pytest.approx(accuracy, abs=5e-5)


def test_dawid_and_skene_agree_with_pandalms_majority(pandalm):
    labels = np.array([row["human_labels"] for row in pandalm], dtype=float)
    found = dawid_skene(labels)
    unanimous = (labels == labels[:, :1]).all(1)
    guess = found.classes[found.posterior.argmax(1)]
    assert found.converged and (guess[unanimous] == labels[unanimous, 0]).all()
    assert np.mean(guess == majority(labels)[0]) > 0.99


def test_tulus_labelers_agree_more_than_chance(shared_data):
    rows = read_jsonl(shared_data / "preferences" / "tulu_human_eval.jsonl")
    comparisons = [
        judged(
            row["labeller"],
            "tie" if row["preference"] == 0 else "first" if row["preference"] > 0 else "second",
            row["prompt"],
            (row["response_a"], row["response_b"]),
        )
        for row in rows
    ]
    report = agreement_report(comparisons, draws=200)
    assert report["comparisons"] == 1150 and 50 < report["pairs"] < 160
    assert 0 < report["krippendorff_nominal_low"] < report["krippendorff_ordinal"] < 1


def test_a_ranking_of_one_labeler_is_not_concordance():
    with pytest.raises(DataError):
        kendall_w(np.array([[0, 1, 2]]).T)
