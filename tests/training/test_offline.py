"""Data written beforehand become episodes that the environment could have written, or an error that names the line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rlhf_env.agents.dpo import DPO, DPOConfig
from rlhf_env.errors import ConfigError, DataError
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.records.jsonl import write_jsonl
from rlhf_env.text.codec import Codec
from rlhf_env.training.collect import collect
from rlhf_env.training.evaluate import response_texts
from rlhf_env.training.offline import load_log, load_pairs
from rlhf_env.types import Comparison, Rollout
from tests.builders import EOS, letter_score, make_envs, random_model
from tests.tiny_files import write_rows

CHAT = "{% for m in messages %}h{{ m['content'] }}g{% endfor %}"


def ids_of(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each episode, without the padding."""
    sides = (rollout.prompt_ids, rollout.prompt_mask), (rollout.response_ids, rollout.response_mask)
    prompts, responses = ([row[m].tolist() for row, m in zip(*side, strict=True)] for side in sides)
    return list(zip(prompts, responses, strict=True))


def pairs_file(tmp_path, *rows: dict[str, Any]) -> str:
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    return str(tmp_path / "pairs.jsonl")


def log_file(tmp_path, *rows: dict[str, Any]) -> str:
    write_jsonl(tmp_path / "log.jsonl", rows)
    return str(tmp_path / "log.jsonl")


# --- comparisons --------------------------------------------------------------------------------------


def test_a_ranking_gives_every_pair_of_different_responses(tmp_path):
    write_comparisons(
        tmp_path / "rankings.jsonl",
        [Comparison("abc", ("a", "bb", "a", "c"), (1, 0, 1, 1)), Comparison("d", ("ef", "g"), (0, 1))],
    )
    pairs = load_pairs(str(tmp_path / "rankings.jsonl"), make_envs())
    a, bb, c = [0, EOS], [1, 1, EOS], [2, EOS]
    assert [response for _, response in ids_of(pairs.first)] == [a, a, bb, bb, a, [4, 5, EOS]]
    assert [response for _, response in ids_of(pairs.second)] == [bb, c, a, c, c, [6, EOS]]
    assert pairs.preference.tolist() == [0, 0.5, 1, 1, 0.5, 1]  # a and a are the same text, and no pair
    assert [prompt for prompt, _ in ids_of(pairs.first)] == [[0, 1, 2]] * 5 + [[3]]
    assert pairs.first.ended.all()


def test_chosen_and_rejected_are_a_pair(tmp_path):
    pairs = load_pairs(pairs_file(tmp_path, {"prompt": "ca", "chosen": "hg", "rejected": ""}), make_envs())
    assert ids_of(pairs.first) == [([2, 0], [7, 6, EOS])]
    assert ids_of(pairs.second) == [([2, 0], [EOS])]  # to say nothing is a response
    assert pairs.preference.tolist() == [1]


def test_several_annotators_of_a_row_are_pairs_and_a_bad_response_is_named_by_its_line(tmp_path):
    row = {"instruction": "ca", "response1": "hg", "response2": "b", "annotator1": 1, "annotator2": 0, "annotator3": 2}
    pairs = load_pairs(pairs_file(tmp_path, row), make_envs())
    assert ids_of(pairs.first) == [([2, 0], [7, 6, EOS])] * 3
    assert pairs.preference.tolist() == [1, 0.5, 0]
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: a response of "):
        load_pairs(pairs_file(tmp_path, row, row | {"response2": "abcdefgh" * 9}), make_envs())


def test_a_soft_label_is_the_preference_of_its_pair(tmp_path):
    row = {"prompt": "ca", "responses": ["hg", "b"], "ranks": [1, 0], "preference": 0.25}
    assert load_pairs(pairs_file(tmp_path, row), make_envs()).preference.tolist() == [0.25]


