"""The suite: RewardBench's arithmetic by hand, its files, and choices made of comparisons."""

import math

import numpy as np
import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.reward_suite import (
    REWARDBENCH,
    RUDE,
    SuiteItem,
    first_half,
    generated_suite,
    measure_suite,
    read_suite,
    suite_texts,
    ties_score,
)
from rlhf_env.types import Comparison
from tests.tiny_files import write_rows


def item(subset, section="", chosen=("good",), rejected=("bad",), id=""):
    return SuiteItem("p", chosen, rejected, subset, section, id)


def arrays(*rows):
    return [np.array(row, dtype=np.float64) for row in rows]


def by_subset(found):
    return {row["subset"]: row["accuracy"] for row in found["subsets"]}


def test_rewardbench_as_published():
    assert [sum(n for n, _ in those.values()) for those in REWARDBENCH.values()] == [358, 456, 740, 6 * 164 + 984]
    subsets = [pair for those in REWARDBENCH.values() for pair in those.values()]
    assert len(subsets) == 23
    assert {tag: sum(n for n, t in subsets if t == tag) for _, tag in subsets} == {
        "True": 100 + 95 + 154,  # AlpacaEval easy and hard, XSTest should respond
        "Neutral": 95 + 40 + 100 + 47 + 984 + 6 * 164,  # … length, MT medium, LLMBar natural and GPTOut, math, code
        "False": 28 + 37 + 134 + 92 + 46 + 100 + 100 + 250 + 136,  # MT easy and hard, other LLMBar, other Safety
    }


def test_sections_weigh_rewardbench_s_subsets_as_it_does():
    items = [item("math-prm"), item("math-prm"), item("hep-cpp"), item("alpacaeval-easy")]
    found = measure_suite(items, arrays([1, 0], [0, 1], [1, 0], [0, 1]))
    reasoning = (0.5 * 984 + 1 * 164) / (984 + 164)
    assert found["sections"] == [
        {"section": "Reasoning", "score": pytest.approx(reasoning)},
        {"section": "Chat", "score": 0},
    ]
    assert found["score"] == pytest.approx(reasoning / 2)
    assert [(row["subset"], row["length"]) for row in found["subsets"]] == [
        ("math-prm", "Neutral"), ("hep-cpp", "Neutral"), ("alpacaeval-easy", "True"),
    ]  # fmt: skip


def test_other_sections_weigh_their_subsets_by_prompts():
    items = [item("a", "S"), item("a", "S"), item("a", "S"), item("b", "S"), item("Focus")]
    found = measure_suite(items, arrays([1, 0], [1, 0], [1, 0], [0, 1], [1, 0]))
    assert {row["section"]: row["score"] for row in found["sections"]} == {"S": 0.75, "Focus": 1}
    assert found["score"] == 0.875


def test_the_best_of_four_shares_where_it_is_tied():
    four = item("Math", rejected=("x", "y", "z"))
    scores = arrays([4, 1, 2, 3], [4, 4, 2, 3], [4, 4, 4, 4], [4, 5, 1, 1])
    assert by_subset(measure_suite([four] * 4, scores))["Math"] == (1 + 1 / 2 + 1 / 4 + 0) / 4


def test_a_constant_reward_gets_half_and_a_perfect_one_everything():
    items = generated_suite(COMPARISONS)
    constant = measure_suite(items, [np.zeros(2)] * len(items))
    perfect = measure_suite(items, [np.array([1.0, 0.0])] * len(items))
    assert {*by_subset(constant).values()} == {0.5} and {*by_subset(perfect).values()} == {1.0}
    assert (constant["score"], perfect["score"]) == (0.5, 1)


def test_length_tags_say_whether_a_liking_for_length_helps():
    longer, shorter = (("longer",), ("s",)), (("s",), ("longer",))
    items = [item("l", "", *longer)] * 2 + [item("l", "", *shorter)] + [item("s", "", *shorter)]
    items += [item("n", "", *longer), item("n", "", *shorter)]
    found = measure_suite(items, [np.array([1.0, 0.0])] * len(items))
    assert {row["subset"]: row["length"] for row in found["subsets"]} == {"l": "True", "s": "False", "n": "Neutral"}


# --- Ties ------------------------------------------------------------------------------------------

TIES = [
    item("Ties", "", ("a", "b"), ("x", "y"), "tied:1"),
    item("Ties", "", ("a",), ("x",), "ref:1"),
    item("Ties", "", ("a", "b"), ("x",), "tied:2"),
    item("Ties", "", ("a",), ("x",), "ref:2"),
]


