"""Two small policies, held against the sums that define them and against each other's ways to the same numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rlhf_env.envs.binding import bind_policy
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError
from rlhf_env.functional import entropy
from rlhf_env.models.sampling import sample_responses
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import SamplingLaw
from rlhf_env.worlds.small_policies import BigramPolicy, ResidualGRUPolicy
from tests.builders import make_rollout

TOKENIZER = char_tokenizer("abcde", special=False)
LAW = SamplingLaw(5, eos_token_id=4, temperature=1.3, min_new_tokens=2, banned_tokens=(1,))
PROMPTS, RESPONSES = [[0, 3], [2], [1, 0, 3, 2]], [[2, 3, 4], [0, 2, 0, 0, 3], [3, 3]]


def bigrams(seed: int = 0) -> BigramPolicy:
    return BigramPolicy.random(TOKENIZER, seed=seed)


def trained_gru(seed: int = 0) -> ResidualGRUPolicy:
    """Far from where it starts."""
    policy = ResidualGRUPolicy(bigrams(seed), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator)
    return policy


@pytest.fixture(params=[bigrams, trained_gru], ids=["bigram", "gru"])
def policy(request):
    return request.param().double()


def rollout_of(policy, left=0, right=0, rows=slice(None), law=LAW):
    rollout = make_rollout(policy, PROMPTS[rows], RESPONSES[rows], left=left, right=right)
    return dataclasses.replace(rollout, law=law)


def test_a_bigram_policy_reads_its_table_by_hand():
    third = BigramPolicy(torch.tensor([[2.0, 1, 1], [1, 3, 1], [1, 1, 4]]).log(), char_tokenizer("abc", special=False))
    rollout = dataclasses.replace(make_rollout(third, [[2, 0]], [[1, 1, 2]]), law=SamplingLaw(3, None))
    logp, values, _ = third.evaluate(rollout)
    torch.testing.assert_close(logp.exp(), torch.tensor([[1 / 4, 3 / 5, 1 / 5]]))
    assert values.tolist() == [[0, 0, 0]]


def test_the_gru_reads_everything_so_far_and_adds_to_the_bigrams():
    """One response token by token, with PyTorch's own GRU over the whole of it."""
    policy = trained_gru().double()
    whole = torch.nn.GRU(48, 48, batch_first=True).double()
    whole.load_state_dict({f"{name}_l0": weight for name, weight in policy.cell.state_dict().items()})
    ids = torch.tensor([PROMPTS[0] + RESPONSES[0]])
    hidden, _ = whole(policy.embedding(ids))
    logits, values = policy(ids, torch.ones_like(ids))
    torch.testing.assert_close(logits, policy.logits[ids] + policy.head(hidden), rtol=0, atol=1e-12)
    torch.testing.assert_close(values, policy.value_head(hidden).squeeze(-1), rtol=0, atol=1e-12)


def test_decoding_one_by_one_is_evaluating_the_whole(policy):
    rollout = rollout_of(policy)
    log_probs, values = policy.response_log_probs(rollout)
    logp, _, entropies = policy.evaluate(rollout)
    torch.testing.assert_close(entropies, entropy(log_probs), rtol=0, atol=0)
    decoder = policy.decoder(3, LAW)
    decoder.start([0, 1, 2], PROMPTS)
    for row in range(3):
        for t, token in enumerate(RESPONSES[row]):
            torch.testing.assert_close(decoder.log_probs[row], log_probs[row, t].detach(), rtol=0, atol=1e-12)
            torch.testing.assert_close(decoder.values[row], values[row, t].detach(), rtol=0, atol=1e-12)
            assert logp[row, t].item() == pytest.approx(decoder.log_probs[row, token].item(), abs=1e-12)
            decoder.append(np.array([token]), [row])
    assert log_probs[:, :2, 4].eq(-torch.inf).all() and log_probs[..., 1].eq(-torch.inf).all()  # the law's word