def test_log_probabilities_are_the_references_under_the_law(tmp_path):
    reference = random_model(seed=2)
    envs = make_envs(reference=reference, temperature=0.7, banned_tokens=(8,))
    pairs = load_pairs(pairs_file(tmp_path, {"prompt": "abc", "chosen": "defg", "rejected": "h"}), envs)
    for rollout in (pairs.first, pairs.second):
        assert rollout.law == envs.task.law
        expected = teacher_forced_logp(reference, rollout)
        torch.testing.assert_close(rollout.ref_logp, expected, atol=1e-6, rtol=0)
        assert (rollout.ref_logp[rollout.response_mask] < 0).all()
        assert (rollout.ref_logp[~rollout.response_mask] == 0).all()


def test_a_response_that_fills_the_limit_has_no_eos(tmp_path):
    """The length limit ended it; one token less, and it ended by itself."""
    pairs = load_pairs(
        pairs_file(tmp_path, {"prompt": "a", "chosen": "bcd", "rejected": "bc"}), make_envs(max_new_tokens=3)
    )
    assert ids_of(pairs.first)[0][1] == [1, 2, 3] and not pairs.first.ended[0]
    assert ids_of(pairs.second)[0][1] == [1, 2, EOS] and pairs.second.ended[0]


def test_a_stop_string_ends_a_response_without_eos(tmp_path):
    row = {"prompt": "a", "chosen": "bcd", "rejected": "bc"}
    pairs = load_pairs(pairs_file(tmp_path, row), make_envs(stop_strings=("cd",)))
    assert ids_of(pairs.first)[0][1] == [1, 2, 3] and pairs.first.ended[0]
    assert ids_of(pairs.second)[0][1] == [1, 2, EOS]


def test_prompts_go_through_the_chat_template(tmp_path):
    envs = make_envs(tokenizer=Codec(random_model().tokenizer, chat_template=CHAT))
    pairs = load_pairs(pairs_file(tmp_path, {"prompt": "ab", "chosen": "c", "rejected": "d"}), envs)
    assert ids_of(pairs.first) == [([7, 0, 1, 6], [2, EOS])]


def test_sampled_responses_come_back_as_they_were(tmp_path):
    """What a policy wrote in this environment, written to a file as text and read again."""
    envs, policy = make_envs(4, max_new_tokens=5, banned_tokens=(8, 10)), random_model(seed=1)
    rollout = collect(policy, envs, ["abc", "d", "efghab", "ca"] * 4, seed=2)
    assert 0 < rollout.ended.sum() < 16
    texts = response_texts(envs.task, rollout)
    prompts = ["abc", "d", "efghab", "ca"] * 4
    source = log_file(tmp_path, *({"prompt": p, "response": r} for p, r in zip(prompts, texts, strict=True)))
    log = load_log(source, envs)
    assert ids_of(log) == ids_of(rollout)
    assert torch.equal(log.ended, rollout.ended)
    torch.testing.assert_close(log.ref_logp, rollout.ref_logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(log.score, rollout.score)
    torch.testing.assert_close(log.penalty, rollout.penalty)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"chosen": "abcd", "rejected": "a"},
            {"max_new_tokens": 3},
            "a response of 4 tokens, where the environment's have at most 3: raise max_new_tokens, or leave out what "
            "is too long with too_long=drop",
        ),
        (
            {"chosen": "abc", "rejected": "a"},
            {"max_new_tokens": 3, "stop_at_eos": False},
            "a response of 1 tokens, after which the environment, having no EOS, goes on until there are 3",
        ),
        (
            {"chosen": "ab", "rejected": "ah"},
            {"banned_tokens": (7,)},
            'the reference could not have written "ah" under the environment\'s law',
        ),
        (
            {"chosen": "ab", "rejected": "a"},
            {"min_new_tokens": 2},
            'the reference could not have written "a" under the environment\'s law',
        ),
        (
            {"chosen": "agcc", "rejected": "cd"},
            {"stop_strings": ("g",)},
            "the environment would have ended this response earlier",
        ),
        ({"chosen": "ab", "rejected": "xyz"}, {}, "the tokenizer cannot encode"),
        (
            {"prompt": "abcdefgh", "chosen": "ab", "rejected": "b"},
            {},
            "prompt has 8 tokens, but max_prompt_tokens is 6",
        ),
    ],
)
def test_what_the_environment_could_not_have_written_is_refused_with_its_line(row, settings, message, tmp_path):
    fine = {"prompt": "a", "chosen": "bcd", "rejected": "cde"}
    source = pairs_file(tmp_path, fine, {"prompt": "d"} | row)
    with pytest.raises(DataError) as caught:
        load_pairs(source, make_envs(**settings))
    assert str(caught.value).startswith(f"{source}:2: ")
    assert message in str(caught.value)


