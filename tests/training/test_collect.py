"""Collecting whole episodes is the same as stepping the environment through them."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_env.envs.beta import AdaptiveBeta
from rlhf_env.errors import (
    ConfigError,
    NegativeKLWarning,
    NonFiniteError,
    PromptTooLongError,
    RewardError,
    TokenizerError,
)
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.training.collect import collect
from tests.builders import PROMPTS, make_envs, random_model
from tests.envs.playing import step_through


class Tokens:
    """A process reward with named parts for the whole."""

    def score_tokens(self, prompts, responses):
        return [
            [0.1 * len(p) + 0.01 * t - len("".join(r[: t + 1])) for t in range(len(r))]
            for p, r in zip(prompts, responses, strict=True)
        ]

    def score(self, prompts, responses):
        return {"length": [len(r) for r in responses], "prompt": [0.5 * len(p) for p in prompts]}


PLAIN = {"temperature": 0.8, "banned_tokens": (8, 10), "missing_eos_penalty": 0.5, "stop_strings": ("hh",)}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{mode}-{placement}": {**PLAIN, "kl_mode": mode, "kl_placement": placement}
        for mode, placement in itertools.product(["reward", "observe"], ["token", "terminal"])
    },
    "reference": {**PLAIN, "kl_mode": "reference"},
    "off": {"kl_mode": "off", "missing_eos_penalty": 0.5},
    "top-k": {"top_k": 3, "min_new_tokens": 1},
    "top-p": {"top_p": 0.9, "temperature": 2.5},
    "top-k and top-p": {**PLAIN, "top_k": 6, "top_p": 0.8, "min_new_tokens": 2},
    "top-p, reference": {"top_p": 0.7, "kl_mode": "reference"},
    "top-k, off": {"top_k": 3, "kl_mode": "off"},
    "candidates": {"top_k": 4, "action": "candidate", "temperature": 1.3, "banned_tokens": (8,)},
    "deferred-token": {"reference_backend": "deferred", "missing_eos_penalty": 0.5},
    "deferred-terminal": {"reference_backend": "deferred", "kl_placement": "terminal"},
    "full": {"reference_backend": "full"},
    "process": {"reward_model": Tokens(), "missing_eos_penalty": 0.5, "length_penalty": 0.1},
    "process-terminal": {"reward_model": Tokens(), "kl_placement": "terminal", "length_penalty": 0.1},
    "process-deferred": {"reward_model": Tokens(), "reference_backend": "deferred", "top_k": 0},
    "process-reference": {"reward_model": Tokens(), "kl_mode": "reference", "top_k": 5},
    "context": {"context_length": 8, "missing_eos_penalty": 0.5, "length_penalty": 0.2},
    "context and top-p": {"context_length": 8, "top_p": 0.9, "missing_eos_penalty": 0.5},
    "groups": {"group_size": 3, "top_k": 5},
    "stop strings": {"stop_strings": ("ab", "bc", "h", "gag"), "missing_eos_penalty": 0.5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_collect_equals_stepping(case, dtype, tolerance):
    kwargs = CASES[case]
    reference, policy = random_model(dtype=dtype), random_model(dtype=dtype, seed=1)
    envs = make_envs(3, reference=reference, **kwargs)
    rollout = collect(policy, envs, [PROMPTS[i % 4] for i in range(16)], seed=4)
    assert rollout.ended.any() and not rollout.ended.all(), "both endings must occur"
    rewards, last = step_through(rollout, policy, reference=reference, **kwargs)
    late = "deferred" in case and kwargs.get("kl_placement", "token") == "token"  # charged in a lump, at the end
    own = rollout.reward.double()
    np.testing.assert_allclose(own.sum(1) if late else own, rewards.sum(1) if late else rewards, atol=6 * tolerance)
    for i, final in enumerate(last):
        assert final["score"] == pytest.approx(rollout.score[i].item(), abs=6 * tolerance)
        assert final["penalty"] == pytest.approx(rollout.penalty[i].item())
        assert (final["stop_reason"] in ("length", "context")) == (not rollout.ended[i])
        assert final["response_length"] == rollout.lengths[i]
        paid = final["score"] - final["penalty"]
        if kwargs.get("kl_mode", "reward") in ("reward", "observe"):
            assert final["kl"] == pytest.approx(rollout.kl[i].item(), abs=10 * tolerance)
        if kwargs.get("kl_mode", "reward") == "reward":
            paid -= 0.3 * final["kl"]
        if kwargs.get("kl_mode") != "reference":
            assert rewards[i].sum() == pytest.approx(paid, abs=1e-9)
            assert own[i].sum().item() == pytest.approx(paid, abs=10 * tolerance)
    if case == "context":
        assert {f["stop_reason"] for f in last} >= {"context", "length"}
    if case == "stop strings":
        assert {f["stop_reason"] for f in last} >= {"stop_string", "length"}


def test_what_could_be_written_is_kept_with_the_rollout():
    policy, reference = (random_model(dtype="float64", seed=seed) for seed in (1, 0))
    rollout = collect(policy, make_envs(3, reference=reference, top_k=5, top_p=0.8), episodes=12)
    assert rollout.candidates is not None and rollout.candidates.shape == (*rollout.response_ids.shape, 4)  # the widest
    among = (rollout.candidates == rollout.response_ids.unsqueeze(-1)).any(-1)
    assert among[rollout.response_mask].all()
    assert (rollout.candidates[~rollout.response_mask] == -1).all()
    torch.testing.assert_close(teacher_forced_logp(policy, rollout), rollout.logp, atol=1e-10, rtol=0)


def test_each_response_is_as_long_as_its_own_prompt_allows():
    envs = make_envs(2, reference=None, beta=0.0, context_length=8, max_new_tokens=6, min_new_tokens=6)
    rollout = collect(random_model(), envs, ["abc", "efghab", "d", "abcdef"])
    assert rollout.lengths.tolist() == [5, 2, 6, 2]
    assert not rollout.ended.any()


def test_a_response_does_not_depend_on_how_long_others_may_be():
    envs = make_envs(2, reference=random_model(dtype="float64"), context_length=8)
    policy = random_model(dtype="float64", seed=1)
    together, alone = collect(policy, envs, ["efghab", "d"]), collect(policy, envs, ["efghab"])
    width = alone.response_ids.shape[1]
    assert torch.equal(together.response_ids[:1, :width], alone.response_ids)


@pytest.mark.parametrize("placement", ["token", "terminal"])
def test_rewards_sum_to_score_minus_beta_kl_minus_penalty(placement):
    envs = make_envs(4, reference=random_model(dtype="float64"), kl_placement=placement, missing_eos_penalty=0.5)
    rollout = collect(random_model(dtype="float64", seed=1), envs, episodes=16)
    expected = rollout.score - 0.3 * rollout.kl - rollout.penalty
    torch.testing.assert_close(rollout.reward.sum(1), expected, atol=1e-9, rtol=0)
    assert rollout.kl.abs().min() > 1e-3


def test_policy_equal_to_reference_has_no_kl():
    model = random_model()
    rollout = collect(model, make_envs(4, reference=model), episodes=16)
    assert rollout.kl.abs().max() < 1e-4


def test_episodes_do_not_depend_on_how_many_are_collected_at_once():
    envs, policy = make_envs(3, reference=random_model(dtype="float64")), random_model(dtype="float64", seed=1)
    all_at_once = collect(policy, envs, episodes=12, seed=2)
    for start in range(0, 12, 5):
        part = collect(policy, envs, episodes=min(5, 12 - start), seed=2, start=start)
        for i in range(len(part)):
            own, same = (r.response_ids[j][r.response_mask[j]] for r, j in ((part, i), (all_at_once, start + i)))
            assert torch.equal(own, same)
            torch.testing.assert_close(part.reward[i].sum(), all_at_once.reward[start + i].sum(), atol=1e-9, rtol=0)


def test_every_prompt_is_answered_once_per_epoch_in_an_order_of_its_own():
    envs, policy = make_envs(2), random_model()
    widths = [
        collect(policy, envs, episodes=4, seed=0, start=4 * epoch).prompt_mask.sum(1).tolist() for epoch in (0, 1, 2)
    ]
    assert all(sorted(w) == [1, 2, 3, 6] for w in widths)
    assert len(set(map(tuple, widths))) > 1


def test_other_seeds_other_responses():
    envs, policy = make_envs(2), random_model()
    prompts = ["abc"] * 8
    a, b = (collect(policy, envs, prompts, seed=s) for s in (0, 1))
    assert a.response_ids.shape != b.response_ids.shape or not torch.equal(a.response_ids, b.response_ids)


def test_adaptive_beta_learns_from_a_collected_batch_at_once():
    envs = make_envs(4, beta=AdaptiveBeta(initial=0.1, target=1e-3, horizon=100))
    rollout = collect(random_model(seed=1), envs, episodes=10)
    assert rollout.beta.unique().tolist() == pytest.approx([0.1])
    assert rollout.kl.mean() > 1
    assert envs.beta == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))


def test_without_a_reference_there_is_no_kl():
    rollout = collect(random_model(), make_envs(2, reference=None, beta=0.0), episodes=4)
    assert not rollout.kl.any()
    torch.testing.assert_close(rollout.reward.sum(1), rollout.score)


def test_the_reward_model_is_asked_once_with_prompts_in_order():
    asked = []

    def reward(prompts, responses):
        asked.append(list(prompts))
        return [0.0] * len(prompts)

    collect(random_model(), make_envs(2, reward_model=reward), ["abc", "d", "abc"])
    assert asked == [["abc", "d", "abc"]]


def test_a_nan_score_names_the_sample():
    envs = make_envs(2, reward_model=lambda p, r: [0.0, float("nan"), 0.0])
    with pytest.raises(RewardError, match="1"):
        collect(random_model(), envs, ["abc", "d", "abc"])


def test_a_negative_mean_kl_is_an_alarm():
    """As when the reference is scored under another law than the policy sampled from."""

    class Warmer:
        def __init__(self, model):
            self.decoder, self.model = model.decoder, model

        def evaluate(self, rollout):
            logp, values, entropy = self.model.evaluate(rollout)
            return logp * 0.5, values, entropy

    model = random_model()
    with pytest.warns(NegativeKLWarning, match="no true KL is negative"):
        collect(model, make_envs(4, tokenizer=model.tokenizer, reference=Warmer(model)), episodes=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(model, make_envs(4, reference=model), episodes=32)


def test_a_few_episodes_are_no_ground_for_alarm():
    envs, policy = make_envs(4, temperature=3.0), random_model(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kls = [collect(policy, envs, episodes=2, start=2 * i).kl for i in range(40)]
    assert torch.stack(kls).mean() > 0
    assert any(kl.mean() < -3 * kl.std() / 2**0.5 and kl.mean() < -0.05 for kl in kls), "an innocent pair looks guilty"


def test_truncation_cannot_be_collected():
    with pytest.raises(ConfigError, match="length_limit"):
        collect(random_model(), make_envs(2, length_limit="truncate"), episodes=2)


def test_a_policy_of_another_vocabulary_is_refused():
    other = CausalLM.from_config(tiny_config("gpt2", 12), char_tokenizer("abcdefghi"))
    with pytest.raises(TokenizerError, match="another vocabulary"):
        collect(other, make_envs(2), episodes=2)


def test_collect_needs_to_know_how_much():
    with pytest.raises(ConfigError, match="how many episodes"):
        collect(random_model(), make_envs(2))


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "at least one prompt"), ("abc", "not one string"), (["abc", 3], "prompt 1 must be")]
)
def test_prompts_that_are_none(prompts, message):
    with pytest.raises(ConfigError, match=message):
        collect(random_model(), make_envs(2), prompts)


def test_a_response_may_fill_the_policys_context_and_not_outgrow_it():
    envs = make_envs(2, reference=None, beta=0.0, max_new_tokens=60, min_new_tokens=60)
    rollout = collect(random_model(), envs, ["abcd", "a"])  # a context of 64
    assert rollout.lengths.tolist() == [60, 60]
    with pytest.raises(PromptTooLongError, match="5 tokens of prompt and 60 of response.*context of 64"):
        collect(random_model(), envs, ["a", "abcde"])


def test_a_broken_reference_is_named_and_moves_no_beta():
    reference = random_model("llama")  # whose embedding is not its head too, so that only rows with a "d" break
    with torch.no_grad():
        reference.model.get_input_embeddings().weight[3] = torch.nan  # type: ignore[operator]
    envs = make_envs(2, reference=reference, beta=AdaptiveBeta(initial=0.1), banned_tokens=(3,))
    with pytest.raises(NonFiniteError, match="ref_logp of episode 1"):
        collect(random_model(seed=1), envs, ["abc", "d"], seed=2)
    assert envs.beta == 0.1
