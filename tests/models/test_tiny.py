import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_env.errors import ConfigError
from rlhf_env.models.tiny import tiny_config


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tiny_model_has_the_asked_shape_and_special_tokens(family):
    config = tiny_config(family, 20, n_layer=1, n_embd=16, n_head=2, n_positions=8, eos_token_id=3, pad_token_id=4)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 3, 4)
    assert config.max_position_embeddings == 8
    model = AutoModelForCausalLM.from_config(config)
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.shape == (1, 8, 20)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_is_dropped_out(family):
    model = AutoModelForCausalLM.from_config(tiny_config(family, 20)).train()
    ids = torch.arange(12).unsqueeze(0)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="3 heads"):
        tiny_config("gpt2", 20, n_head=3)
    with pytest.raises(ConfigError, match="even"):
        tiny_config("llama", 20, n_embd=12, n_head=4)
    with pytest.raises(ConfigError, match="'bert'"):
        tiny_config("bert", 20)
