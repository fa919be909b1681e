"""Log-probabilities do not depend on padding or batch mates; nothing of a model folder is inherited unasked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_env.errors import ConfigError, TokenizerError
from rlhf_env.models.causal_lm import VALUE_HEAD_FILE, CausalLM, left_padded
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import byte_tokenizer, char_tokenizer
from tests.builders import make_rollout, random_model

FAMILIES = ("gpt2", "llama")


def logp_alone(policy: CausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The oracle: one unpadded row through the Hugging Face model itself, no code of ours."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]  # type: ignore[operator]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 10), min_size=1, max_size=9), st.lists(st.integers(0, 10), min_size=1, max_size=7)
        ),
        min_size=1,
        max_size=4,
    ),
    left=st.integers(0, 5),
    right=st.integers(0, 5),
)
def test_log_probs_ignore_padding_and_batch_mates(family, rows, left, right):
    policy = random_model(family)
    rollout = make_rollout(policy, [p for p, _ in rows], [r for _, r in rows], left=left, right=right)
    logp, _, _ = policy.evaluate(rollout)
    for i, (prompt, response) in enumerate(rows):
        torch.testing.assert_close(logp[i, : len(response)], logp_alone(policy, prompt, response), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_position_ids_left_padding_would_matter(family):
    """The bug that the test above guards against is real for absolute positions, and hidden by rotary ones."""
    policy = random_model(family)
    ids, mask = torch.tensor([[0, 0, 0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    padded = policy.model(ids, attention_mask=mask, position_ids=torch.arange(7)[None]).logits[0, -1]  # type: ignore[operator]
    right = policy(ids, mask.bool())[0][0, -1]
    difference = (padded.log_softmax(-1) - right.log_softmax(-1)).abs().max()
    assert difference > 0.01 if family == "gpt2" else difference < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_observations_of_the_environment_give_the_same_log_probs(family):
    """Right-padded rows, as the environment shows them, are the same states."""
    policy = random_model(family)
    rows = [([3, 4, 5], [6, 7]), ([8], [9, 1])]  # states of 4 and 2 tokens
    obs = {k: np.zeros((2, 10), dtype=np.int64) for k in ("input_ids", "attention_mask", "response_mask")}
    for i, (prompt, response) in enumerate(rows):
        ids = prompt + response[:-1]
        obs["input_ids"][i, : len(ids)], obs["attention_mask"][i, : len(ids)] = ids, 1
        obs["response_mask"][i, len(prompt) : len(ids)] = 1
    law = make_rollout(policy, *zip(*rows, strict=True)).law
    got = policy.action_log_probs(obs, np.array([r[-1] for _, r in rows]), law)
    expected = [logp_alone(policy, *row)[-1].item() for row in rows]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_left_padded_by_hand():
    ids, mask = left_padded(
        torch.tensor([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    )
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert ids[mask].tolist() == [1, 2, 3, 4]


def test_dropout_never_turns_on():
    config = tiny_config("gpt2", 12)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    policy = CausalLM.from_config(config, char_tokenizer("abcdefghijkl", special=False))
    policy.train()
    ids = torch.tensor([[1, 2, 3]])
    first, second = (policy(ids, torch.ones_like(ids).bool())[0] for _ in range(2))
    assert torch.equal(first, second)


def test_values_start_at_zero_and_log_probs_are_float32_for_a_bfloat16_body():
    policy = CausalLM.from_config(
        tiny_config("gpt2", 12), char_tokenizer("abcdefghijkl", special=False), dtype="bfloat16"
    )
    rollout = make_rollout(policy, [[1, 2]], [[3, 4]])
    logp, values, _ = policy.evaluate(rollout)
    assert logp.dtype == values.dtype == torch.float32
    assert not values.any()


def test_frozen_copy_shares_nothing_and_learns_nothing():
    policy = random_model("gpt2")
    reference = policy.frozen_copy()
    before = [p.clone() for p in reference.parameters()]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))
    assert not any(p.requires_grad for p in reference.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze_layers_keeps_embeddings_and_the_first_blocks(family):
    policy = random_model(family).freeze_layers(1)
    rollout = make_rollout(policy, [[1, 2]], [[3, 4]])
    policy.evaluate(rollout)[0].sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    assert not any("wte" in n or "embed_tokens" in n or ".0." in n for n in moved)
    assert any(".1." in n for n in moved)
    with pytest.raises(ConfigError, match="cannot freeze 9 of 2"):
        policy.freeze_layers(9)


def test_save_and_load_is_bitwise_with_the_value_head(tmp_path):
    policy = CausalLM.from_config(tiny_config("llama", 259), byte_tokenizer(), seed=3)
    with torch.no_grad():
        policy.value_head.weight.normal_()
    policy.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / VALUE_HEAD_FILE).is_file()
    loaded = CausalLM.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(policy.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.tokenizer.encode("hé") == policy.tokenizer.encode("hé")


def test_missing_weights_are_an_error_not_random(tmp_path):
    from safetensors.torch import load_file, save_file

    policy = random_model("gpt2")
    policy.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks the weights"):
        CausalLM.from_pretrained(tmp_path)


def test_a_folder_that_is_no_model_is_named():
    with pytest.raises(ConfigError, match="there is no folder ./nowhere"):
        CausalLM.from_pretrained("./nowhere")


def test_more_tokens_than_embedding_rows():
    with pytest.raises(TokenizerError, match="12 tokens but the model's embedding only 5 rows"):
        CausalLM.from_config(tiny_config("gpt2", 5), char_tokenizer("abcdefghijkl", special=False))


def test_poisoned_generation_config_changes_nothing(tmp_path):
    """Sampling settings come from the law alone, whatever the folder's generation_config.json says."""
    from rlhf_env.models.decoding import sample_responses

    policy = CausalLM.from_config(tiny_config("gpt2", 259), byte_tokenizer())
    policy.save_pretrained(tmp_path)
    law = make_rollout(policy, [[5]], [[6]]).law
    arguments = {"max_new_tokens": 12, "seeds": [[i] for i in range(8)]}
    clean = sample_responses(CausalLM.from_pretrained(tmp_path), [[5, 6]] * 8, law, **arguments)
    poison = {
        "do_sample": True,
        "top_p": 0.33,
        "top_k": 1,
        "temperature": 0.1,
        "repetition_penalty": 1.9,
        "bos_token_id": 7,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(poison))
    poisoned = sample_responses(CausalLM.from_pretrained(tmp_path), [[5, 6]] * 8, law, **arguments)
    assert torch.equal(clean.response_ids, poisoned.response_ids)
    assert torch.equal(clean.logp, poisoned.logp)
