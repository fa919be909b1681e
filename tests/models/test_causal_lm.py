"""Log-probabilities do not depend on padding or batch mates; nothing of a model folder is inherited unasked."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import cloudpickle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_env.errors import ConfigError, TokenizerError
from rlhf_env.functional import kl_full
from rlhf_env.models.causal_lm import VALUE_HEAD_FILE, CausalLM
from rlhf_env.models.reading import left_padded
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import byte_tokenizer, char_tokenizer
from rlhf_env.types import Rollout, SamplingLaw
from tests.builders import PATHS, make_env, make_rollout, random_model, read_by

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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_observations_of_the_environment_give_the_same_log_probs(family, path):
    """Right-padded rows, as the environment shows them, are the same states."""
    policy = read_by(random_model(family), path)
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


def two_states() -> dict[str, np.ndarray]:
    """Prompt 3 4 5 with 6 written, and prompt 8 with 9 written."""
    return {
        "input_ids": np.array([[3, 4, 5, 6, 0], [8, 9, 0, 0, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=np.int8),
        "response_mask": np.array([[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]], dtype=np.int8),
    }


def test_where_the_law_truncates_only_the_observed_candidates_have_probability():
    """π(a) / Σ_c π(c) over the candidates, from the unrestricted probabilities."""
    policy, law = random_model(), SamplingLaw(11, 9, top_k=3)
    obs = two_states() | {"candidates": np.array([[7, 1, 4], [2, 0, -1]])}
    free = [policy.action_log_probs(two_states(), np.array([a, a]), SamplingLaw(11, 9)) for a in range(11)]
    probability = np.exp(np.stack(free, axis=1))  # [2, 11]
    got = np.exp(np.stack([policy.action_log_probs(obs, np.array([a, b]), law) for a, b in [(7, 2), (1, 0), (4, 5)]]))
    expected = probability[0, [7, 1, 4]] / probability[0, [7, 1, 4]].sum()
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-4)
    np.testing.assert_allclose(got[:2, 1], probability[1, [2, 0]] / probability[1, [2, 0]].sum(), rtol=1e-4)
    assert got[2, 1] == 0
    with pytest.raises(ConfigError, match="no candidates: pass on the whole observation"):
        policy.action_log_probs(two_states(), np.array([1, 2]), law)


def under(law: SamplingLaw, rollout: Rollout, reference: CausalLM) -> Rollout:
    """The rollout with the candidates that the reference names in each state; none in the padding, as in `collect`."""
    free = dataclasses.replace(law, top_k=0, top_p=1.0)
    candidates = law.candidates(reference.response_log_probs(dataclasses.replace(rollout, law=free))[0])
    candidates = torch.where(rollout.response_mask.unsqueeze(-1), candidates, -1)
    return dataclasses.replace(rollout, law=law, candidates=candidates)


def test_equal_weights_restricted_alike_have_no_kl_and_probabilities_sum_to_1():
    """By brute force over every response of two tokens: 4 may be first, and 4 may follow each."""
    policy, law = random_model(dtype="float64"), SamplingLaw(11, 9, temperature=0.7, banned_tokens=(10,), top_k=4)
    reference = policy.frozen_copy()
    responses = [[first, second] for first in range(11) for second in range(11)]
    rollout = under(law, make_rollout(policy, [[1, 2, 3]] * 121, responses), reference)
    logp, ref_logp = policy.evaluate(rollout)[0], reference.evaluate(rollout)[0]
    torch.testing.assert_close(logp, ref_logp, atol=1e-12, rtol=0)  # equal weights elsewhere in memory: not always bits
    assert torch.isfinite(logp).all(1).sum() == 16
    assert logp.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert (logp > -torch.inf)[:, 0].sum() == 4 * 11


@pytest.mark.parametrize("law", [SamplingLaw(11, 9, top_k=3, min_new_tokens=1), SamplingLaw(11, 9, top_p=0.8)])
def test_gradients_under_candidates_are_finite(law):
    reference, policy = random_model(), random_model(seed=1)
    rollout = under(law, make_rollout(policy, [[1, 2, 3], [4]], [[0, 0], [0]]), reference)
    assert rollout.candidates is not None
    rollout = dataclasses.replace(rollout, response_ids=rollout.candidates[:, :, 0].clamp(min=0))
    logp, values, per_token = policy.evaluate(rollout)
    kl = kl_full(policy.response_log_probs(rollout)[0], reference.response_log_probs(rollout)[0])
    assert (kl[rollout.response_mask] > 0).all()
    torch.where(rollout.response_mask, logp + per_token + kl + values, 0.0).sum().backward()
    for name, p in policy.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), name


def pickled(policy: CausalLM) -> CausalLM:
    return pickle.loads(pickle.dumps(policy))


def cloudpickled(policy: CausalLM) -> CausalLM:
    return cloudpickle.loads(cloudpickle.dumps(policy))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("duplicate", [pickled, cloudpickled, copy.deepcopy])
def test_a_copy_says_the_same_before_and_after_the_first_forward(family, duplicate):
    policy = random_model(family)
    rollout = make_rollout(policy, [[1, 2], [3]], [[4], [5, 6]])
    early = duplicate(policy)
    expected = policy.evaluate(rollout)
    late = duplicate(policy)
    for other in (early, late, duplicate(late), policy):  # the original goes on as before
        for a, b in zip(other.evaluate(rollout), expected, strict=True):
            assert torch.equal(a, b)
    assert not {p.data_ptr() for p in late.parameters()} & {p.data_ptr() for p in policy.parameters()}
    assert len(list(late.parameters())) == len(list(policy.parameters()))  # tied weights stay tied


def test_a_pickled_environment_goes_on_with_the_same_reference():
    env = make_env(kl_mode="observe")
    env.reset(seed=0)
    env.step(1)
    others = [library.loads(library.dumps(env)) for library in (pickle, cloudpickle)]
    expected = env.step(2)[-1]["ref_logp"]
    assert [other.step(2)[-1]["ref_logp"] for other in others] == [expected, expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_in_float64_sees_no_padding(family, tmp_path):
    """Transformers' mask is −∞ in the float32 of its softmax, so that padding is NaN and spreads to every token."""
    random_model(family, dtype="float64").save_pretrained(tmp_path)
    eager = CausalLM.from_pretrained(tmp_path, dtype="float64", attention="eager")
    exact = CausalLM.from_pretrained(tmp_path, dtype="float64", attention="sdpa")
    prompts, responses = [[1, 2, 3], [4]], [[5, 6], [7, 1, 2]]
    rollout = make_rollout(eager, prompts, responses, left=2, right=1)
    mask = rollout.response_mask
    torch.testing.assert_close(eager.evaluate(rollout)[0][mask], exact.evaluate(rollout)[0][mask], atol=1e-6, rtol=0)
    logits, values = eager(rollout.input_ids, rollout.attention_mask)
    expected = exact(rollout.input_ids, rollout.attention_mask)
    kept = rollout.attention_mask
    torch.testing.assert_close(logits[kept], expected[0][kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(values[kept], expected[1][kept])
    with pytest.raises(ConfigError, match="attention='sdpa'"):
        eager.decoder(1, rollout.law, backend="cached")


def test_left_padded_by_hand():
    ids, mask = left_padded(
        torch.tensor([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    )
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert ids[mask].tolist() == [1, 2, 3, 4]
    ids, mask = left_padded(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool))
    assert mask.tolist() == [[False], [False]], "rows without tokens pad the sequences of a recurrent policy"


@pytest.mark.parametrize("path", PATHS)
def test_dropout_never_turns_on(path):
    config = tiny_config("gpt2", 12)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    policy = read_by(CausalLM.from_config(config, char_tokenizer("abcdefghijkl", special=False)), path)
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


@pytest.mark.parametrize("path", PATHS)
def test_poisoned_generation_config_changes_nothing(tmp_path, path):
    """Sampling settings come from the law alone, whatever the folder's generation_config.json says."""
    from rlhf_env.models.sampling import sample_responses

    policy = CausalLM.from_config(tiny_config("gpt2", 259), byte_tokenizer())
    policy.save_pretrained(tmp_path)
    law = make_rollout(policy, [[5]], [[6]]).law
    arguments = {"max_new_tokens": 12, "seeds": [[i] for i in range(8)]}
    clean = sample_responses(read_by(CausalLM.from_pretrained(tmp_path), path), [[5, 6]] * 8, law, **arguments)
    poison = {
        "do_sample": True,
        "top_p": 0.33,
        "top_k": 1,
        "temperature": 0.1,
        "repetition_penalty": 1.9,
        "bos_token_id": 7,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(poison))
    poisoned = sample_responses(read_by(CausalLM.from_pretrained(tmp_path), path), [[5, 6]] * 8, law, **arguments)
    assert torch.equal(clean.response_ids, poisoned.response_ids)
    assert torch.equal(clean.logp, poisoned.logp)
