"""A transformer run block by block says what Hugging Face's own forward says; where it would not, it does not run."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_env.errors import ConfigError
from rlhf_env.models import reading
from rlhf_env.models.adapters import add_lora
from rlhf_env.models.blocks import Body, buckets
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.decoding import BlockDecoder, CachedDecoder
from rlhf_env.models.scoring import evaluator
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import Rollout, SamplingLaw
from tests.builders import make_rollout, random_model

SIZE = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_positions": 128, "scale_attn_by_inverse_layer_idx": True},
    "Llama": {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "Mistral": {**GROUPED, "sliding_window": 4},
    "Qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10_000.0}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 1, 2, 3, 4], [2, 2], [4]]
RESPONSES = [[3, 9], [1, 2, 3, 4, 5, 6, 7, 0, 9], [9], [5, 5, 5, 9], [0, 1, 2]]


class Plain(CausalLM):
    """The oracle: the same weights, read by Hugging Face's forward and nothing else."""

    body = None  # type: ignore[assignment]


def model(name: str, dtype: str = "float64", **settings: Any) -> CausalLM:
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZE, **FAMILIES[name], **settings, initializer_range=0.3)
    policy = CausalLM.from_config(config, char_tokenizer("abcdefgh"), dtype=dtype)
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
    assert Body.of(policy.model) is not None
    return policy


def plain(policy: CausalLM) -> CausalLM:
    twin = Plain(policy.model, policy.tokenizer)
    twin.value_head = policy.value_head
    return twin


