"""Cached decoding equals uncached decoding, and a response depends on its own prompt and seed only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.functional import inverse_cdf_sample
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.decoding import BlockDecoder, CachedDecoder, FullContextDecoder
from rlhf_env.models.sampling import Samples, sample_responses
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import Decoder, SamplingLaw
from tests.builders import PATHS, make_rollout, random_model, read_by

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 1, 2, 3, 4], [2, 2], [7, 1], [3], [6, 5, 4, 3, 2], [1]]


class With:
    """A policy that is decoded by one backend; "full" is the oracle."""

    def __init__(self, policy: CausalLM, backend: Any) -> None:
        self.policy, self.backend = policy, backend

    def decoder(self, num_rows: int, law: SamplingLaw) -> Decoder:
        decoder = self.policy.decoder(num_rows, law, self.backend)
        kinds = {"blocks": BlockDecoder, "cached": CachedDecoder, "full": FullContextDecoder}
        assert type(decoder) is kinds[self.backend]
        return decoder


def sample(policy, prompts=PROMPTS, *, num_rows=3, max_new_tokens=12, law=None, **kwargs) -> Samples:
    law = law or SamplingLaw(11, 9, min_new_tokens=1)
    seeds = [[0, i] for i in range(len(prompts))]
    return sample_responses(
        policy, prompts, law, max_new_tokens=max_new_tokens, seeds=seeds, num_rows=num_rows, **kwargs
    )


@pytest.mark.parametrize("backend", ["blocks", "cached"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_cached_equals_uncached_through_refills(family, dtype, tolerance, backend):
    policy = random_model(family, dtype=dtype)
    cached, oracle = sample(With(policy, backend)), sample(With(policy, "full"), num_rows=2)
    assert torch.equal(cached.response_ids, oracle.response_ids)
    torch.testing.assert_close(cached.logp, oracle.logp, atol=tolerance, rtol=0)
    torch.testing.assert_close(cached.values, oracle.values, atol=tolerance, rtol=0)
    assert len(set(cached.response_mask.sum(1).tolist())) > 2, "rows must finish at different times to test refills"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_log_probs_and_values_equal_the_teacher_forced_pass(family, path):
    """The first ratio of PPO is 1: what the sampler says is what the update's forward says, values included."""
    policy, law = read_by(random_model(family), path), SamplingLaw(11, 9, 0.7, min_new_tokens=2, banned_tokens=(8, 10))
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
    drawn = sample(policy, law=law)
    responses = [ids[mask].tolist() for ids, mask in zip(drawn.response_ids, drawn.response_mask, strict=True)]
    rollout = make_rollout(policy, PROMPTS, responses)
    object.__setattr__(rollout, "law", law)
    logp, values, _ = policy.evaluate(rollout)
    mask = drawn.response_mask
    torch.testing.assert_close(drawn.logp[mask], logp[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn.values[mask], values[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8])
def test_the_number_of_rows_changes_no_response(num_rows):
    policy = random_model("llama", dtype="float64")
    one, many = sample(policy, num_rows=1), sample(policy, num_rows=num_rows)
    assert torch.equal(one.response_ids, many.response_ids)
    assert torch.equal(one.ended, many.ended)


def test_permuting_prompts_permutes_responses():
    policy, order = random_model("gpt2", dtype="float64"), [3, 1, 7, 0, 2, 6, 5, 4]
    seeds = [[0, i] for i in range(8)]
    arguments = {"max_new_tokens": 10, "num_rows": 3}
    law = SamplingLaw(11, 9)
    straight = sample_responses(policy, PROMPTS, law, seeds=seeds, **arguments)
    shuffled = sample_responses(policy, [PROMPTS[i] for i in order], law, seeds=[seeds[i] for i in order], **arguments)
    assert torch.equal(straight.response_ids[order], shuffled.response_ids)


@pytest.mark.parametrize("backend", ["blocks", "cached"])
def test_no_row_ever_stands_beyond_the_context(backend):
    """Neither one that fills the context exactly, beside refilled neighbours, nor one that waits to be restarted."""
    policy, positions = random_model("gpt2"), []
    policy.model.transformer.wpe.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda module, args: positions.append(int(args[0].max()))
    )
    prompts = [[1] * 60, [2] * 3, [3] * 58, [4], [5] * 60]  # of a context of 64
    drawn = sample(With(policy, backend), prompts, num_rows=2, max_new_tokens=4, law=SamplingLaw(11, None))
    assert drawn.response_mask.all()
    decoder = policy.decoder(2, SamplingLaw(11, None), backend)
    decoder.start([0, 1], [[1] * 64, [2]])
    for _ in range(10):
        decoder.append(np.array([3]), [1])
    assert max(positions) == 63


def test_refilled_rows_are_not_a_sample_of_the_short():
    """All prompts are answered: the length distribution is that of decoding every prompt in a row of its own."""
    policy = random_model("gpt2", dtype="float64")
    prompts = [PROMPTS[i % 8] for i in range(64)]
    refilled, lockstep = sample(policy, prompts, num_rows=4), sample(policy, prompts, num_rows=64)
    assert torch.equal(refilled.response_mask, lockstep.response_mask)


