"""Adapters learn, the weights below them do not, and are the reference without a second copy of them."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest
import torch

from rlhf_env.errors import ConfigError
from rlhf_env.models.adapters import add_lora
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import SamplingLaw
from tests.builders import make_env, make_rollout, random_model

FAMILIES = ("gpt2", "llama")
PROMPTS, RESPONSES = [[1, 2, 3], [4]], [[5, 6], [7, 1, 9]]


def log_probs(policy: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return policy.response_log_probs(make_rollout(policy, PROMPTS, RESPONSES))[0]


def learn(policy: CausalLM) -> None:
    """Three steps of Adam that change log-probabilities by nats."""
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        logp, values, _ = policy.evaluate(make_rollout(policy, PROMPTS, RESPONSES))
        (logp.sum() + (values - 1).square().sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_what_the_policy_was_and_stays_so_while_it_learns(family):
    policy = random_model(family)
    before = policy.frozen_copy()
    reference = add_lora(policy, rank=4).without_adapters()
    assert torch.equal(log_probs(policy), log_probs(before)), "the KL to the reference is exactly 0 at the start"
    learn(policy)
    assert torch.equal(log_probs(reference), log_probs(before))
    assert (log_probs(policy) - log_probs(before)).abs().max() > 0.1
    assert torch.equal(log_probs(policy.without_adapters()), log_probs(before))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_the_value_head_learn(family):
    policy = add_lora(random_model(family).requires_grad_(False), rank=4)
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in policy.named_parameters() if "lora_" in n or n.startswith("value_head.")}
    assert any("lora_A" in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)
    reference = policy.without_adapters()
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference.evaluate(make_rollout(policy, PROMPTS, RESPONSES))[0].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_holds_no_weights_of_its_own_but_a_value_head(family):
    policy = add_lora(random_model(family))
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (policy, policy.without_adapters()))
    own = {p.data_ptr() for p in policy.without_adapters().value_head.parameters()}
    assert len(theirs - mine) == 2 == len(own)  # weight and bias of the head
    assert {n for n, _ in policy.without_adapters().named_parameters()} == {
        n for n, _ in random_model(family).named_parameters()
    }


def test_the_reference_decodes_beside_the_policy_and_an_error_in_one_leaves_the_other():
    policy = random_model()
    before = policy.frozen_copy()
    reference = add_lora(policy).without_adapters()
    learn(policy)
    expected, law = log_probs(policy), SamplingLaw(11, 9)
    decoders = [p.decoder(1, law) for p in (policy, reference, before)]
    for decoder in decoders:
        decoder.start([0], [[1, 2]])
    for token in (3, 4):
        for decoder in decoders:
            decoder.append(np.array([token]), [0])
    assert torch.equal(decoders[1].log_probs, decoders[2].log_probs)
    assert not torch.allclose(decoders[0].log_probs, decoders[2].log_probs, atol=0.01)
    with pytest.raises(IndexError):
        reference(torch.tensor([[99]]), torch.tensor([[True]]))
    assert torch.equal(log_probs(policy), expected)


def test_an_environment_charges_the_kl_to_it():
    policy = random_model()
    reference = add_lora(policy).without_adapters()
    env = make_env(reference=reference, prompts=["abc"])
    env.core.log_pi.bind(lambda obs, actions: policy.action_log_probs(obs, actions, env.core.task.law))
    env.reset(seed=0)
    kl = [abs(info["logp"] - info["ref_logp"]) for info in (env.step(1)[-1], env.step(2)[-1])]
    assert max(kl) < 1e-5
    learn(policy)
    env.reset(seed=0)
    info = env.step(1)[-1]
    assert abs(info["logp"] - info["ref_logp"]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_is_a_plain_model_with_the_adapters_merged(family, tmp_path):
    policy = add_lora(random_model(family), rank=4, alpha=32)
    learn(policy)
    before = log_probs(policy)
    policy.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    loaded = CausalLM.from_pretrained(tmp_path)
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in random_model(family).named_parameters()}
    torch.testing.assert_close(log_probs(loaded), before, atol=1e-5, rtol=0)
    assert torch.equal(loaded.value_head.weight, policy.value_head.weight)
    assert torch.equal(log_probs(policy), before), "saving changes nothing"


def test_copies_and_pickles_keep_adapters_and_what_is_shared():
    policy = random_model("llama")
    before = policy.frozen_copy()
    reference = add_lora(policy).without_adapters()
    learn(policy)
    for duplicate in (policy.frozen_copy(), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(log_probs(duplicate), log_probs(policy))
        assert torch.equal(log_probs(duplicate.without_adapters()), log_probs(before))
    both = pickle.loads(pickle.dumps((policy, reference)))
    count = len({p.data_ptr() for m in both for p in m.parameters()})
    assert count == len(list(policy.parameters())) + 2
    assert torch.equal(log_probs(both[1]), log_probs(before))


def test_the_seed_decides_the_adapters_and_nothing_else_does():
    def first_adapter(seed: int) -> torch.Tensor:
        return next(p for n, p in add_lora(random_model(), seed=seed).named_parameters() if "lora_A" in n)

    state = torch.get_rng_state()
    one = first_adapter(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(first_adapter(1), one)
    assert not torch.equal(first_adapter(2), one)


def test_targets_are_linear_layers_by_name():
    policy = add_lora(random_model("gpt2"), targets=["c_attn"])
    assert {n.split(".")[-4] for n, p in policy.named_parameters() if "lora_A" in n} == {"c_attn"}
    with pytest.raises(
        ConfigError, match="no linear layer 'q_proj' to adapt in this model; it has c_attn, c_fc, c_proj"
    ):
        add_lora(random_model("gpt2"), targets=["q_proj"])
    with pytest.raises(ConfigError, match="no linear layer 'lm_head'"):  # tied to the embedding: it cannot be merged
        add_lora(random_model("gpt2"), targets=["lm_head"])


def test_adapters_of_a_half_precision_model_are_float32():
    policy = CausalLM.from_config(tiny_config("llama", 11), char_tokenizer("abcdefgh"), dtype="bfloat16")
    before = policy.frozen_copy()
    add_lora(policy)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(log_probs(policy), log_probs(before))


def test_without_adapters_without_adapters():
    with pytest.raises(ConfigError, match="no adapters to leave out.*add_lora"):
        random_model().without_adapters()
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(add_lora(random_model()))
    with pytest.raises(ConfigError, match="rank=0"):
        add_lora(random_model(), rank=0)


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-env\[lora\]'"):
        add_lora(random_model())