def test_rows_restart_and_are_left_out_on_their_own(policy):
    decoder, alone = policy.decoder(3, LAW), policy.decoder(1, LAW)
    decoder.start([0, 1, 2], PROMPTS)
    decoder.append(np.array([2, 0, 3]), [0, 1, 2])
    decoder.append(np.array([0]), [1])  # two letters: from here on the law allows EOS in row 1
    decoder.start([1], [[3, 3, 0]])  # and no more
    decoder.append(np.array([2]), [2])
    decoder.keep([1, 2])
    decoder.append(np.array([0, 0]), [0, 1])
    for row, (prompt, response) in enumerate([([3, 3, 0], [0]), (PROMPTS[2], [3, 2, 0])]):
        alone.start([0], [prompt])
        for token in response:
            alone.append(np.array([token]), [0])
        torch.testing.assert_close(decoder.log_probs[row], alone.log_probs[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(decoder.values[row], alone.values[0], rtol=0, atol=1e-12)


def test_padding_is_invisible_whatever_it_holds(policy):
    plain, padded = rollout_of(policy), rollout_of(policy, left=3, right=2)
    padded.prompt_ids[~padded.prompt_mask] = -100
    padded.response_ids[~padded.response_mask] = 3
    for a, b in zip(policy.evaluate(plain), policy.evaluate(padded), strict=True):
        there = plain.response_mask
        torch.testing.assert_close(a[there], b[:, : there.shape[1]][there], rtol=0, atol=1e-12)


def test_a_batch_of_one_is_a_batch_of_many(policy):
    whole = rollout_of(policy)
    for row in range(3):
        one = rollout_of(policy, rows=slice(row, row + 1))
        t = len(RESPONSES[row])
        for a, b in zip(policy.evaluate(whole), policy.evaluate(one), strict=True):
            torch.testing.assert_close(a[row, :t], b[0], rtol=0, atol=1e-12)


def test_candidates_restrict_the_distribution(policy):
    law = SamplingLaw(5, None, top_k=2)
    plain = rollout_of(policy, law=SamplingLaw(5, None))
    free, _ = policy.response_log_probs(plain)
    candidates = torch.tensor([0, 3]).expand(3, 5, 2)
    log_probs, _ = policy.response_log_probs(dataclasses.replace(plain, law=law, candidates=candidates))
    share = free[..., [0, 3]].exp()
    torch.testing.assert_close(log_probs[..., [0, 3]].exp(), share / share.sum(-1, keepdim=True))
    assert log_probs[..., [1, 2, 4]].exp().eq(0).all()


@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}])
def test_what_an_environment_asks_is_what_a_decoder_says(policy, truncation):
    reference = bigrams(7).requires_grad_(False)
    envs = TextGenerationVectorEnv(
        2, prompts=["ad", "c"], tokenizer=TOKENIZER, reference=reference, reward_model=lambda p, r: [0.0] * len(r),
        max_new_tokens=3, stop_at_eos=False, beta=1.0, **truncation,
    )  # fmt: skip
    bind_policy(envs, policy)
    observation, _ = envs.reset(seed=0, options={"prompt": ["ad", "c"]})
    decoder = policy.decoder(2, envs.task.law)
    decoder.start([0, 1], [[0, 3], [2]])
    for _ in range(2):
        actions = observation["candidates"][:, 1] if truncation else np.array([1, 4])
        asked = policy.action_log_probs(observation, actions, envs.task.law)
        log_probs = decoder.log_probs
        if truncation:
            kept = log_probs.gather(1, torch.from_numpy(observation["candidates"]))
            log_probs = log_probs - kept.logsumexp(1, keepdim=True)
        np.testing.assert_allclose(asked, log_probs[[0, 1], actions].numpy(), rtol=0, atol=1e-12)
        observation, *_, info = envs.step(actions)
        np.testing.assert_allclose(info["logp"], asked, rtol=0, atol=1e-12)
        decoder.append(actions, [0, 1])


def test_the_gru_starts_as_the_bigrams_to_the_bit_with_values_of_zero():
    table, policy = bigrams(), ResidualGRUPolicy(bigrams())
    rollout = rollout_of(policy)
    (logp, values, _), (ref_logp, _, _) = policy.evaluate(rollout), table.evaluate(rollout)
    assert torch.equal(logp, ref_logp)
    assert not values.any()
    decoders = [x.decoder(3, LAW) for x in (policy, table)]
    for decoder in decoders:
        decoder.start([0, 1, 2], PROMPTS)
    assert torch.equal(decoders[0].log_probs, decoders[1].log_probs)


def test_training_the_gru_leaves_its_bigrams_alone():
    policy = ResidualGRUPolicy(bigrams())
    logp, values, _ = policy.evaluate(rollout_of(policy))
    (logp.clamp(min=-20).sum() + values.sum()).backward()
    assert all(p.grad is not None for p in (policy.head.weight, policy.value_head.weight))
    assert {name for name, _ in policy.named_parameters()}.isdisjoint({"logits"})
    assert torch.equal(policy.logits, bigrams().logits)


def test_a_frozen_copy_is_its_own():
    policy = trained_gru()
    copy = policy.frozen_copy()
    with torch.no_grad():
        policy.head.bias += 1
    assert not any(p.requires_grad for p in copy.parameters())
    assert torch.equal(copy.head.bias, trained_gru().head.bias)


def test_weights_are_their_seed():
    torch.manual_seed(1)
    for make in (bigrams, trained_gru):
        one, two, other = make(3), make(3), make(4)
        for a, b, c in zip(*(x.state_dict().values() for x in (one, two, other)), strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c)
    before = torch.random.get_rng_state()
    trained_gru()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sampling_follows_the_table():
    """20,000 first letters after b: each share within 4 standard errors of its probability."""
    policy, n = bigrams(), 20_000
    samples = sample_responses(
        policy, [[1]] * n, SamplingLaw(5, None), max_new_tokens=1, seeds=[[0, i] for i in range(n)], num_rows=n
    )
    expected = policy.logits[1].detach().softmax(0)
    share = samples.response_ids[:, 0].bincount(minlength=5) / n
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()


@pytest.mark.parametrize("shape", [(4, 4), (5,), (5, 6)])
def test_a_table_of_another_size_is_refused(shape):
    with pytest.raises(ConfigError, match=r"5 tokens has shape \[5, 5\], got"):
        BigramPolicy(torch.zeros(shape), TOKENIZER)
