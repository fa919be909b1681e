import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.models.tiny import tiny_config
from rlhf_env.reward_models import ClassifierReward
from rlhf_env.reward_models.classifier import padding_token
from rlhf_env.text.tokenizers import byte_tokenizer, char_tokenizer

PAD, EOS = 258, 257
TEXTS = ["a", "a longer text", "", "the longest text of them all, by far", "<pad><eos> typed", "é😀"]


def save(folder, family="gpt2", *, labels=1, pad=PAD, tokenizer=None):
    """A classifier with random weights, large enough that scores differ visibly, and its tokenizer."""
    torch.manual_seed(0)
    if family == "bert":
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = BertForSequenceClassification(
            BertConfig(vocab_size=259, pad_token_id=pad, num_labels=labels, max_position_embeddings=64, **size)
        )
    else:
        config = tiny_config(family, 259, n_layer=1, n_embd=16, n_head=2, n_positions=64, pad_token_id=pad)
        config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return model.eval()


def alone(model, text, label=0):
    """The reference: one unpadded row through the model."""
    ids = torch.tensor([list(text.encode()) or [256]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, label].item()


@pytest.mark.parametrize(
    ("family", "pad"),
    [*((family, pad) for family in ("gpt2", "llama") for pad in (PAD, EOS, None)), ("bert", PAD)],
)
def test_a_score_is_the_logit_of_the_text_alone(tmp_path, family, pad):
    model = save(tmp_path, family, pad=pad)
    expected = [alone(model, text) for text in TEXTS]
    assert np.ptp(expected) > 0.1
    for batch_size in (1, 4, 32):
        scores = ClassifierReward(tmp_path, batch_size=batch_size).score([""] * len(TEXTS), TEXTS)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return ClassifierReward(folder, batch_size=4) if save(folder, request.param) else None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=9))
def test_no_batch_mate_and_no_padding_changes_a_score(saved, texts):
    together = saved.score([""] * len(texts), texts)
    np.testing.assert_allclose(together, [saved.score([""], [text])[0] for text in texts], atol=1e-5)


def test_equal_texts_score_exactly_alike_wherever_they_stand(saved):
    texts = ["same", "x", "y", "z", "same", "a longer one", "same"]
    scores = saved.score([""] * len(texts), texts)
    assert scores[0] == scores[4] == scores[6] != scores[1]


def test_a_longer_text_has_another_score(saved):
    """Also where what is appended reads like a special token: it stays text."""
    for more in (" ", "!", "<eos>", "<pad>", "\0"):
        assert abs(np.diff(saved.score(["", ""], ["a text", "a text" + more]))) > 1e-3


def test_the_folders_own_ideas_of_padding_and_truncation_are_overruled(tmp_path):
    save(tmp_path)
    texts = ["a", "a longer text", "".join(map(chr, range(40, 110)))]
    expected = ClassifierReward(tmp_path).score([""] * 3, texts)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left", "truncation_side": "right"}))
    np.testing.assert_array_equal(ClassifierReward(tmp_path).score([""] * 3, texts), expected)


def test_prompt_and_response_are_read_as_one_text_or_the_response_alone(tmp_path):
    model = save(tmp_path)
    np.testing.assert_allclose(ClassifierReward(tmp_path).score(["ab"], ["cd"]), alone(model, "abcd"), atol=1e-5)
    only = ClassifierReward(tmp_path, of="response")
    np.testing.assert_allclose(only.score(["ab"], ["cd"]), alone(model, "cd"), atol=1e-5)
    with pytest.raises(ConfigError, match="'prompt'"):
        ClassifierReward(tmp_path, of="prompt")