def evaluated(policy: CausalLM, rollout: Rollout, begun: Any = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probability, value and entropy of each token, and the gradient of a mixture of them by weight."""
    policy.zero_grad()
    found = [torch.where(rollout.response_mask, x, 0.0) for x in policy.evaluate(rollout, begun)]
    weights = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(0), dtype=found[0].dtype)
    sum((scale * x * weights).sum() for scale, x in zip((1, 2, 3), found, strict=True)).backward()  # type: ignore[union-attr]
    return [x.detach() for x in found], {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


def require_same(first: Any, second: Any, tolerance: float) -> None:
    torch.testing.assert_close(first, second, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_numbers_and_gradients_are_those_of_hugging_face(name, dtype, tolerance):
    policy = model(name, dtype)
    rollout = make_rollout(policy, PROMPTS, RESPONSES, left=2, right=3)
    (ours, gradients), (theirs, expected) = evaluated(policy, rollout), evaluated(plain(policy), rollout)
    require_same(ours, theirs, tolerance)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_distributions_are_those_of_hugging_face(name):
    policy = model(name)
    rollout = make_rollout(policy, PROMPTS, RESPONSES, left=1)
    (ours, values), (theirs, theirs_values) = (p.response_log_probs(rollout) for p in (policy, plain(policy)))
    mask = rollout.response_mask
    require_same((ours[mask], values[mask]), (theirs[mask], theirs_values[mask]), 1e-10)
    logp = ours.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    evaluated_logp, evaluated_values, _ = policy.evaluate(rollout)
    require_same((logp[mask], values[mask]), (evaluated_logp[mask], evaluated_values[mask]), 1e-10)


def test_rotations_with_scaled_frequencies_are_those_of_hugging_face():
    policy = model("Llama", rope_parameters={**ROPE, "original_max_position_embeddings": 16})
    rollout = make_rollout(policy, PROMPTS, RESPONSES)
    require_same(evaluated(policy, rollout), evaluated(plain(policy), rollout), 1e-10)


def grow_restart_and_leave(decoders: Sequence[Any], tolerance: float) -> None:
    """Decode the same in all, beyond the room that the storage begins with, with neighbours idle, restarted, let go."""
    draw = np.random.default_rng(0)

    def both(act: str, *args: Any, rows: list[int]) -> None:
        for decoder in decoders:
            getattr(decoder, act)(*args)
        for name in ("log_probs", "values"):
            require_same(*(getattr(decoder, name)[rows].cpu() for decoder in decoders), tolerance)

    both("start", [0, 1, 2, 3], [[1, 2, 3], [4], [1, 2, 3], [5, 6]], rows=[0, 1, 2, 3])
    for _ in range(70):
        both("append", draw.integers(0, 8, 4), [0, 1, 2, 3], rows=[0, 1, 2, 3])
    both("append", draw.integers(0, 8, 2), [0, 2], rows=[0, 2])  # 1 and 3 are idle
    both("start", [3, 1], [[7], [2, 2, 2, 2, 2]], rows=[0, 1, 2, 3])
    both("append", draw.integers(0, 8, 4), [0, 1, 2, 3], rows=[0, 1, 2, 3])
    both("append", draw.integers(0, 8, 4), [2, 0, 3, 1], rows=[0, 1, 2, 3])
    both("keep", [1, 3], rows=[0, 1])
    for _ in range(3):
        both("append", draw.integers(0, 8, 2), [0, 1], rows=[0, 1])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_rows_that_grow_restart_and_leave_are_decoded_alike(name, dtype, tolerance):
    policy, law = model(name, dtype), SamplingLaw(11, 9, temperature=0.7, min_new_tokens=2, banned_tokens=(8,))
    decoders = [policy.decoder(4, law, backend=backend) for backend in ("blocks", "cached")]
    assert [type(decoder) for decoder in decoders] == [BlockDecoder, CachedDecoder]
    grow_restart_and_leave(decoders, tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_may_look_at_more_columns_than_any_row_has(name):
    decoder = model(name, "float64").decoder(3, SamplingLaw(11, 9))
    assert isinstance(decoder, BlockDecoder)
    decoder.start([0, 1, 2], [[1, 2, 3], [4], [5, 6, 7]])
    ids = torch.tensor([1, 2, 3])
    for _ in range(2):  # the second time rows have grown to the same length, which is a path of its own
        position = decoder.length.clone()
        narrow, wide = (decoder._run(ids, position, columns, ragged=True) for columns in (int(position.max()) + 1, 40))
        require_same(narrow, wide, 1e-12)
        require_same(decoder._step(ids, position, int(position.max()) + 1), wide, 1e-12)
        decoder.length[1] = 3


def test_a_prompt_that_starts_in_several_rows_is_read_once(monkeypatch):
    policy, read = random_model(), []
    whole = Body.run
    monkeypatch.setattr(Body, "run", lambda self, x, blocks: read.append(tuple(x.shape[:2])) or whole(self, x, blocks))
    decoder = policy.decoder(5, SamplingLaw(11, 9))
    decoder.start([4, 0, 1, 3], [[1, 2], [3], [1, 2], [1, 2]])
    assert read == [(2, 2)]  # two prompts of at most two tokens
    assert torch.equal(decoder.log_probs[4], decoder.log_probs[1]) and torch.equal(decoder.values[4], decoder.values[3])
    assert not torch.equal(decoder.log_probs[4], decoder.log_probs[0])


def test_adapters_are_part_of_the_blocks():
    policy = add_lora(model("Llama"), rank=2)
    draw = torch.Generator().manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=draw)
    rollout = make_rollout(policy, PROMPTS, RESPONSES)
    ours, gradients = evaluated(policy, rollout)
    require_same((ours, gradients), evaluated(plain(policy), rollout), 1e-10)
    assert any("lora" in name for name in gradients)
    assert not torch.equal(ours[0], policy.without_adapters().evaluate(rollout)[0].detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda policy: setattr(policy.model.config, "_attn_implementation", "eager"),
        lambda policy: policy.model.register_forward_hook(lambda *_: None),
        lambda policy: policy.model.transformer.h[1].register_forward_hook(lambda *_: None),
        lambda policy: policy.model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: None),
    ],
    ids=["eager attention", "a hook on the model", "a hook on a block", "a hook inside a block"],
)
def test_what_the_blocks_would_pass_over_is_left_to_hugging_face(change):
    policy = random_model()
    change(policy)
    assert Body.of(policy.model) is None
    assert isinstance(policy.decoder(1, SamplingLaw(11, 9)), CachedDecoder)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel is not among the families.*backend='cached'"):
        policy.decoder(1, SamplingLaw(11, 9), backend="blocks")


def test_angles_are_asked_for_as_every_release_of_transformers_takes_them(monkeypatch):
    """Positions [B, L]: releases before 5.20 fail on any other shape."""
    policy = random_model("llama")
    rotary, shapes = policy.model.model.rotary_emb, []
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, positions: shapes.append(positions.dim()) or forward(x, positions))
    decoder = policy.decoder(2, SamplingLaw(8, None))
    decoder.start([0, 1], [[1, 2], [3]])
    decoder.append(np.array([4, 5]), [0, 1])
    assert isinstance(decoder, BlockDecoder) and set(shapes) == {2}


def test_rotations_that_depend_on_the_length_are_left_to_hugging_face():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    import transformers

    config = transformers.LlamaConfig(**SIZE, **GROUPED, rope_parameters=dynamic)
    assert Body.of(CausalLM.from_config(config, char_tokenizer("abcdefgh")).model) is None


def test_the_forward_that_records_hidden_states_leaves_the_blocks_understood():
    policy = random_model()
    plain(policy).evaluate(make_rollout(policy, PROMPTS, RESPONSES))  # at which Transformers hangs its hooks in
    assert Body.of(policy.model) is not None


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([5] * 32, [32]),
        ([5, 4] * 16, [32]),  # a tenth of padding
        ([2] * 16 + [30] * 16, [16, 16]),
        ([2, 30] * 4, [8]),  # too few to be cut apart
        ([1] * 24 + [40] * 8, [8, 8, 8, 8]),
    ],
)
def test_rows_of_like_length_are_read_together_where_that_saves_a_third(lengths, groups):
    found = buckets(torch.tensor(lengths))
    assert [len(rows) for rows in found] == groups
    assert sorted(torch.cat(found).tolist()) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in a) <= min(lengths[i] for i in b) for a, b in zip(found, found[1:], strict=False))


def uneven(policy: CausalLM) -> Rollout:
    """32 episodes, one in four long."""
    draw = np.random.default_rng(0)
    responses = [draw.integers(0, 8, 1 + 60 * (i % 4 == 3)).tolist() for i in range(32)]
    prompts = [draw.integers(0, 8, 1 + i % 3).tolist() for i in range(32)]
    return make_rollout(policy, prompts, responses, left=2)


def test_rows_read_in_groups_are_those_read_one_by_one():
    policy = model("GPT2")
    rollout = uneven(policy)
    assert len(buckets(rollout.attention_mask.sum(1))) == 4
    numbers, gradients = evaluated(policy, rollout)
    require_same((numbers, gradients), evaluated(plain(policy), rollout), 1e-10)
    for row in range(32):
        alone = policy.evaluate(rollout[row])
        require_same(
            [x[row] for x in numbers], [torch.where(rollout[row].response_mask, x, 0.0)[0] for x in alone], 1e-10
        )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("rows", [list(range(32)), [31, 2, 19, 0, 11], [5]])
def test_frozen_layers_need_to_read_an_episode_only_once(name, dtype, tolerance, rows):
    """Read with others, in batches of other shapes, and taken up in block 2 of 3: the same numbers and gradients."""
    policy = model(name, dtype).freeze_layers(2)
    rollout, rows = uneven(policy), torch.tensor(rows)
    begun = policy.begin(rollout)
    assert begun is not None and begun.states.shape == (32, 64, 32) and not begun.states.requires_grad
    (numbers, gradients), (expected, expected_gradients) = (
        evaluated(policy, rollout[rows], b) for b in (begun[rows], None)
    )
    require_same(numbers, expected, tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 10 * tolerance * expected_gradients[name].norm()


def test_an_evaluator_runs_frozen_layers_once_and_the_others_each_time(monkeypatch):
    policy, run, whole = model("Llama").freeze_layers(1), [], Body._block
    rollout = make_rollout(policy, PROMPTS, RESPONSES)
    number = {id(block): i for i, block in enumerate(policy.body.family.blocks)}  # type: ignore[union-attr]
    monkeypatch.setattr(Body, "_block", lambda self, b, *args: run.append(number[id(b)]) or whole(self, b, *args))
    evaluate = evaluator(policy, rollout)
    assert run == [0]
    for rows in (torch.tensor([2, 0]), torch.tensor([1, 3, 4])):
        run.clear()
        evaluate(rows)
        assert run == [1, 2]


@pytest.mark.parametrize("frozen", [0, 3])
def test_an_evaluator_where_nothing_is_frozen_or_everything(frozen):
    policy = model("GPT2").freeze_layers(frozen)
    rollout, rows = make_rollout(policy, PROMPTS, RESPONSES), torch.tensor([3, 1])
    assert policy.body.frozen == frozen  # type: ignore[union-attr]
    for ours, plain in zip(evaluator(policy, rollout)(rows), policy.evaluate(rollout[rows]), strict=True):
        require_same(ours, plain, 0 if frozen == 0 else 1e-12)


def test_layers_are_frozen_up_to_the_first_weight_that_learns():
    def frozen(policy: CausalLM) -> int:
        assert policy.body is not None
        return policy.body.frozen

    policy = model("GPT2").requires_grad_(False)
    assert frozen(policy) == 3
    policy.model.transformer.wpe.requires_grad_(True)  # type: ignore[union-attr]
    assert frozen(policy) == 0 and policy.begin(make_rollout(policy, PROMPTS, RESPONSES)) is None
    assert frozen(add_lora(model("GPT2"))) == 0
    late = add_lora(model("GPT2"), targets=["h.2.attn.c_attn"])  # adapters begin in block 2
    assert frozen(late) == 2 and frozen(late.without_adapters()) == 3


def test_a_policy_without_blocks_or_without_the_method_is_evaluated_as_ever():
    policy = plain(model("GPT2").freeze_layers(2))
    rollout, rows = make_rollout(policy, PROMPTS, RESPONSES), torch.tensor([4, 0])
    only_evaluate: Any = SimpleNamespace(evaluate=policy.evaluate)
    for each in (policy, only_evaluate):
        require_same(evaluator(each, rollout)(rows), policy.evaluate(rollout[rows]), 0)


@pytest.mark.parametrize("law", [SamplingLaw(11, 9, temperature=2.0, banned_tokens=(7,)), SamplingLaw(11, 9, top_k=4)])
def test_logits_made_a_few_states_at_a_time_are_those_made_at_once(monkeypatch, law):
    policy = model("GPT2")
    rollout = Rollout.of_tokens(PROMPTS, [[t for t in r if t != 7] for r in RESPONSES], law)
    if law.truncates:
        found = law.candidates(plain(policy).response_log_probs(rollout)[0])
        object.__setattr__(rollout, "candidates", torch.cat([found, rollout.response_ids.unsqueeze(-1)], -1))
    whole = evaluated(policy, rollout)
    monkeypatch.setattr(reading, "_LOGITS", 4 * 11)  # of 18 states
    require_same(evaluated(policy, rollout), whole, 1e-12)
    with torch.no_grad():
        require_same([torch.where(rollout.response_mask, x, 0.0) for x in policy.evaluate(rollout)], whole[0], 1e-12)


@pytest.mark.parametrize("name", ["GPT2", "Mistral"])
def test_activations_that_are_made_again_give_the_same_gradient(name):
    policy = model(name)
    rollout = make_rollout(policy, PROMPTS, RESPONSES)

    def numbers_kept() -> int:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            policy.evaluate(rollout)
        return sum(kept)

    before, whole = evaluated(policy, rollout), numbers_kept()
    policy.checkpoint_gradients()
    require_same(evaluated(policy, rollout), before, 1e-12)
    begun = policy.freeze_layers(1).begin(rollout)
    require_same(evaluated(policy, rollout, begun), evaluated(policy, rollout), 1e-10)
    policy.requires_grad_(True)
    assert numbers_kept() < whole / 2


def test_families_that_are_not_run_in_blocks_keep_their_activations():
    policy = random_model()
    policy.model.config._attn_implementation = "eager"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="not run block by block"):
        policy.checkpoint_gradients()


def test_padding_may_reach_beyond_the_context():
    """Every row fits the 64 positions; the columns of all of them together do not."""
    policy = random_model(dtype="float64")
    prompts, responses = [[1] * 60, [2]], [[3], [4] * 60]
    wide = make_rollout(policy, prompts, responses, left=20)
    for row in range(2):
        narrow = make_rollout(policy, [prompts[row]], [responses[row]])
        for ours, alone in zip(policy.evaluate(wide), policy.evaluate(narrow), strict=True):
            require_same(ours[row, : len(responses[row])], alone[0], 1e-10)
        whole, alone = (policy.response_log_probs(rollout)[0] for rollout in (wide, narrow))
        require_same(whole[row, : len(responses[row])], alone[0], 1e-10)


def test_padding_holds_zeros():
    policy = random_model()
    rollout = make_rollout(policy, PROMPTS, RESPONSES)
    assert all((x[~rollout.response_mask] == 0).all() for x in policy.evaluate(rollout))


def test_nothing_but_padding_is_read_too():
    policy = random_model()
    rollout = make_rollout(policy, [[1, 2], [3]], [[], []], right=2)
    assert all(x.shape == (2, 2) and not x.any() for x in policy.evaluate(rollout))
    logits, _ = policy(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool))
    assert logits.shape == (2, 3, 11) and logits.isfinite().all()