@pytest.mark.parametrize("backend", ["blocks", "cached"])
def test_idle_rows_wait_for_one_another_and_change_no_response(backend, monkeypatch):
    """Two of 16 are refilled or dropped at once, or more, but for the last ones."""
    policy, events = random_model("gpt2", dtype="float64"), []
    prompts = [PROMPTS[i % 8] for i in range(40)]
    alone = sample(policy, prompts, num_rows=1)
    kind = BlockDecoder if backend == "blocks" else CachedDecoder
    start, keep = kind.start, kind.keep
    monkeypatch.setattr(kind, "start", lambda self, rows, ids: events.append(len(rows)) or start(self, rows, ids))
    monkeypatch.setattr(kind, "keep", lambda self, rows: events.append(-len(rows)) or keep(self, rows))
    together = sample(With(policy, backend), prompts, num_rows=16)
    assert torch.equal(alone.response_ids, together.response_ids)
    torch.testing.assert_close(alone.logp, together.logp, atol=1e-10, rtol=0)
    started, kept = [n for n in events if n > 0], [-n for n in events if n < 0]
    assert started[0] == 16 and sum(started) == 40 and min(started[1:-1]) >= 2
    assert all(after <= before * 7 / 8 for before, after in zip([16, *kept], kept, strict=False))


def test_the_mask_is_true_up_to_and_including_eos():
    drawn = sample(random_model("gpt2"))
    for ids, mask, ended in zip(drawn.response_ids, drawn.response_mask, drawn.ended, strict=True):
        kept = ids[mask].tolist()
        assert 9 not in kept[:-1]
        assert (kept[-1] == 9) == bool(ended)
        assert ended or len(kept) == 12


def test_stop_may_end_a_response():
    drawn = sample(random_model("gpt2"), stop=lambda prompt, ids: len(ids) == 2)
    assert drawn.ended.all()
    assert drawn.response_mask.sum(1).max() == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_frequencies_match_the_log_probs(temperature):
    """10⁵ draws from one state, each count within 4.5 standard errors of what the log-probabilities say."""
    policy = random_model("gpt2")
    law = SamplingLaw(11, 9, temperature=temperature, banned_tokens=(10,))
    decoder = CachedDecoder(policy, 1, law)
    decoder.start([0], [[1, 2, 3]])
    n = 100_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(n, dtype=np.float32))
    counts = torch.bincount(inverse_cdf_sample(decoder.log_probs.expand(n, -1), uniform), minlength=11).double()
    p = decoder.log_probs[0].double().exp()
    error = (counts / n - p).abs() / (p * (1 - p) / n).clamp(min=1e-18).sqrt()
    assert counts[10] == 0
    assert error[p > 1e-6].max() < 4.5


def test_inverse_cdf_by_hand():
    log_probs = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0]).log()
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24])
    assert inverse_cdf_sample(log_probs.expand(6, -1), uniform).tolist() == [0, 0, 2, 2, 3, 3]


