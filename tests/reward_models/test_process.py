"""Steps: each is judged at its last token, knows nothing of what comes after, and makes its part of the score."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.reward_models import load_reward
from rlhf_env.reward_models.bradley_terry import new_reward_model
from rlhf_env.reward_models.heads import Steps
from rlhf_env.reward_models.process import ByStep, fit_steps, measure_steps
from rlhf_env.reward_models.steps import Solution, read_solutions, step_ends, token_before
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.text.tokenizers import byte_tokenizer
from rlhf_env.training.collect import collect
from tests.builders import ALPHABET, PROMPTS, make_envs, random_model
from tests.reward_models.test_bradley_terry import write_body


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return write_body(tmp_path_factory.mktemp("body"))


def solved(count, seed):
    """A step is right where it ends in +."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        right = rng.integers(0, 2, rng.integers(1, 4)).tolist()
        steps = tuple("".join(rng.choice(list("abc"), 3)) + "-+"[y] for y in right)
        found.append(Solution("p ", steps, tuple(map(float, right))))
    return found


def test_steps_end_at_separators_and_white_space_is_none():
    assert step_ends("ab\ncd", "\n") == [2, 5]
    assert step_ends("ab \n\n  \ncd\n", "\n") == [2, 10]
    assert step_ends("one.Step 2", "Step") == [4, 10]
    assert step_ends("", "\n") == [0] and step_ends(" \n", "\n") == [2]


def test_the_token_of_a_character():
    """BOS, "ab", "c\\n", two tokens that make up one character, EOS; "ab" may be cut off."""
    offsets = [(0, 0), (0, 2), (2, 4), (4, 5), (4, 5), (0, 0)]
    assert [token_before(end, offsets) for end in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 4]
    assert token_before(2, offsets[2:]) is None


@pytest.mark.parametrize(("aggregate", "expected"), [("product", 0.75 * 0.5 * 0.8), ("min", 0.5), ("last", 0.8)])
def test_what_the_steps_make_by_hand(aggregate, expected):
    logits = torch.tensor([math.log(3), 0, math.log(4)], dtype=torch.float64)
    assert Steps(aggregate).aggregated(logits).item() == pytest.approx(expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_knows_nothing_of_later_ones_of_batch_mates_or_of_padding(tmp_path, family):
    reward = new_reward_model(write_body(tmp_path, family), head=Steps(), dtype=torch.float64)
    texts = ["ab\ncd\nef", "ab\ncd\nxx", "ab", "a much longer step\nab"]
    logits = reward.step_logits(["p "] * 4, texts)
    assert [len(each) for each in logits] == [3, 3, 1, 2]
    np.testing.assert_allclose(logits[0][:2], logits[1][:2], rtol=1e-12)
    np.testing.assert_allclose(logits[0][0], logits[2][0], rtol=1e-12)
    assert abs(logits[0][2] - logits[1][2]) > 1e-6
    for text, each in zip(texts, logits, strict=True):
        np.testing.assert_allclose(reward.step_logits(["p "], [text])[0], each, rtol=1e-12)
        last = reward.read(reward.encode(["p "], [text])).item()  # what any program gets of the saved classifier
        np.testing.assert_allclose(each[-1], last, rtol=1e-12)
    p = 1 / (1 + np.exp(-logits[0]))
    np.testing.assert_allclose(reward.score(["p "], texts[:1]), p.prod(), rtol=1e-12)


def test_the_first_step_of_learning_costs_what_the_formula_says(body):
    reward = new_reward_model(body, head=Steps(), dtype=torch.float64)
    (a, b, c), (d,) = reward.step_logits(["p "] * 2, ["ab\ncd\nef", "gh"])
    said = [Solution("p ", ("ab", "cd", "ef"), (1.0, None, 0.25)), Solution("p ", ("gh",), (0.0,))]
    row = next(fit_steps(reward, said))
    cost = [math.log1p(math.exp(-a)), 0.25 * math.log1p(math.exp(-c)) + 0.75 * math.log1p(math.exp(c))]
    assert row["loss"] == pytest.approx((sum(cost) + math.log1p(math.exp(d))) / 3)
    assert b not in (a, c)


def test_right_steps_are_told_from_wrong_ones_and_the_model_is_kept(body, tmp_path):
    reward = new_reward_model(body, head=Steps("min"))
    before = measure_steps(reward, solved(40, 1))
    list(fit_steps(reward, solved(128, 0), BradleyTerryConfig(learning_rate=1e-2, epochs=8, batch_size=16)))
    after = measure_steps(reward, solved(40, 1))
    assert after["accuracy"] > 0.95 and after["log_loss"] < 0.2 < before["log_loss"]
    good, spoiled = reward.score(["p "] * 2, ["aba+\nbab+\nccc+", "aba+\nbab-\nccc+"])
    assert good > 0.8 and spoiled < 0.2
    reward.normalize_on(["p "] * 3, ["aba+", "ab-", "c"])
    reward.save_pretrained(tmp_path)
    again = load_reward(str(tmp_path))
    assert again.head == Steps("min")
    texts = ["aba+\nbab-", "", "c"]
    np.testing.assert_array_equal(again.score(["p "] * 3, texts), reward.score(["p "] * 3, texts))


def test_measures_by_hand(body, monkeypatch):
    reward = new_reward_model(body, head=Steps())
    monkeypatch.setattr(
        reward, "read_tokens", lambda rows: torch.full((1, len(rows[0]), 1), math.log(3), dtype=torch.float64)
    )
    said = [Solution("p ", ("a", "b", "c"), (1.0, 0.0, None)), Solution("p ", ("d", "e"), (1.0, 0.5))]
    found = measure_steps(reward, said)  # P = ¾ each
    assert found["accuracy"] == pytest.approx(2 / 3) and found["steps"] == 4
    loss = [math.log(4 / 3), math.log(4), math.log(4 / 3), 0.5 * math.log(4 / 3) + 0.5 * math.log(4)]
    assert found["log_loss"] == pytest.approx(np.mean(loss))


def test_steps_that_are_cut_off_are_not_judged(body):
    reward = new_reward_model(body, head=Steps(), max_length=4)  # bytes: "\nxyz"
    (logits,) = reward.step_logits(["p "], ["abc\nxyz"])
    assert len(logits) == 1
    assert measure_steps(reward, [Solution("p ", ("first step", "xyz"), (1.0, 0.0))])["steps"] == 1
    with pytest.raises(DataError, match="no judged step of 1 solutions is left"):
        next(fit_steps(reward, [Solution("p ", ("first step", "xyz of it"), (1.0, None))]))


def test_solutions_in_files(tmp_path):
    file = tmp_path / "steps.jsonl"
    row = {"prompt": "p", "steps": ["a", "b\n"], "labels": [True, 0.5], "by": "ann"}
    trl = {"prompt": "p", "completions": ["a", "b"], "labels": [1, None]}
    file.write_text(json.dumps(row) + "\n" + json.dumps(trl))
    assert read_solutions(file) == [Solution("p", ("a", "b"), (1.0, 0.5)), Solution("p", ("a", "b"), (1.0, None))]
    for wrong, message in (
        ({"labels": [1]}, "2 steps have a label each.*got 1"),
        ({"labels": [1, 2]}, "a step's label is 1, 0.*got 2"),
        ({"labels": [1, "good"]}, "numbers, true, false or null"),
        ({"labels": [1, -1]}, "got -1"),
        ({"steps": ["a", 3]}, "list of strings"),
        ({"steps": ["a\nb", "c"]}, "holds the separator"),
        ({"steps": ["a", " "]}, "none of them is blank"),
        ({"steps": [], "labels": []}, "at least one step"),
        ({"prompt": None}, "prompt"),
    ):
        file.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong))
        with pytest.raises(DataError, match=f"steps.jsonl:2.*{message}"):
            read_solutions(file)
    file.write_text(json.dumps(row | {"labels": [None, None]}))
    with pytest.raises(DataError, match="no step is judged"):
        read_solutions(file)