def test_a_label_is_chosen_by_name_or_number(tmp_path):
    model = save(tmp_path, labels=3)
    for label in ("LABEL_2", 2):
        scores = ClassifierReward(tmp_path, label=label).score([""], ["abc"])
        np.testing.assert_allclose(scores, alone(model, "abc", 2), atol=1e-5)
    with pytest.raises(ConfigError, match="LABEL_0.*got None"):
        ClassifierReward(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'LABEL_1'"):
        ClassifierReward(tmp_path, label="LABL_1")
    with pytest.raises(ConfigError, match="got 3"):
        ClassifierReward(tmp_path, label=3)


def test_of_labels_that_may_hold_together_each_has_its_logit(tmp_path):
    model = save(tmp_path, "bert", labels=3)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    for label in range(3):
        reward = ClassifierReward(tmp_path, label=f"LABEL_{label}")
        np.testing.assert_allclose(reward.score([""] * 6, TEXTS), [alone(model, t, label) for t in TEXTS], atol=1e-5)
        mean, std = reward.normalize_on([""] * 6, TEXTS)
        reward.save_pretrained(tmp_path / "saved")
        again = ClassifierReward(tmp_path / "saved", label=label)
        assert (again.mean, again.std) == (mean, std) and again.score([""] * 6, TEXTS).mean() == pytest.approx(0)


def test_what_is_too_long_loses_its_beginning_and_keeps_its_special_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    model = save(tmp_path, tokenizer=tokenizer)
    long = "x" * 30 + "".join(map(chr, range(40, 104)))
    np.testing.assert_allclose(ClassifierReward(tmp_path).score([""], [long]), alone(model, long[-64:]), atol=1e-5)
    short = ClassifierReward(tmp_path, max_length=5)
    np.testing.assert_allclose(short.score([""], [long]), alone(model, long[-5:]), atol=1e-5)

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[256, *long.encode()[-3:], 257]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, 0].item()
    np.testing.assert_allclose(ClassifierReward(tmp_path, max_length=5).score([""], [long]), expected, atol=1e-5)


def test_a_language_model_is_no_reward_model(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("gpt2", 259, pad_token_id=PAD)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"would be random: missing keys \['score.weight'\]"):
        ClassifierReward(tmp_path)


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        ClassifierReward(tmp_path)
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ClassifierReward(tmp_path)


def test_a_text_of_no_tokens_needs_a_special_token(tmp_path):
    save(tmp_path, tokenizer=char_tokenizer("ab", special=False))
    with pytest.raises(RewardError, match="''"):
        ClassifierReward(tmp_path).score([""], [""])


def test_weights_can_be_read_in_another_dtype(tmp_path):
    model = save(tmp_path)
    reward = ClassifierReward(tmp_path, dtype=torch.float64)
    assert reward.model.dtype == torch.float64
    np.testing.assert_allclose(reward.score([""], ["abc"]), alone(model.double(), "abc"), atol=1e-12)


# --- normalisation ---------------------------------------------------------------------------------


def test_a_foreign_classifier_is_not_normalised(tmp_path):
    save(tmp_path)
    reward = ClassifierReward(tmp_path)
    assert (reward.mean, reward.std) == (0, 1)
    np.testing.assert_array_equal(reward.score([""] * 6, TEXTS), reward.logits([""] * 6, TEXTS))


def test_the_responses_normalised_on_score_mean_0_and_variance_1(tmp_path):
    model = save(tmp_path)
    reward = ClassifierReward(tmp_path)
    mean, std = reward.normalize_on(["p"] * 6, TEXTS)
    logits = [alone(model, "p" + text) for text in TEXTS]
    assert mean == pytest.approx(sum(logits) / 6, abs=1e-5)
    assert std == pytest.approx((sum((x - mean) ** 2 for x in logits) / 6) ** 0.5, abs=1e-5)
    scores = reward.score(["p"] * 6, TEXTS)
    assert scores.mean() == pytest.approx(0, abs=1e-12) and scores.var() == pytest.approx(1)
    np.testing.assert_allclose(scores, (np.array(logits) - mean) / std, atol=1e-5)
    assert reward.normalize_on(["p"] * 6, TEXTS) == (mean, std)  # of the logits, however often it is asked


