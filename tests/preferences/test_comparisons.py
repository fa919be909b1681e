"""Comparisons in files: two forms read, each error with its line, and a split that leaks no prompt."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.comparisons import (
    distinct,
    read_comparisons,
    split_by_prompt,
    write_comparisons,
    write_trl,
)
from rlhf_env.types import Comparison


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pairs.jsonl"


def write_lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- reading ---------------------------------------------------------------------------------------

RANKING = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 0, 1]}
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_rankings_with_and_without_what_is_optional(file):
    known = {"labeler": "ann", "policy": "sft", "order": [2, 0, 1], "time": "2026-01-01T00:00:00Z"}
    assert read_comparisons(write_lines(file, RANKING, RANKING | known)) == [
        Comparison("p", ("a", "b", "c"), (1, 0, 1)),
        Comparison("p", ("a", "b", "c"), (1, 0, 1), "ann", "sft", (2, 0, 1), "2026-01-01T00:00:00Z"),
    ]


def test_the_chosen_of_a_pair_is_its_first_and_best_response(file):
    assert read_comparisons(write_lines(file, PAIR)) == [Comparison("p", ("good", "bad"), (0, 1))]


def test_one_question_and_its_answers_as_messages(file):
    row = {"prompt": user("p"), "chosen": assistant("good"), "rejected": assistant("bad")}
    assert read_comparisons(write_lines(file, row)) == [Comparison("p", ("good", "bad"), (0, 1))]


def test_other_keys_are_ignored(file):
    rows = [PAIR | {"id": 7, "score_chosen": 0.5}, PAIR | {"responses": ["x"]}]
    assert read_comparisons(write_lines(file, *rows)) == [Comparison("p", ("good", "bad"), (0, 1))] * 2
    assert len(read_comparisons(write_lines(file, RANKING | {"model": "m", "chosen": None}))) == 1


def test_prompts_and_responses_may_be_empty(file):
    row = {"prompt": "", "chosen": "", "rejected": "x"}
    assert read_comparisons(write_lines(file, row)) == [Comparison("", ("", "x"), (0, 1))]


def test_one_line_without_an_end_after_a_byte_order_mark_is_a_file(file):
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert len(read_comparisons(file)) == 1


BAD_SECOND_LINES = {  # after the ranking in line 1
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1],}': ":2:57: malformed JSON|:2:58: malformed JSON",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, NaN]}': ":2: NaN is no JSON",
    '{"prompt": "p", "prompt": "q", "responses": ["a", "b"], "ranks": [0, 1]}': ":2: the key 'prompt' occurs twice",
    '{"prompt": "\\ud800", "responses": ["a", "b"], "ranks": [0, 1]}': ":2: half of a surrogate pair",
    '["p", ["a", "b"], [0, 1]]': ":2: a JSON object was expected, this is a list",
    '{"responses": ["a", "b"], "ranks": [0, 1]}': ":2: the key 'prompt' is missing; the row has 'responses', 'ranks'",
    '{"prompt": "p", "responses": ["a", "b"]}': ":2: the key 'ranks' is missing; the row has 'prompt', 'responses'",
    '{"prompt": "p", "response": ["a", "b"], "ranks": [0, 1]}': ":2: the key 'responses' is missing; the row has 'pro",
    '{"prompt": 3, "responses": ["a", "b"], "ranks": [0, 1]}': ":2: 'prompt' must be a string, it is an integer",
    '{"prompt": "p", "responses": "ab", "ranks": [0, 1]}': ":2: 'responses' must be a list, it is a string",
    '{"prompt": "p", "responses": ["a", null], "ranks": [0, 1]}': r":2: 'responses\[1\]' must be a string, it is null",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1.0]}': r":2: 'ranks\[1\]' must be an integer, it is a numb",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [false, true]}': r":2: 'ranks\[0\]' must be an integer, it is t",
    '{"prompt": "p", "responses": ["a"], "ranks": [0]}': ":2: a comparison needs at least 2 responses, it has 1",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0]}': ":2: the ranks of 2 responses are 2 integers from 0",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 2]}': r":2: .* without a gap.* got \[0, 2\]",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}': r":2: .* from 0 \(best\).* got \[1, 2\]",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "order": [0, 0]}': r":2: order must name each of the 2",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "order": "ab"}': ":2: 'order' must be a list, it is a s",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "order": [0, "1"]}': r":2: 'order\[1\]' must be an int",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "labeler": 7}': ":2: 'labeler' must be a string, it is",
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "time": null}': ":2: 'time' must be a string, it is nu",
    '{"prompt": "p", "answers": ["a", "b"]}': ":2: this row is neither a ranking .* it has 'prompt', 'answers'",
    "{}": ":2: this row is neither a ranking .* nor a pair .* it has no key",
    '{"prompt": "p", "responses": [], "ranks": [], "chosen": "a", "rejected": "b"}': ":2: this row has keys of a rank",
    '{"prompt": "p", "chosen": "a", "rejected": "b"}': (
        ":2: this row is a pair .*, but .*pairs.jsonl:1 is a ranking .* one file holds one form"
    ),
}


@pytest.mark.parametrize("line", BAD_SECOND_LINES)
def test_a_bad_ranking_is_refused_with_file_line_and_reason(file, line):
    file.write_text(f"{json.dumps(RANKING)}\n{line}\n")
    with pytest.raises(DataError, match=BAD_SECOND_LINES[line]) as caught:
        read_comparisons(file)
    assert str(caught.value).startswith(f"{file}:2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "p good", "rejected": "p bad"}, ":2: the key 'prompt' is missing; .* implicit prompt.* of its own"),
        (
            {"prompt": "p", "chosen": "good", "rejcted": "bad"},
            ":2: the key 'rejected' is missing; the row has 'prompt'",
        ),
        ({"prompt": "p", "chosen": None, "rejected": "bad"}, ":2: 'chosen' must be a string, it is null"),
        ({"prompt": "p", "chosen": assistant("a"), "rejected": assistant("b")}, ":2: .* three strings, or three lists"),
        ({"prompt": user("p"), "chosen": "a", "rejected": "b"}, ":2: .* three strings, or three lists of one message"),
        (
            {"prompt": user("p") + assistant("a") + user("q"), "chosen": assistant("a"), "rejected": assistant("b")},
            ":2: 'prompt' holds 3 messages, .* write longer conversations as strings",
        ),
        (
            {"prompt": user("p"), "chosen": user("p") + assistant("a"), "rejected": assistant("b")},
            ":2: 'chosen' holds 2 messages",
        ),
        ({"prompt": user("p"), "chosen": [], "rejected": assistant("b")}, ":2: 'chosen' holds 0 messages"),
        (
            {"prompt": user("p"), "chosen": user("a"), "rejected": assistant("b")},
            r":2: the role of chosen\[0\] must be 'assistant', it is 'user'",
        ),
        (
            {"prompt": ["p"], "chosen": assistant("a"), "rejected": assistant("b")},
            r":2: 'prompt\[0\]' must be an object, it is a string",
        ),
        (
            {"prompt": user("p"), "chosen": assistant("a"), "rejected": assistant(None)},
            r":2: rejected\[0\]: 'content' must be a string, it is null",
        ),
        (
            {"prompt": [{"content": "p"}], "chosen": assistant("a"), "rejected": assistant("b")},
            r":2: prompt\[0\]: the key 'role' is missing; the row has 'content'",
        ),
        (RANKING, ":2: this row is a ranking .*, but .*pairs.jsonl:1 is a pair"),
    ],
)
def test_a_bad_pair_is_refused_with_file_line_and_reason(file, row, message):
    with pytest.raises(DataError, match=message) as caught:
        read_comparisons(write_lines(file, PAIR, row))
    assert str(caught.value).startswith(f"{file}:2: ")


def test_lines_are_counted_as_an_editor_counts_them(file):
    file.write_text(f"\n{json.dumps(PAIR)}\r\n\n{json.dumps({'prompt': 'p', 'chosen': 'a'})}\n")
    with pytest.raises(DataError, match=":4: the key 'rejected' is missing"):
        read_comparisons(file)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"pairs\.jsonl: the file is empty"):
        read_comparisons(file)


# --- writing ---------------------------------------------------------------------------------------


def test_what_is_not_known_is_left_out_and_the_keys_keep_their_order(file):
    known = Comparison("p", ("ä", "b"), (0, 0), policy="sft", labeler="ann", time="2026-01-01T00:00:00Z", order=(1, 0))
    write_comparisons(file, [Comparison("p", ("a", "b"), (1, 0)), known])
    assert file.read_text(encoding="utf-8") == (
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 0]}\n'
        '{"prompt": "p", "responses": ["ä", "b"], "ranks": [0, 0], "labeler": "ann", "policy": "sft", '
        '"order": [1, 0], "time": "2026-01-01T00:00:00Z"}\n'
    )


@st.composite
def any_comparison(draw):
    responses = draw(st.lists(st.text(max_size=8), min_size=2, max_size=5))
    raw = draw(st.lists(st.integers(0, 4), min_size=len(responses), max_size=len(responses)))
    ranks = tuple(sorted(set(raw)).index(rank) for rank in raw)
    order = draw(st.none() | st.permutations(range(len(responses))).map(tuple))
    texts = [draw(st.text(max_size=8)) for _ in range(3)]
    return Comparison(texts[0], tuple(responses), ranks, texts[1], texts[2], order, draw(st.none() | st.text()))


@settings(max_examples=50, deadline=None)
@given(comparisons=st.lists(any_comparison(), min_size=1, max_size=4))
def test_any_comparisons_are_read_as_they_were_written(tmp_path_factory, comparisons):
    file = tmp_path_factory.mktemp("any") / "c.jsonl"
    write_comparisons(file, comparisons)
    assert read_comparisons(file) == comparisons


def test_pairs_for_trl_are_those_without_a_tie(file):
    three = Comparison("p", ("worst", "best", "middle"), (2, 0, 1))
    tied = Comparison("q", ("a", "b", "c"), (1, 0, 1))
    assert write_trl(file, [three, tied, Comparison("r", ("x", "y"), (0, 0))]) == 5
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"prompt": "p", "chosen": "best", "rejected": "worst"},
        {"prompt": "p", "chosen": "middle", "rejected": "worst"},
        {"prompt": "p", "chosen": "best", "rejected": "middle"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        {"prompt": "q", "chosen": "b", "rejected": "c"},
    ]
    assert read_comparisons(file)[0] == Comparison("p", ("best", "worst"), (0, 1))


def test_a_file_that_could_not_be_read_back_is_not_written(file):
    with pytest.raises(DataError, match=r"pairs\.jsonl: there are no comparisons to write"):
        write_comparisons(file, [])
    with pytest.raises(DataError, match=r"pairs\.jsonl: there is no pair to write in which one response is preferred"):
        write_trl(file, [Comparison("p", ("a", "b"), (0, 0))])
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: cannot write 'responses'"):
        write_comparisons(file, [Comparison("p", ("a", "\ud800"), (0, 1))])
    assert not file.exists()


def test_identical_responses_are_left_out_and_counted():
    same, partly, other = (Comparison("p", texts, (0, 1, 2)) for texts in [("a",) * 3, ("a", "a", "b"), ("", "a", "b")])
    assert distinct([same, partly, same, other]) == ([partly, other], 2)


# --- the split -------------------------------------------------------------------------------------


def comparisons_of(*prompts):
    """Comparisons that can be told apart, one per prompt named."""
    return [Comparison(prompt, (f"{i}", "x"), (0, 1)) for i, prompt in enumerate(prompts)]


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
    assert set().union(*held_out) == set(range(50))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_comparisons_to_split(count):
    with pytest.raises(DataError, match=f"at least two comparisons .* one to measure on; this is {count}"):
        split_by_prompt(comparisons_of(*"a" * count), 0.2, 0)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_one_side_empty(share):
    with pytest.raises(ConfigError, match=f"must be between 0 and 1, it is {share}"):
        split_by_prompt(comparisons_of(*"ab"), share, 0)


# --- real data -------------------------------------------------------------------------------------


def test_human_preferences_of_hh_rlhf(shared_data, tmp_path):
    file = shared_data / "preferences" / "hh_harmless_base.jsonl"
    comparisons = read_comparisons(file)
    assert len(comparisons) == len(file.read_bytes().splitlines()) == 1807
    published = json.loads((shared_data / "expected" / "preference_checks.json").read_text())
    # Responses of equal length (7 pairs, in characters) count as "the longer one was not chosen".
    longer = sum(len(c.responses[0]) > len(c.responses[1]) for c in comparisons) / len(comparisons)
    assert round(longer, 2) == published["length_baseline_accuracy_longer_wins"]["hh_harmless"] == 0.45
    assert write_trl(tmp_path / "trl.jsonl", comparisons) == 1807
    assert read_comparisons(tmp_path / "trl.jsonl") == comparisons