def test_without_a_reference_or_a_difference_there_is_nothing_to_learn(tmp_path):
    source = pairs_file(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "b"})
    with pytest.raises(DataError, match="no comparison has two responses that differ"):
        load_pairs(source, make_envs())
    with pytest.raises(ConfigError, match="relative to a reference"):
        load_pairs(source, make_envs(reference=None, beta=0.0))


def test_a_law_that_truncates_is_refused(tmp_path):
    source = pairs_file(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(ConfigError, match="leave both out"):
        load_pairs(source, make_envs(top_k=3))


def test_what_was_loaded_is_learned_from(tmp_path):
    rows = [{"prompt": p, "chosen": "a" * n, "rejected": "h" * (4 - n)} for p in ("abc", "d") for n in (1, 2, 3)]
    pairs = load_pairs(pairs_file(tmp_path, *rows), make_envs(reference=random_model()))
    agent = DPO(random_model(), DPOConfig(learning_rate=3e-3, batch_size=6, beta=0.5, epochs=20))
    learned = list(agent.fit(pairs))
    assert learned[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert learned[-1]["accuracy"] == 1


# --- logged responses ---------------------------------------------------------------------------------


def test_rewards_are_score_minus_penalty_on_the_last_token(tmp_path):
    """Without a KL term: 2 − (0.5 for the missing EOS) − 0.1 · 3 tokens, and −1 − 0.1 · 2."""
    envs = make_envs(max_new_tokens=3, missing_eos_penalty=0.5, length_penalty=0.1)
    rows = {"prompt": "ab", "response": "cde", "score": 2}, {"prompt": "c", "response": "d", "score": -1.0}
    log = load_log(log_file(tmp_path, *rows), envs)
    torch.testing.assert_close(log.reward, torch.tensor([[0, 0, 1.2], [0, -1.2, 0]]))
    torch.testing.assert_close(log.penalty, torch.tensor([0.8, 0.2]))
    assert log.score.tolist() == [2, -1]
    assert log.ended.tolist() == [False, True]
    assert log.beta.tolist() == pytest.approx([0.3, 0.3])
    assert torch.equal(log.logp, log.ref_logp) and (log.ref_logp[log.response_mask] < 0).all()
    assert log.kl.tolist() == [0, 0] and (log.values == 0).all()


def test_without_scores_the_reward_model_says_them(tmp_path):
    rows = {"prompt": "ab", "response": "cde"}, {"prompt": "c", "response": "d"}
    log = load_log(log_file(tmp_path, *rows), make_envs())
    assert log.score.tolist() == pytest.approx(letter_score(["ab", "c"], ["cde", "d"]))
    torch.testing.assert_close(log.reward.sum(1), log.score)


class EachToken:
    """A process reward: 1 for every token."""

    def score_tokens(self, prompts, responses):
        return [[1.0] * len(row) for row in responses]


def test_a_process_reward_stands_on_every_token(tmp_path):
    log = load_log(log_file(tmp_path, {"prompt": "ab", "response": "cd"}), make_envs(reward_model=EachToken()))
    assert log.reward.tolist() == [[1, 1, 1]]  # EOS is one
    assert log.score.tolist() == [3]


def test_without_a_reference_nothing_is_said_of_it(tmp_path):
    log = load_log(log_file(tmp_path, {"prompt": "ab", "response": "cd"}), make_envs(reference=None, beta=0.0))
    assert (log.ref_logp == 0).all() and log.reward.sum() != 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "c", "response": "d"}, "this row has no 'score' and {first} has one"),
        ({"prompt": "c", "response": "d", "score": "high"}, "'score' must be a number, it is a string"),
        ({"prompt": "c", "score": 1.0}, "the key 'response' is missing"),
        ({"prompt": "c", "response": "abcdefgh", "score": 1.0}, "a response of 8 tokens"),
    ],
)
def test_a_bad_row_of_a_log_is_refused_with_its_line(row, message, tmp_path):
    source = log_file(tmp_path, {"prompt": "a", "response": "b", "score": 1.0}, row)
    with pytest.raises(DataError) as caught:
        load_log(source, make_envs())
    assert str(caught.value).startswith(f"{source}:2: ")
    assert message.format(first=f"{source}:1") in str(caught.value)