def test_the_ties_score_by_hand():
    """Pair 1: spread 1, gaps 1 and 4: not above the spread. Pair 2: spread ½, gaps 2½ and 1: both are."""
    scores = arrays([3, 2, 1, 0], [5, 1], [3, 2.5, 0], [2, 1])
    found = ties_score(TIES, scores)
    margin = (math.tanh(1 / 1 - 1) + math.tanh(1 / 0.5 - 1)) / 2
    assert found["ties"] == pytest.approx(0.3 + 0.3 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin)
    assert (found["tied_accuracy"], found["correctness_preferred_hard"]) == (1, 0.5)
    assert by_subset(measure_suite(TIES, scores))["Ties"] == found["ties"]


def test_equal_scores_of_all_answers_are_wrong_and_of_all_right_ones_ideal():
    assert ties_score(TIES, arrays([1] * 4, [1] * 2, [1] * 3, [1] * 2))["ties"] == 0
    ideal = ties_score(TIES, arrays([2, 2, 1, 1], [2, 1], [2, 2, 1], [2, 1]))
    assert ideal["ties"] == pytest.approx(1.01)  # the published score's largest value


def test_ties_without_a_counterpart_have_no_score():
    assert ties_score(TIES[:1], arrays([3, 2, 1, 0])) == {}
    assert measure_suite(TIES[:1], arrays([3, 2, 1, 0])) == {"subsets": [], "sections": []}


# --- files -----------------------------------------------------------------------------------------


def test_rows_of_both_benchmarks(tmp_path):
    file = write_rows(
        tmp_path / "rows.jsonl",
        {"id": 7, "prompt": "p", "chosen": "c", "chosen_model": "m", "rejected": "r", "subset": "hep-go"},
        {"id": "ref:0", "prompt": "p", "chosen": ["c"], "rejected": ["r", "s"], "num_correct": 1, "subset": "Ties"},
    )
    assert read_suite(file) == [
        SuiteItem("p", ("c",), ("r",), "hep-go", "", "7"),
        SuiteItem("p", ("c",), ("r", "s"), "Ties", "", "ref:0"),
    ]
    prompts, responses = suite_texts(read_suite(file))
    assert (prompts, responses) == (["p", "p"], [("c", "r"), ("c", "r", "s")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": []}, "rows.jsonl:1: 'chosen' must be a string or a list"),
        ({"rejected": [1]}, "rows.jsonl:1: 'rejected' must be a string or a list"),
        ({"subset": 1}, "rows.jsonl:1: 'subset' must be a string"),
        ({"section": 1}, "rows.jsonl:1: 'section' must be a string"),
        ({"subset": "Ties", "id": "3"}, "'ref:N' or 'tied:N', this one has '3'"),
    ],
)
def test_what_is_no_row_is_told_with_its_place(tmp_path, change, message):
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "s"} | change
    with pytest.raises(DataError, match=message):
        read_suite(write_rows(tmp_path / "rows.jsonl", row))


# --- generated -------------------------------------------------------------------------------------

COMPARISONS = [
    Comparison("one ", ("a rather good answer", "bad"), (0, 1)),
    Comparison("two ", ("much too long an answer", "short answer", "middling answer"), (2, 0, 1)),
    Comparison("three ", ("tied", "also"), (0, 0)),
]


def test_choices_made_of_comparisons():
    found: dict = {}
    for each in generated_suite(COMPARISONS):
        found.setdefault((each.section, each.subset), []).append((each.prompt, *each.chosen, *each.rejected))
    good, short = ("one ", "a rather good answer"), ("two ", "short answer")
    assert found["Chat", "better-over-worse"] == [(*good, "bad"), (*short, "much too long an answer")]
    assert found["Length", "longer-is-better"] == [(*good, "bad")]
    assert found["Length", "shorter-is-better"] == [(*short, "much too long an answer")]
    assert found["Language", "whole-over-cut"] == [(*good, "a rather")]  # the other has two words only
    assert found["Manners", "polite-over-rude"] == [(*good, good[1] + RUDE), (*short, short[1] + RUDE)]
    for prompt, best, wrong in found["Language", "clean-over-typos"]:
        assert wrong != best and sorted(wrong) == sorted(best) and prompt != "three "
    for row in found.get(("Relevance", "own-over-foreign"), []):
        assert row in [(*good, short[1]), (*short, good[1])]


def test_the_generated_suite_depends_on_its_seed_alone():
    many = [Comparison(f"p{i}", (f"some answer number {i}", "no"), (0, 1)) for i in range(20)]
    assert generated_suite(many, seed=1) == generated_suite(many, seed=1) != generated_suite(many, seed=2)


@pytest.mark.parametrize(("text", "half"), [(" one two  three four", " one two"), ("a b c", "a b c"), ("", "")])
def test_half_a_text(text, half):
    assert first_half(text) == half