def test_what_has_no_variance_cannot_be_normalised(tmp_path):
    save(tmp_path)
    reward = ClassifierReward(tmp_path)
    with pytest.raises(RewardError, match="at least 2 responses, not on 1"):
        reward.normalize_on(["p"], ["a"])
    with pytest.raises(RewardError, match="all 3 responses have the same logit"):
        reward.normalize_on(["p"] * 3, ["a"] * 3)
    with torch.no_grad():
        reward.model.score.weight.fill_(torch.inf)
    with pytest.raises(RewardError, match="the logit of response 0 is"):
        reward.normalize_on(["p"] * 2, ["a", "b"])
    assert (reward.mean, reward.std) == (0, 1)


def test_what_was_learned_of_is_kept_with_the_weights_and_an_argument_wins(tmp_path):
    model = save(tmp_path / "foreign")
    reward = ClassifierReward(tmp_path / "foreign", of="response", max_length=5)
    mean, std = reward.normalize_on([""] * 6, TEXTS)
    reward.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {key: config[key] for key in config if key.startswith("reward_")} == {
        "reward_mean": mean,
        "reward_std": std,
        "reward_of": "response",
        "reward_max_length": 5,
        "reward_kind": "label",
        "reward_head": {},
    }
    again = ClassifierReward(tmp_path / "saved")
    np.testing.assert_allclose(again.score(["p"], ["longer"]), (alone(model, "onger") - mean) / std, atol=1e-5)
    asked = ClassifierReward(tmp_path / "saved", of="text", max_length=50)
    np.testing.assert_allclose(asked.logits(["p"], ["longer"]), alone(model, "plonger"), atol=1e-5)


@pytest.mark.parametrize("broken", [{"reward_std": 0.0}, {"reward_std": float("nan")}, {"reward_mean": float("inf")}])
def test_a_broken_normaliser_is_refused(tmp_path, broken):
    save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | broken))
    with pytest.raises(ConfigError, match="cannot be normalised"):
        ClassifierReward(tmp_path)


def test_a_text_that_the_tokenizer_cannot_read_is_named(tmp_path):
    save(tmp_path, tokenizer=char_tokenizer("ab"))
    with pytest.raises(RewardError, match="cannot read 'abc'"):
        ClassifierReward(tmp_path).score([""], ["abc"])
    with pytest.raises(ConfigError, match="max_length must be at least 1"):
        ClassifierReward(tmp_path, max_length=0)


# --- which token fills shorter rows ----------------------------------------------------------------


def words(*vocab, template=None, **special):
    """A tokenizer of whole words."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token=special.get("unk_token")))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if template:
        names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in template.split() if name != "$A"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=names)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "expected"),
    [
        (byte_tokenizer(), 259, 258),
        (words("a", eos_token="<eos>", bos_token="<bos>"), 3, "<eos>"),  # no pad: EOS
        (words("a", "<unk>", pad_token="<unk>", unk_token="<unk>", bos_token="<s>", eos_token="<s>"), 3, "<s>"),
        (words("a", eos_token="<eos>", bos_token="<bos>", template="<bos> $A <eos>"), 3, "<bos>"),  # ends in EOS
        (words("a", "<pad>", pad_token="<pad>", eos_token="<eos>"), 3, "<eos>"),  # typed text becomes <pad>
        (words("a", pad_token="<pad>", eos_token="<eos>"), 2, "<eos>"),  # <pad> was added without an embedding
        (words("a", eos_token="<eos>", template="$A <eos>"), 2, None),
        (words("a"), 1, None),
    ],
)
def test_padding_is_a_special_token_that_no_text_becomes_or_ends_in(tokenizer, vocab_size, expected):
    if isinstance(expected, str):
        expected = tokenizer.convert_tokens_to_ids(expected)
    assert padding_token(tokenizer, vocab_size) == expected