def test_a_score_where_the_others_have_none_is_refused(tmp_path):
    rows = {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "c", "score": 1}
    with pytest.raises(DataError, match="log.jsonl:2: this row has a 'score' and .*:1 has none"):
        load_log(log_file(tmp_path, *rows), make_envs())


def test_how_much_is_read_by_the_reference_at_once_changes_nothing(tmp_path):
    """More rows than go through it in one pass, of unequal lengths."""
    rows = [{"prompt": "abcdef"[: 1 + k % 6], "response": "hgfed"[: k % 6], "score": k} for k in range(40)]
    envs = make_envs(reference=random_model(dtype="float64"))
    log = load_log(log_file(tmp_path, *rows), envs)
    alone = [load_log(log_file(tmp_path, row), envs) for row in rows[::7]]
    for some, one in zip(range(0, 40, 7), alone, strict=True):
        n = int(one.lengths[0])
        torch.testing.assert_close(log.ref_logp[some, :n], one.ref_logp[0], atol=1e-12, rtol=0)
    assert dataclasses.astuple(log.law) == dataclasses.astuple(envs.task.law)


def test_what_is_too_long_may_be_left_out(tmp_path):
    """Of a ranking of three only the pairs of what is left; rows of a log keep their scores."""
    ranking = {"prompt": "ab", "responses": ["a", "bcdefgh", "c"], "ranks": [0, 1, 2]}
    rows = (
        ranking,
        {"prompt": "ca", "responses": ["d", "abcdefgh"], "ranks": [0, 1]},
        {"prompt": "d", "responses": ["e", "f"], "ranks": [0, 1]},
    )
    source = write_rows(tmp_path / "pairs.jsonl", *rows)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: a response of 7 tokens.*too_long=drop"):
        load_pairs(source, make_envs())
    with pytest.warns(UserWarning, match="2 of 7 responses are longer than the limit and left out"):
        pairs = load_pairs(source, make_envs(), too_long="drop")
    kept = load_pairs(
        write_rows(tmp_path / "kept.jsonl", {**ranking, "responses": ["a", "c"], "ranks": [0, 1]}, rows[2]), make_envs()
    )
    for ours, theirs in ((pairs.first, kept.first), (pairs.second, kept.second)):
        assert torch.equal(ours.response_ids, theirs.response_ids) and torch.equal(ours.ref_logp, theirs.ref_logp)
    assert pairs.preference.tolist() == [1.0, 1.0]
    logged = [
        {"prompt": "ab", "response": text, "score": i} for i, text in enumerate(["abcdefgh", "c", "abcdefg", "h"])
    ]
    with pytest.warns(UserWarning, match="2 of 4 responses"):
        assert load_log(log_file(tmp_path, *logged), make_envs(), too_long="drop").score.tolist() == [1.0, 3.0]
    with pytest.raises(DataError, match="all responses are too long"):
        load_log(log_file(tmp_path, logged[0]), make_envs(), too_long="drop")
