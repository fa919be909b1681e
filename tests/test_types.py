"""The sampling law, the rollout and the comparison: what they compute, what they slice, what they refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.types import Comparison, RewardModel, Rollout, SamplingLaw

# --- the sampling law ------------------------------------------------------------------------------


def probabilities(law: SamplingLaw, weights: list[float], position: int = 0) -> list[float]:
    """What the law makes of logits log(weights): at temperature 1, proportional to the weights."""
    logits = torch.tensor(weights, dtype=torch.float64).log()
    return law.log_probs(logits, torch.tensor(position)).exp().tolist()


def test_temperature_divides_the_logits() -> None:
    assert probabilities(SamplingLaw(3, None), [9, 4, 1]) == pytest.approx([9 / 14, 4 / 14, 1 / 14])
    assert probabilities(SamplingLaw(3, None, temperature=2.0), [9, 4, 1]) == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert probabilities(SamplingLaw(3, None, temperature=0.5), [3, 2, 1]) == pytest.approx([9 / 14, 4 / 14, 1 / 14])


def test_banned_tokens_are_never_written_and_the_rest_share_their_probability() -> None:
    assert probabilities(SamplingLaw(4, None, banned_tokens=(0, 2)), [5, 1, 7, 3]) == pytest.approx([0, 0.25, 0, 0.75])


def test_eos_is_forbidden_until_enough_tokens_are_written() -> None:
    law = SamplingLaw(3, eos_token_id=2, min_new_tokens=2)
    logits = torch.tensor([1.0, 3.0, 4.0]).log().expand(2, 4, 3)
    position = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    early, late = [0.25, 0.75, 0.0], [0.125, 0.375, 0.5]
    expected = torch.tensor([[early, early, late, late], [late, late, early, early]])
    torch.testing.assert_close(law.log_probs(logits, position).exp(), expected)


def test_without_eos_there_is_nothing_to_forbid() -> None:
    assert probabilities(SamplingLaw(2, eos_token_id=None, min_new_tokens=5), [1, 3]) == pytest.approx([0.25, 0.75])


def test_rows_of_a_larger_embedding_are_never_sampled() -> None:
    log_probs = SamplingLaw(2, None).log_probs(torch.tensor([1.0, 3.0, 100.0, 100.0]).log(), torch.tensor(0))
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_is_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    logits = torch.tensor([0.0, 1.0, 3.0], dtype=dtype)  # exact in every dtype
    log_probs = SamplingLaw(3, None).log_probs(logits, torch.tensor(0))
    assert log_probs.dtype == expected
    log_z = math.log(1 + math.e + math.e**3)
    torch.testing.assert_close(
        log_probs.double(), torch.tensor([-log_z, 1 - log_z, 3 - log_z]).double(), rtol=0, atol=1e-6
    )


def test_the_raw_logits_are_left_alone() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    SamplingLaw(3, 2, temperature=2.0, min_new_tokens=1, banned_tokens=(0,)).log_probs(logits, torch.tensor(0))
    assert logits.tolist() == [1, 2, 3]


@st.composite
def laws(draw: st.DrawFn) -> SamplingLaw:
    vocab = draw(st.integers(2, 9))
    eos = draw(st.none() | st.integers(0, vocab - 1))
    banned = draw(st.lists(st.integers(0, vocab - 1), unique=True, max_size=vocab - 2))
    if eos is not None and len({*banned, eos}) == vocab:
        banned = []
    temperature = draw(st.floats(0.1, 10))
    return SamplingLaw(vocab, eos, temperature, draw(st.integers(0, 4)), tuple(banned))


@given(law=laws(), positions=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_allowed_is_where_the_log_probabilities_are_finite(law: SamplingLaw, positions: list[int], seed: int) -> None:
    logits = torch.randn(len(positions), law.vocab_size + 2, generator=torch.Generator().manual_seed(seed))
    log_probs = law.log_probs(logits, torch.tensor(positions))
    assert np.array_equal(law.allowed(np.array(positions)), log_probs.isfinite().numpy())
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(positions)))


def test_allowed_by_hand() -> None:
    allowed = SamplingLaw(4, eos_token_id=3, min_new_tokens=1, banned_tokens=(0,)).allowed(np.array([0, 1]))
    assert allowed.tolist() == [[False, True, True, False], [False, True, True, True]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0: greedy decoding"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        ({"banned_tokens": (1, 3)}, "banned token 3 is outside the vocabulary of 3"),
        ({"banned_tokens": (-1,)}, "banned token -1 is outside"),
        ({"banned_tokens": (0, 1, 2)}, "no token is left to write"),
        ({"banned_tokens": (0, 1), "min_new_tokens": 1}, "no token is left to write: .* EOS before min_new_tokens"),
        ({"eos_token_id": 3}, "EOS token 3 is outside the vocabulary of 3"),
        ({"eos_token_id": -1}, "EOS token -1 is outside the vocabulary of 3"),
        ({"top_k": 4}, r"top_k=4 must be 0 \(all\) to 3, the size of the vocabulary"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p must be above 0"),
    ],
)
def test_impossible_laws_are_refused(settings: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"vocab_size": 3, "eos_token_id": 2}
    with pytest.raises(ConfigError, match=message):
        SamplingLaw(**(defaults | settings))


def test_eos_may_be_all_that_is_left_once_it_is_allowed() -> None:
    assert probabilities(SamplingLaw(3, eos_token_id=2, banned_tokens=(0, 1)), [5, 5, 1]) == [0, 0, 1]


# --- top-k and top-p --------------------------------------------------------------------------------

HALVES = [0.125, 0.5, 0.0625, 0.25, 0.0625]  # exact in binary: tokens 1, 3, 0, then 2 and 4 alike


def left_over(weights: list[float], **law: Any) -> list[int]:
    log_probs = torch.tensor(weights, dtype=torch.float64).log().log_softmax(-1)
    return SamplingLaw(len(weights), None, **law).candidates(log_probs).tolist()


@pytest.mark.parametrize(
    ("law", "tokens"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 0]),
        ({"top_k": 4}, [1, 3, 0, 2]),  # of equals the first
        ({"top_k": 5}, [1, 3, 0, 2, 4]),
        ({"top_p": 0.1}, [1, -1, -1, -1, -1]),  # the likeliest always
        ({"top_p": 0.5}, [1, -1, -1, -1, -1]),  # reached exactly
        ({"top_p": 0.5001}, [1, 3, -1, -1, -1]),
        ({"top_p": 0.75}, [1, 3, -1, -1, -1]),
        ({"top_p": 0.876}, [1, 3, 0, 2, -1]),
        ({"top_p": 0.9375}, [1, 3, 0, 2, -1]),
        ({"top_p": 0.94}, [1, 3, 0, 2, 4]),
        ({"top_k": 2, "top_p": 0.6}, [1, -1]),  # 0.5 of the 0.75 that top-k leaves are two thirds of it
        ({"top_k": 2, "top_p": 0.7}, [1, 3]),
        ({"top_k": 3, "top_p": 0.85}, [1, 3, -1]),  # 0.75 of 0.875 are 0.857
        ({"top_k": 3, "top_p": 0.86}, [1, 3, 0]),
    ],
)
def test_what_top_k_and_top_p_leave_by_hand(law: dict[str, Any], tokens: list[int]) -> None:
    assert left_over(HALVES, **law) == tokens


def test_of_equally_likely_tokens_the_first_counts_as_likelier() -> None:
    assert left_over([1.0] * 5, top_k=3) == [0, 1, 2]
    assert left_over([1.0, 2.0, 1.0, 2.0], top_k=3) == [1, 3, 0]
    assert left_over([1.0] * 4, top_p=0.5) == [0, 1, -1, -1]


def test_what_is_forbidden_is_no_candidate() -> None:
    assert left_over([0.0, 2.0, 0.0, 1.0], top_k=4) == [1, 3, -1, -1]
    assert left_over([0.0, 0.0, 0.0, 1.0], top_k=2, top_p=0.5) == [3, -1]
    for n in range(1, 50):  # however the sum of their shares is rounded
        assert left_over([1.0] * n + [0.0], top_k=n + 1) == [*range(n), -1]
    law = SamplingLaw(4, eos_token_id=0, min_new_tokens=1, banned_tokens=(2,), top_k=3)
    log_probs = law.log_probs(torch.tensor([8.0, 1.0, 9.0, 2.0]).log().expand(2, 4), torch.tensor([0, 1]))
    assert law.candidates(log_probs).tolist() == [[3, 1, -1], [0, 3, 1]]


def test_candidates_keep_the_batch_axes_and_need_no_batch() -> None:
    law = SamplingLaw(5, None, top_k=2, top_p=0.9)
    log_probs = torch.tensor(HALVES).log().expand(2, 3, 5)
    assert law.candidates(log_probs).shape == (2, 3, 2)
    assert law.candidates(log_probs).dtype == torch.int64
    assert law.candidates(log_probs[0, 0]).tolist() == [1, 3]


def test_without_top_k_and_top_p_nothing_is_left_out() -> None:
    assert not SamplingLaw(5, None).truncates
    assert SamplingLaw(5, None, top_k=5).truncates and SamplingLaw(5, None, top_p=0.99).truncates


@given(
    weights=st.lists(st.integers(0, 9), min_size=2, max_size=8).filter(any),
    top_k=st.integers(0, 8),
    top_p=st.floats(0.05, 1.0),
)
def test_candidates_are_the_shortest_likeliest_prefix(weights: list[int], top_k: int, top_p: float) -> None:
    top_k = min(top_k, len(weights))
    found = [token for token in left_over([float(w) for w in weights], top_k=top_k, top_p=top_p) if token >= 0]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))[: top_k or None]
    assert found == order[: len(found)] and weights[found[-1]] > 0
    total = sum(weights[token] for token in order)
    share = [sum(weights[token] for token in found[:n]) / total for n in range(len(found) + 1)]
    assert share[-2] < top_p + 1e-9, "without the last the share was not reached"
    rest = [token for token in order[len(found) :] if weights[token] > 0]
    assert not rest or share[-1] >= top_p - 1e-9, "and with it, it is"


# --- the rollout -----------------------------------------------------------------------------------

LAW = SamplingLaw(vocab_size=10, eos_token_id=9)
FIELDS: dict[str, Any] = {
    "prompt_ids": torch.tensor([[0, 1], [2, 3], [0, 4]]),
    "prompt_mask": torch.tensor([[False, True], [True, True], [False, True]]),
    "response_ids": torch.tensor([[5, 6, 9], [9, 0, 0], [7, 9, 0]]),
    "response_mask": torch.tensor([[True, True, True], [True, False, False], [True, True, False]]),
    "logp": torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 50.0, math.nan], [-4.0, -0.5, math.inf]]),
    "ref_logp": torch.tensor([[-1.5, -1.0, -3.25], [-3.0, 70.0, 0.0], [-4.0, -1.0, math.inf]]),
    "values": torch.zeros(3, 3),
    "reward": torch.arange(9.0).reshape(3, 3),
    "score": torch.tensor([10.0, 20.0, 30.0]),
    "penalty": torch.tensor([0.0, 1.0, 0.0]),
    "beta": torch.tensor([0.1, 0.2, 0.3]),
    "ended": torch.tensor([True, False, True]),
    "law": LAW,
}


def make_rollout(**changes: Any) -> Rollout:
    return Rollout(**(FIELDS | changes))


def test_prompt_and_response_read_without_a_gap() -> None:
    rollout = make_rollout()
    assert rollout.input_ids.tolist() == [[0, 1, 5, 6, 9], [2, 3, 9, 0, 0], [0, 4, 7, 9, 0]]
    assert rollout.attention_mask.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert rollout.attention_mask.dtype == torch.bool


def test_kl_and_lengths_count_the_response_with_its_eos_and_no_padding() -> None:
    rollout = make_rollout()
    assert len(rollout) == 3
    assert rollout.kl.tolist() == [-0.25, 2.0, 0.5]  # 0.5 − 1 + 0.25; 2; 0 + 0.5
    assert rollout.lengths.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [2]),
        (np.int64(1), [1]),
        (slice(1, None), [1, 2]),
        (slice(0, 0), []),
        ([2, 0], [2, 0]),
        (torch.tensor([2, 2, 1]), [2, 2, 1]),
        (torch.tensor([True, False, True]), [0, 2]),
        (np.array([2, 1]), [2, 1]),
    ],
)
def test_indexing_slices_every_field(index: Any, rows: list[int]) -> None:
    part = make_rollout()[index]
    assert len(part) == len(rows)
    assert part.law is LAW
    for name, whole in FIELDS.items():
        if name == "law":
            continue
        expected = torch.stack([whole[row] for row in rows]) if rows else whole[:0]
        torch.testing.assert_close(getattr(part, name), expected, rtol=0, atol=0, equal_nan=True)


def test_a_row_that_is_not_there() -> None:
    with pytest.raises(IndexError):
        make_rollout()[3]


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("law", "prompt_ids", "response_ids")])
@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 3), (3, 1), ()])
def test_a_field_of_the_wrong_shape_is_named(name: str, shape: tuple[int, ...]) -> None:
    wrong = torch.zeros(shape, dtype=FIELDS[name].dtype)
    expected = tuple(FIELDS[name].shape)
    with pytest.raises(ValueError) as error:
        make_rollout(**{name: wrong})
    assert str(error.value) == f"Rollout.{name} has shape {shape}, expected {expected}"


@pytest.mark.parametrize("name", ["score", "penalty", "beta", "ended"])
def test_a_number_per_token_where_one_per_episode_belongs(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Rollout.{name} has shape \(3, 3\), expected \(3,\)"):
        make_rollout(**{name: torch.zeros(3, 3, dtype=FIELDS[name].dtype)})


@pytest.mark.parametrize("name", ["prompt_ids", "response_ids"])
def test_ids_of_a_single_episode_need_a_batch_axis(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Rollout.{name} has shape \(3,\), expected \[B, tokens\]"):
        make_rollout(**{name: torch.tensor([1, 2, 3])})


@pytest.mark.parametrize("name", ["prompt_mask", "response_mask", "ended"])
def test_masks_are_bool(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Rollout.{name} must be bool \(True = counts\), got torch.int64"):
        make_rollout(**{name: FIELDS[name].long()})


def test_candidates_are_there_where_the_law_truncates_and_only_there() -> None:
    law = SamplingLaw(10, 9, top_k=2)
    with pytest.raises(ValueError, match="candidates must be there where the law has top-k or top-p, and only there"):
        make_rollout(law=law)
    with pytest.raises(ValueError, match="and only there"):
        make_rollout(candidates=torch.zeros(3, 3, 2, dtype=torch.int64))
    for shape in ((3, 2, 2), (2, 3, 2), (3, 3)):
        with pytest.raises(ValueError, match=r"Rollout.candidates has shape .* expected \[3, 3, K\]"):
            make_rollout(law=law, candidates=torch.zeros(shape, dtype=torch.int64))
    rollout = make_rollout(law=law, candidates=torch.arange(18).reshape(3, 3, 2))
    assert rollout[[2, 0]].candidates.tolist() == [[[12, 13], [14, 15], [16, 17]], [[0, 1], [2, 3], [4, 5]]]
    assert rollout.to("meta").candidates.device.type == "meta"


def test_a_rollout_of_tokens_pads_prompts_on_the_left_and_responses_on_the_right() -> None:
    rollout = Rollout.of_tokens([[1, 2], [3]], [[4], [5, 6, 9]], LAW)
    assert rollout.input_ids.tolist() == [[1, 2, 4, 0, 0], [0, 3, 5, 6, 9]]
    assert rollout.attention_mask.int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert rollout.response_mask.int().tolist() == [[1, 0, 0], [1, 1, 1]]
    assert not rollout.logp.any() and rollout.candidates is None
    assert Rollout.of_tokens([[1]], [[2]], SamplingLaw(10, 9, top_k=3)).candidates is not None


def test_a_rollout_is_never_changed() -> None:
    rollout = make_rollout()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rollout, "score", torch.zeros(3))  # noqa: B010


def test_moving_to_a_device_moves_every_field() -> None:
    moved = make_rollout().to("meta")
    assert {getattr(moved, name).device.type for name in FIELDS if name != "law"} == {"meta"}
    assert moved.law is LAW


# --- the Protocols ---------------------------------------------------------------------------------


def test_anything_with_a_score_method_is_a_reward_model() -> None:
    class Length:
        def score(self, prompts: list[str], responses: list[str]) -> np.ndarray:
            return np.array([float(len(r)) for r in responses])

    assert isinstance(Length(), RewardModel)
    assert not isinstance(len, RewardModel)


# --- the comparison --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "pairs"),
    [
        ((0, 1), [(0, 1, 1.0)]),
        ((1, 0), [(0, 1, 0.0)]),
        ((0, 0), [(0, 1, 0.5)]),
        ((2, 0, 1), [(0, 1, 0.0), (0, 2, 0.0), (1, 2, 1.0)]),
        ((1, 0, 1), [(0, 1, 0.0), (0, 2, 0.5), (1, 2, 1.0)]),
        ((0, 2, 1, 2), [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0), (1, 2, 0.0), (1, 3, 0.5), (2, 3, 1.0)]),
    ],
)
def test_a_ranking_is_its_pairs_in_order(ranks: tuple[int, ...], pairs: list[tuple[int, int, float]]) -> None:
    assert Comparison("p", tuple("abcd"[: len(ranks)]), ranks).pairs == pairs


@pytest.mark.parametrize(("ranks", "preference"), [((0, 1), 0.7), ((1, 0), 0.25), ((0, 0), 0.5), ((0, 1), 1.0)])
def test_a_soft_label_is_the_preference_of_its_pair(ranks: tuple[int, int], preference: float) -> None:
    assert Comparison("p", ("a", "b"), ranks, preference=preference).pairs == [(0, 1, preference)]
    assert Comparison("p", ("a", "a"), ranks, preference=preference).pairs == []


def test_what_wrote_each_response() -> None:
    assert Comparison("p", ("a", "b"), (0, 1)).writers == ("", "")
    assert Comparison("p", ("a", "b"), (0, 1), policy="sft").writers == ("sft", "sft")
    assert Comparison("p", ("a", "b"), (0, 1), policies=("sft", "ppo")).writers == ("sft", "ppo")


def test_what_a_comparison_need_not_know() -> None:
    comparison = Comparison("", ("", ""), (0, 0))  # a policy can answer nothing
    assert (comparison.labeler, comparison.policy, comparison.order, comparison.time) == ("", "", None, None)
    assert (comparison.policies, comparison.strength, comparison.preference) == (None, None, None)


A_PAIR = {"responses": ("a", "b"), "ranks": (0, 1)}
PAIR_OF_TIES = {"responses": ("a", "b"), "ranks": (0, 0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": ("a",), "ranks": (0,)}, "a comparison needs at least 2 responses, it has 1"),
        ({"responses": (), "ranks": ()}, "a comparison needs at least 2 responses, it has 0"),
        ({"ranks": (0, 1)}, r"the ranks of 3 responses are 3 integers .* got \[0, 1\]"),
        ({"ranks": (0, 1, 3)}, r"without a gap.* got \[0, 1, 3\]"),
        ({"ranks": (1, 2, 3)}, r"from 0 \(best\) upwards .* got \[1, 2, 3\]"),
        ({"ranks": (-1, 0, 1)}, r"from 0 \(best\) upwards .* got \[-1, 0, 1\]"),
        ({"ranks": (0, 0, 2)}, r"without a gap, equal ones for a tie; got \[0, 0, 2\]"),
        ({"order": (0, 1)}, r"order must name each of the 3 responses once, got \[0, 1\]"),
        ({"order": (0, 1, 1)}, r"order must name each of the 3 responses once, got \[0, 1, 1\]"),
        ({"order": (1, 2, 3)}, r"order must name each of the 3 responses once, got \[1, 2, 3\]"),
        ({"policies": ("sft", "ppo")}, r"policies must name one for each of the 3 responses"),
        ({"policies": ("sft", "ppo", "ppo"), "policy": "sft"}, "either one policy wrote all responses .'sft'. or"),
        ({"strength": 1.0}, "strength is how much better one of two responses is; these are more than two, or a tie"),
        ({**PAIR_OF_TIES, "strength": 1.0}, "strength is how much better one of two"),
        ({**A_PAIR, "strength": 0.0}, "strength must be positive and finite, got 0.0"),
        ({**A_PAIR, "strength": -1}, "strength must be positive and finite, got -1"),
        ({**A_PAIR, "strength": float("nan")}, "strength must be positive and finite, got nan"),
        ({**A_PAIR, "strength": float("inf")}, "strength must be positive and finite, got inf"),
        ({"preference": 0.7}, "preference is the probability, 0 to 1, .* first of two .* got 0.7 for 3"),
        ({**A_PAIR, "preference": 1.1}, "preference is the probability, 0 to 1, .* got 1.1 for 2"),
        ({**A_PAIR, "preference": float("nan")}, "preference is the probability, 0 to 1"),
        ({**A_PAIR, "preference": 0.5}, r"preference 0.5 for the first response contradicts the ranks \[0, 1\]"),
        ({**A_PAIR, "preference": 0.2}, r"preference 0.2 for the first response contradicts the ranks \[0, 1\]"),
        ({**PAIR_OF_TIES, "preference": 0.7}, r"preference 0.7 .* contradicts the ranks \[0, 0\]"),
    ],
)
def test_a_judgement_that_is_none_is_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"prompt": "p", "responses": ("a", "b", "c"), "ranks": (0, 1, 2)}
    with pytest.raises(DataError, match=message):
        Comparison(**(fields | changes))


def test_a_comparison_is_never_changed_and_equals_its_like() -> None:
    comparison = Comparison("p", ("a", "b"), (0, 1))
    assert comparison == Comparison("p", ("a", "b"), (0, 1)) != Comparison("p", ("a", "b"), (1, 0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(comparison, "ranks", (1, 0))  # noqa: B010