def family(name: str, dtype: str = "float32") -> CausalLM:
    import transformers

    size = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    odd = {
        "Mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 4},
        "Qwen2": {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        "GPTNeoX": {"intermediate_size": 48},
        "Bloom": {},  # no positions at all: attention falls with distance
        "Rwkv": {"attention_hidden_size": 32, "context_length": 64},
        "Mamba": {"state_size": 4},
        "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
        "Gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
        "Gemma3Text": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
        "Lfm2": {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
        },
        "Qwen3Next": {
            "layer_types": ["linear_attention", "full_attention"],
            "num_key_value_heads": 2,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    }
    tokens = {"bos_token_id": 8, "eos_token_id": 9, "pad_token_id": 10}
    config = getattr(transformers, f"{name}Config")(**size, **odd[name], **tokens, initializer_range=0.3)
    config.max_position_embeddings = 64
    return CausalLM.from_config(config, char_tokenizer("abcdefgh"), dtype=dtype)


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Gemma3Text", "GPTNeoX", "Bloom"])
def test_other_families_and_windows_shorter_than_the_sequence(name):
    policy = family(name)
    cached, oracle = sample(policy, max_new_tokens=14), sample(With(policy, "full"), max_new_tokens=14, num_rows=2)
    assert torch.equal(cached.response_ids, oracle.response_ids)
    torch.testing.assert_close(cached.logp, oracle.logp, atol=1e-4, rtol=0)
    responses = [ids[mask].tolist() for ids, mask in zip(cached.response_ids, cached.response_mask, strict=True)]
    assert max(map(len, responses)) > 8
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):  # Hugging Face alone, unpadded
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]  # type: ignore[operator]
        t = torch.arange(len(response))
        expected = SamplingLaw(11, 9, min_new_tokens=1).log_probs(logits, t)[t, torch.tensor(response)]
        torch.testing.assert_close(cached.logp[i, : len(response)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["Rwkv", "Mamba", "Mamba2", "Lfm2", "Qwen3Next"])
def test_a_model_that_keeps_a_state_is_decoded_without_a_cache(name):
    """Its rows see neither padding nor each other, in sampling and in the teacher-forced pass: Hugging Face says so."""
    policy = family(name)
    law = SamplingLaw(11, 9, min_new_tokens=1)
    assert isinstance(policy.decoder(2, law), FullContextDecoder)
    with pytest.raises(ConfigError, match="keeps something else than keys and values.*backend='full'"):
        policy.decoder(2, law, backend="cached")
    prompts = PROMPTS[:4]
    drawn = sample(policy, prompts, num_rows=2, max_new_tokens=5, law=law)
    responses = [ids[mask].tolist() for ids, mask in zip(drawn.response_ids, drawn.response_mask, strict=True)]
    taught = policy.evaluate(make_rollout(policy, prompts, responses, left=2, right=1))[0]
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]  # type: ignore[operator]
        t, ids = torch.arange(len(response)), torch.tensor(response)
        expected = law.log_probs(logits, t)[t, ids]
        torch.testing.assert_close(drawn.logp[i, : len(response)], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(taught[i, : len(response)], logits.log_softmax(-1)[t, ids], atol=1e-4, rtol=0)
        alone = policy.evaluate(make_rollout(policy, [prompt], [response], left=3))[0][0]
        torch.testing.assert_close(alone, taught[i, : len(response)], atol=1e-4, rtol=0)


def test_values_of_a_model_that_keeps_a_state_are_those_of_the_last_token():
    policy = family("Lfm2")
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
    decoder = policy.decoder(2, SamplingLaw(11, 9))
    decoder.start([0, 1], [[1, 2, 3, 4], [5]])
    decoder.append(np.array([6]), [1])
    for row, context in enumerate([[1, 2, 3, 4], [5, 6]]):
        ids = torch.tensor([context])
        _, value = policy(ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(decoder.values[row], value[0, -1].detach(), atol=1e-5, rtol=0)


def test_the_full_decoder_reads_its_rows_in_one_forward():
    policy, shapes = random_model("gpt2"), []
    policy.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decoder = policy.decoder(3, SamplingLaw(11, 9), backend="full")
    decoder.start([0, 1, 2], [[1, 2], [3], [4, 5, 6]])
    decoder.append(np.array([7, 8]), [0, 2])
    assert shapes == [(3, 3), (2, 4)]


@pytest.mark.parametrize("name", ["Bloom", "Gemma2"])  # and in Gemma2, the window of some padding is all padding
def test_a_family_that_only_has_eager_attention_decodes_in_float64(name):
    cached, full = (sample(p, law=SamplingLaw(11, None)) for p in (family(name), family(name, "float64")))
    assert torch.equal(cached.response_ids, full.response_ids)
    torch.testing.assert_close(cached.logp.double(), full.logp, atol=1e-4, rtol=0)


def test_an_unknown_backend_is_named():
    with pytest.raises(ConfigError, match="must be 'auto', 'blocks', 'cached' or 'full', got 'fast'"):
        random_model().decoder(1, SamplingLaw(11, 9), backend="fast")  # type: ignore[arg-type]


def test_greedy_is_the_argmax_of_the_uncached_path():
    policy = random_model("llama", dtype="float64")
    greedy = sample(policy, greedy=True)
    oracle = sample(With(policy, "full"), greedy=True)
    assert torch.equal(greedy.response_ids, oracle.response_ids)


def test_nan_weights_stop_the_sampler_with_the_prompt_named():
    policy = random_model("gpt2")
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[4] = torch.nan  # type: ignore[operator]
    with pytest.raises(NonFiniteError, match="not finite for prompt [0-9]+ at response token"):
        sample(policy)


def test_published_greedy_text_of_a_real_model(shared_data: Path):
    expected = json.loads((shared_data / "expected/stories260k.json").read_text())
    policy = CausalLM.from_pretrained(shared_data / "models/stories260k-llama")
    ids = expected["greedy_token_ids_500"]
    drawn = sample_responses(
        policy, [ids[:1]], SamplingLaw(512, None), max_new_tokens=len(ids) - 1, seeds=[[0]], greedy=True
    )
    assert drawn.response_ids[0].tolist() == ids[1:]
    text = policy.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert text.startswith(expected["published_greedy_text"])


@pytest.mark.parametrize("model", ["stories260k-llama", "rt-gpt2-1M"])
def test_real_models_cached_equals_uncached(shared_data: Path, model):
    policy = CausalLM.from_pretrained(shared_data / "models" / model)
    law = SamplingLaw(len(policy.tokenizer), policy.tokenizer.eos_token_id)
    prompts = [[5, 6, 7], [300, 8], [9, 10, 11, 12, 13], [400]]
    cached, oracle = (
        sample(p, prompts, law=law, num_rows=2, max_new_tokens=24) for p in (policy, With(policy, "full"))
    )
    assert torch.equal(cached.response_ids, oracle.response_ids)
    torch.testing.assert_close(cached.logp, oracle.logp, atol=1e-4, rtol=0)