def test_paid_by_step_an_episode_has_the_score_of_the_model(body, tmp_path):
    """The separator that ends a step pays the change; blank steps and unfinished ones pay nothing; the end the rest."""
    model = new_reward_model(body, head=Steps(), dtype=torch.float64)
    model.normalize_on(["p "] * 3, ["aba+", "ab-", "c"])
    paying, (a, b) = ByStep(model), model.score(["p "] * 2, ["ab", "ab\ncd"])
    pieces = ["a", "b", "\n", "\n", "", "c", "d\nx", "y"]
    (paid,) = paying.score_tokens(["p "], [pieces])
    (second,) = model.score(["p "], ["ab\n\ncd"])
    np.testing.assert_allclose(paid, [0, 0, a, 0, 0, 0, second - a, 0], atol=1e-12)
    text = "".join(pieces)
    np.testing.assert_allclose(paying.score(["p "], [text]) + paid.sum(), model.score(["p "], [text]), atol=1e-12)
    np.testing.assert_array_equal(paying.score(["p "], ["ab"]), [a])
    assert b != a and paying.score_tokens([], []) == []
    for t in range(len(pieces)):  # a token is paid for what stands before it
        np.testing.assert_array_equal(paying.score_tokens(["p "], [pieces[: t + 1]])[0], paid[: t + 1])


def test_an_environment_pays_by_step(body, tmp_path):
    new_reward_model(body, head=Steps(separator="c")).save_pretrained(tmp_path / "steps")
    (tmp_path / "steps.yaml").write_text(f"kind: by_step\nreward: {tmp_path / 'steps'}\n")
    paying = load_reward(str(tmp_path / "steps.yaml"))
    policy, asked = random_model(), list(PROMPTS) * 32
    rollout = collect(policy, make_envs(4, reference=None, beta=0.0, reward_model=paying), asked, seed=1)
    written = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    plain = [max(ids[:-1], default=0) < 8 for ids in written]  # no special token inside, which would appear by name
    texts = ["".join(ALPHABET[i] for i in ids if i < 8) for ids in written]
    assert any("c" in text[:-1] for text, counts in zip(texts, plain, strict=True) if counts)
    expected = load_reward(str(tmp_path / "steps")).score(asked, texts)
    np.testing.assert_allclose(rollout.score.numpy()[plain], expected[plain], atol=1e-5)
    new_reward_model(body).save_pretrained(tmp_path / "plain")
    (tmp_path / "wrong.yaml").write_text(f"kind: by_step\nreward: {tmp_path / 'plain'}\n")
    with pytest.raises(ConfigError, match="wrong.yaml: only a model with the head Steps"):
        load_reward(str(tmp_path / "wrong.yaml"))


def test_what_cannot_judge_steps(body, tmp_path):
    with pytest.raises(ConfigError, match="has the head Steps"):
        next(fit_steps(new_reward_model(body), solved(2, 0)))
    with pytest.raises(ConfigError, match="knows nothing of flip_rate"):
        next(fit_steps(new_reward_model(body, head=Steps()), solved(2, 0), BradleyTerryConfig(flip_rate=0.1)))
    with pytest.raises(ConfigError, match="at least one character"):
        Steps(separator="")
    tokenizer = byte_tokenizer()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **small)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="reads what comes after a step"):
        next(fit_steps(new_reward_model(tmp_path, head=Steps()), solved(2, 0)))
