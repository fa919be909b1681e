"""Splits by prompt: nothing leaks, nothing is lost, and a prompt stays where it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.splits import folds_by_prompt, normalised, split_by_prompt, split_by_shares
from rlhf_env.types import Comparison


def comparisons_of(*prompts):
    """Comparisons that can be told apart, one per prompt named."""
    return [Comparison(str(prompt), (f"{i}", "x"), (0, 1)) for i, prompt in enumerate(prompts)]


@given(
    prompts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40).filter(lambda them: len(set(them)) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**40),
)
def test_no_prompt_is_on_both_sides_and_nothing_is_lost_or_moved(prompts, share, seed):
    comparisons = comparisons_of(*prompts)
    learned, held_out = split_by_prompt(comparisons, share, seed)
    assert learned and held_out
    assert not {c.prompt for c in learned} & {c.prompt for c in held_out}
    for side in (learned, held_out):
        assert side == [c for c in comparisons if c in side]
    assert len(learned) + len(held_out) == len(comparisons)


@pytest.mark.parametrize("seed", range(5))
def test_the_share_is_of_comparisons_not_of_prompts(seed):
    assert len(split_by_prompt(comparisons_of(*range(100)), 0.2, seed)[1]) == 20
    # 20 prompts, each with 1, 2, 3, … 20 comparisons: 210 in all, 42 wanted, never farther off than a prompt is large
    sizes = [str(i) for i in range(1, 21) for _ in range(i)]
    assert len(split_by_prompt(comparisons_of(*sizes), 0.2, seed)[1]) == pytest.approx(42, abs=10)


@pytest.mark.parametrize("seed", range(5))
def test_each_side_has_a_prompt_however_unequal_they_are(seed):
    learned, held_out = split_by_prompt(comparisons_of("a", *["b"] * 50), 0.2, seed)
    assert {len(learned), len(held_out)} == {1, 50}
    comparisons = comparisons_of(*[letter for letter in "abc" for _ in range(10)])
    assert [len(side) for side in split_by_prompt(comparisons, 0.01, seed)] == [20, 10]
    assert [len(side) for side in split_by_prompt(comparisons, 0.99, seed)] == [10, 20]


def test_comparisons_of_one_prompt_are_held_out_singly():
    learned, held_out = split_by_prompt(comparisons_of(*["p"] * 10), 0.3, 0)
    assert (len(learned), len(held_out)) == (7, 3)
    assert [len(side) for side in split_by_prompt(comparisons_of("p", "p"), 0.3, 0)] == [1, 1]


def test_the_seed_decides_and_every_comparison_may_be_held_out():
    comparisons = comparisons_of(*range(50))
    assert split_by_prompt(comparisons, 0.2, 3) == split_by_prompt(comparisons, 0.2, 3)
    held_out = [tuple(c.prompt for c in split_by_prompt(comparisons, 0.2, seed)[1]) for seed in range(60)]
    assert len(set(held_out)) == 60
    assert set().union(*held_out) == set(map(str, range(50)))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_comparisons_to_split(count):
    with pytest.raises(DataError, match=f"at least two comparisons .* one to measure on; this is {count}"):
        split_by_prompt(comparisons_of(*"a" * count), 0.2, 0)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_one_side_empty(share):
    with pytest.raises(ConfigError, match=f"must be between 0 and 1, it is {share}"):
        split_by_prompt(comparisons_of(*"ab"), share, 0)


# --- near-duplicates --------------------------------------------------------------------------------

ALIKE = [
    "What is love?",
    "what is love?",
    "  What\n is\tlove? ",
    "WHAT IS LOVE?",
    "\uff37hat is love?",
    "What\u00a0is love?",
]


def test_case_space_and_other_code_points_make_no_other_prompt():
    assert {normalised(prompt) for prompt in ALIKE} == {"what is love?"}
    assert normalised("What is love") != normalised("What is love?")
    assert normalised("stra\u00dfe") == normalised("STRASSE")


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_are_on_one_side(seed):
    comparisons = comparisons_of(*ALIKE, *"abcdefgh")
    learned, held_out = split_by_prompt(comparisons, 0.5, seed)
    assert not {normalised(c.prompt) for c in learned} & {normalised(c.prompt) for c in held_out}
    sides = split_by_shares(comparisons, {"test": 0.3, "validation": 0.3}, seed + 3)
    assert len({name for name, side in sides.items() for c in side if c.prompt in ALIKE}) == 1


# --- by shares, by hash -----------------------------------------------------------------------------

SHARES = {"test": 0.1, "validation": 0.2}


def side_of(sides):
    return {c: name for name, side in sides.items() for c in side}


@given(
    prompts=st.lists(st.text(alphabet="aAb \n", max_size=5), min_size=40, max_size=80, unique=True),
    seed=st.integers(0, 2**40),
)
def test_no_prompt_is_on_two_sides_and_all_are_on_one(prompts, seed):
    comparisons = comparisons_of(*prompts, *prompts[:7])
    try:
        sides = split_by_shares(comparisons, {"test": 0.4}, seed)
    except DataError:  # none fell to a side
        return
    assert sorted(map(len, sides.values()))[0] > 0 and sum(map(len, sides.values())) == len(comparisons)
    assert not {normalised(c.prompt) for c in sides["test"]} & {normalised(c.prompt) for c in sides["train"]}
    for side in sides.values():
        assert side == [c for c in comparisons if c in side]


def test_a_prompt_stays_where_it_is_when_others_come_go_or_are_reordered():
    comparisons = comparisons_of(*range(500))
    before = side_of(split_by_shares(comparisons, SHARES, 7))
    more = [*reversed(comparisons), *comparisons_of(*range(1000, 1500))]
    after = side_of(split_by_shares(more, SHARES, 7))
    assert {c: after[c] for c in comparisons} == before
    fewer = side_of(split_by_shares(comparisons[:200], SHARES, 7))
    assert {c: before[c] for c in comparisons[:200]} == fewer
    assert side_of(split_by_shares(comparisons, SHARES, 8)) != before


@pytest.mark.parametrize("seed", range(5))
def test_sides_have_their_shares_as_if_each_prompt_were_drawn(seed):
    sides = split_by_shares(comparisons_of(*range(2000)), SHARES, seed)
    assert list(sides) == ["test", "validation", "train"]
    for name, share in {**SHARES, "train": 0.7}.items():  # five standard deviations
        assert abs(len(sides[name]) - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("shares", [{"test": 0.0}, {"test": 1.0}, {"a": 0.5, "b": 0.5}, {"test": float("nan")}, {}])
def test_shares_that_leave_a_side_nothing(shares):
    with pytest.raises(ConfigError, match="shares must be between 0 and 1, in sum, too, and leave some for train"):
        split_by_shares(comparisons_of(*"abc"), shares)


def test_every_comparison_is_held_out_in_one_fold_with_all_of_its_prompt():
    comparisons = comparisons_of(*range(60)) + comparisons_of(*(f" {i} " for i in range(60)))
    folds = list(folds_by_prompt(comparisons, 4))
    assert len(folds) == 4 and sorted((c for _, out in folds for c in out), key=comparisons.index) == comparisons
    for learned, out in folds:
        assert len(learned) + len(out) == 120
        assert {normalised(c.prompt) for c in learned}.isdisjoint(normalised(c.prompt) for c in out)
    with pytest.raises(ConfigError, match="at least 2, not 1"):
        next(folds_by_prompt(comparisons, 1))


def test_what_is_left_is_called_train():
    with pytest.raises(ConfigError, match="train is what the other sides leave"):
        split_by_shares(comparisons_of(*"abc"), {"train": 0.8})


def test_a_side_to_which_no_prompt_falls():
    with pytest.raises(
        DataError, match="of 1 prompts none fell to (test|train): give it a larger share, or another seed"
    ):
        split_by_shares(comparisons_of("p", "P "), {"test": 0.5})
