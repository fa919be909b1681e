import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.models.tiny import tiny_config
from rlhf_env.reward_models import ClassifierReward
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
