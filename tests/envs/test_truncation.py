"""Top-k, top-p and candidates: what may be written, what it costs, and that both models are cut alike."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.scoring import full_kl
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.training.collect import collect
from rlhf_env.types import SamplingLaw
from tests.builders import EOS, make_env, make_envs, random_model
from tests.envs.playing import action_of, play

LAWS = [
    {},
    {"temperature": 0.6, "min_new_tokens": 3, "banned_tokens": (8, 10)},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_k": 5, "top_p": 0.8, "temperature": 1.3, "min_new_tokens": 2, "banned_tokens": (10,)},
    {"top_k": 4, "action": "candidate", "banned_tokens": (8,)},
]


def names(case: dict[str, Any]) -> str:
    return "-".join(case) or "plain"


# --- an independent recomputation: raw logits and loops, nothing of the package ---------------------


@lru_cache(maxsize=1024)
def raw_logits(model: CausalLM, *ids: int) -> np.ndarray:
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0, -1].double().numpy()  # type: ignore[operator]


def next_tokens(model: CausalLM, ids: list[int], written: int, law: dict[str, Any], eos: int) -> np.ndarray:
    """Probabilities of the next token before top-k and top-p."""
    logits = raw_logits(model, *ids)
    weights = np.exp((logits - logits.max()) / law.get("temperature", 1.0))
    weights[list(law.get("banned_tokens", ()))] = 0.0
    if written < law.get("min_new_tokens", 0):
        weights[eos] = 0.0
    return weights / weights.sum()


def left_over(reference: np.ndarray, law: dict[str, Any]) -> list[int]:
    """What top-k, and top-p within it, leave: tokens in order, until their share reaches top-p."""
    order = sorted(range(len(reference)), key=lambda token: (-reference[token], token))
    order = [token for token in order[: law.get("top_k", 0) or None] if reference[token] > 0]
    total, share, kept = sum(reference[token] for token in order), 0.0, []
    for token in order:
        if share >= law.get("top_p", 1.0):
            break
        kept.append(token)
        share += reference[token] / total
    return kept


def brute_force(
    model: CausalLM, reference: CausalLM, prompt: list[int], response: list[int], law: dict[str, Any], eos: int = EOS
) -> list[tuple[float, float]]:
    """Probability of each token of a response under the two models."""
    found = []
    for t, token in enumerate(response):
        own, theirs = (next_tokens(m, prompt + response[:t], t, law, eos) for m in (model, reference))
        kept = left_over(theirs, law)
        found.append(tuple(p[token] / p[kept].sum() if token in kept else 0.0 for p in (own, theirs)))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
@pytest.mark.parametrize("law", LAWS, ids=names)
def test_the_kl_of_every_token_is_that_of_an_offline_recomputation(law, dtype, tolerance):
    policy, reference = random_model(dtype=dtype, seed=1), random_model(dtype=dtype)
    env = make_env(reference=reference, **law)
    bind_policy(env, policy)
    rollout = collect(policy, make_envs(2, reference=reference, **law), ["ab", "d", "ab"], seed=5)
    for row in range(3):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        rewards, infos = play(env, response, env.task.codec.decode(prompt))
        offline = np.log(brute_force(policy, reference, prompt, response, law))
        for t, info in enumerate(infos):
            assert info["logp"] == pytest.approx(offline[t, 0], abs=tolerance)
            assert info["ref_logp"] == pytest.approx(offline[t, 1], abs=tolerance)
        assert infos[-1]["kl"] == pytest.approx((offline[:, 0] - offline[:, 1]).sum(), abs=6 * tolerance)
        last = infos[-1]
        assert sum(rewards) == pytest.approx(last["score"] - 0.3 * last["kl"] - last["penalty"], abs=1e-9)
        np.testing.assert_allclose(rollout.logp[row][: len(response)], offline[:, 0], atol=tolerance)
        np.testing.assert_allclose(rollout.ref_logp[row][: len(response)], offline[:, 1], atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("law", LAWS, ids=names)
def test_a_policy_that_is_its_reference_has_no_kl(law, dtype, tolerance):
    model = random_model(dtype=dtype)
    envs = make_envs(3, reference=model, **law)
    rollout = collect(model, envs, episodes=6)
    env = make_env(reference=model, **law)
    bind_policy(env, model)
    response = rollout.response_ids[0][rollout.response_mask[0]].tolist()
    prompt = env.task.codec.decode(rollout.prompt_ids[0][rollout.prompt_mask[0]].tolist())
    _, infos = play(env, response, prompt)
    for info in infos:
        assert info["logp"] == pytest.approx(info["ref_logp"], abs=tolerance)
    for name in ("kl", "kl_k2", "kl_k3"):
        assert infos[-1][name] == pytest.approx(0, abs=6 * tolerance)
    assert rollout.kl.abs().max() < 1e-4 and full_kl(model, model, rollout).abs().max() == 0


# --- all of a tiny world ----------------------------------------------------------------------------

TINY_EOS, TINY_T = 2, 3  # ids: "a" is 0, <bos> 1, <eos> 2, <pad> 3


def tiny_model(seed: int) -> CausalLM:
    config = tiny_config("gpt2", 4, n_layer=1, n_embd=8, n_head=2, n_positions=8)
    config.initializer_range = 0.5
    return CausalLM.from_config(config, char_tokenizer("a"), seed=seed, dtype="float64")


def every_response() -> list[list[int]]:
    found = [list(r) for n in (1, 2, 3) for r in itertools.product(range(4), repeat=n)]
    return [r for r in found if TINY_EOS not in r[:-1] and (r[-1] == TINY_EOS or len(r) == TINY_T)]


@pytest.mark.parametrize(
    "law",
    [
        {},
        {"top_k": 2},
        {"top_p": 0.75, "temperature": 0.8},
        {"top_k": 3, "min_new_tokens": 1, "action": "candidate"},
    ],
    ids=names,
)
def test_over_all_responses_probabilities_sum_to_one_and_k1_to_the_exact_kl(law):
    policy, reference = tiny_model(1), tiny_model(0)
    kwargs = {"prompts": ["aa"], "tokenizer": reference.tokenizer, "reference": reference, "max_new_tokens": TINY_T}
    env = make_env(reward_model=lambda p, r: [0.0] * len(r), **kwargs, **law)
    bind_policy(env, policy)
    mass, ref_mass, k1, exact = 0.0, 0.0, 0.0, 0.0
    full, allowed = 0.0, 0
    for response in every_response():
        offline = brute_force(policy, reference, [0, 0], response, law, TINY_EOS)
        try:
            _, infos = play(env, response, "aa")
        except ValueError:  # forbidden, or no candidate
            assert min(p for pair in offline for p in pair) == 0.0
            continue
        allowed += 1
        own, theirs = (np.exp(sum(info[name] for info in infos)) for name in ("logp", "ref_logp"))
        mass, ref_mass, k1 = mass + own, ref_mass + theirs, k1 + own * infos[-1]["kl"]
        p, q = (np.prod([pair[i] for pair in offline]) for i in (0, 1))
        exact += p * np.log(p / q)
        for t in range(len(response)):
            before = [0, 0, *response[:t]]
            ours, ref = (next_tokens(m, before, t, law, TINY_EOS) for m in (policy, reference))
            kept = left_over(ref, law)
            ours, ref = ours[kept] / ours[kept].sum(), ref[kept] / ref[kept].sum()
            full += p * float(np.sum(ours * np.log(ours / ref)))
    assert allowed > 3
    assert (mass, ref_mass) == (pytest.approx(1, abs=1e-12), pytest.approx(1, abs=1e-12))
    assert exact > 0.01
    assert k1 == pytest.approx(exact, abs=1e-12)
    assert full == pytest.approx(exact, abs=1e-12), "Σ_t of the exact KL of next tokens, in expectation"
    rollout = collect(policy, make_envs(8, reward_model=lambda p, r: [0.0] * len(r), **kwargs, **law), ["aa"] * 300)
    difference = full_kl(policy, reference, rollout)
    assert difference.mean() == pytest.approx(exact, abs=5 * float(difference.std()) / 300**0.5 + 1e-12)
    assert (difference >= 0).all()


def test_full_kl_of_a_response_by_brute_force():
    law = {"top_k": 4, "top_p": 0.9, "temperature": 1.2}
    policy, reference = random_model(dtype="float64", seed=1), random_model(dtype="float64")
    rollout = collect(policy, make_envs(2, reference=reference, **law), ["ab", "efghab"], seed=2)
    for row, found in enumerate(full_kl(policy, reference, rollout, chunk=1).tolist()):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        expected = 0.0
        for t in range(len(response)):
            own, ref = (next_tokens(m, prompt + response[:t], t, law, EOS) for m in (policy, reference))
            kept = left_over(ref, law)
            own, ref = own[kept] / own[kept].sum(), ref[kept] / ref[kept].sum()
            expected += float(np.sum(own * np.log(own / ref)))
        assert found == pytest.approx(expected, abs=1e-10)


# --- what may be written ----------------------------------------------------------------------------


@pytest.mark.parametrize("law", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.6, "min_new_tokens": 1}])
def test_observation_masks_and_law_name_the_same_tokens(law):
    reference = random_model(dtype="float64")
    env = make_env(reference=reference, kl_mode="off", **law)
    observation, _ = env.reset(seed=0, options={"prompt": "ab"})
    ids = [0, 1]
    for t in range(3):
        probabilities = next_tokens(reference, ids, t, law, EOS)
        expected = left_over(probabilities, law)
        k = law.get("top_k", 11)
        assert observation["candidates"].tolist() == expected + [-1] * (k - len(expected))
        assert np.flatnonzero(env.action_masks()).tolist() == sorted(expected)
        share = probabilities[expected] / probabilities[expected].sum()
        np.testing.assert_allclose(np.exp(observation["candidate_logp"][: len(expected)]), share, rtol=1e-5)
        assert (observation["candidate_logp"][len(expected) :] == np.finfo(np.float32).min).all()
        assert observation in env.observation_space and observation["candidate_logp"].dtype == np.float32
        token = next(token for token in expected if token != EOS)
        observation, *_ = env.step(token)
        ids.append(token)


def test_a_truncated_token_is_refused_and_the_state_stays():
    env = make_env(kl_mode="off", top_k=2)
    before, _ = env.reset(seed=0)
    refused = [token for token in range(11) if token not in before["candidates"]]
    assert len(refused) == 9
    for token in refused:
        with pytest.raises(ValueError, match="top_k, top_p.*action_masks"):
            env.step(token)
    after, *_ = env.step(before["candidates"][0])
    assert after["response_mask"].sum() == 1


def test_a_candidate_action_is_a_rank_and_writes_that_candidate():
    token_env, rank_env = make_env(top_k=3), make_env(top_k=3, action="candidate")
    assert (token_env.action_space.n, rank_env.action_space.n) == (11, 3)
    for env in (token_env, rank_env):
        bind_policy(env, random_model(seed=1))
    first, _ = token_env.reset(seed=1, options={"prompt": "ab"})
    second, _ = rank_env.reset(seed=1, options={"prompt": "ab"})
    over, rank = False, 0
    while not over:
        assert all((first[name] == second[name]).all() for name in first)
        rank = (rank + 1) % 3
        token = int(first["candidates"][rank])
        assert action_of(rank_env, second, token) == rank
        first, reward, over, _, info = token_env.step(token)
        second, same, also_over, _, same_info = rank_env.step(rank)
        assert (reward, over, info) == (same, also_over, same_info)


@pytest.mark.parametrize("rank", [-1, 3, 10])
def test_a_rank_outside_of_the_candidates(rank):
    env = make_env(kl_mode="off", top_k=3, action="candidate")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"action {rank} of environment 0 is outside the candidates of 3"):
        env.step(rank)


def test_after_the_end_there_are_no_candidates():
    env = make_env(kl_mode="off", top_k=11, action="candidate")
    observation, _ = env.reset(seed=0)
    observation, _, terminated, *_ = env.step(observation["candidates"].tolist().index(EOS))
    assert terminated
    assert (observation["candidates"] == -1).all() and not env.action_masks().any()
    assert observation in env.observation_space


def test_a_policy_narrower_than_its_reference_still_pays():
    """The reference decides what may be written: a policy that is sure of one token pays −log ref of it."""
    env = make_env(top_p=0.9)
    bind_policy(env, lambda observation, actions: np.zeros(1))
    observation, _ = env.reset(seed=0)
    _, _, _, _, info = env.step(observation["candidates"][0])
    assert info["logp"] == 0.0 > info["ref_logp"]
    assert info["ref_logp"] == pytest.approx(float(observation["candidate_logp"][0]), abs=1e-6)


def test_without_a_push_a_uniform_policy_over_what_is_allowed_is_charged():
    env = make_env(top_k=3)
    observation, _ = env.reset(seed=0)
    with pytest.warns(UserWarning):
        *_, info = env.step(observation["candidates"][1])
    assert info["logp"] == pytest.approx(-np.log(3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 3, "reference": None}, "top_k and top_p leave what is likeliest under the reference: pass one"),
        ({"top_p": 0.5, "reference": None}, "pass one"),
        ({"action": "candidate"}, "action='candidate' needs top_k"),
        ({"action": "candidate", "top_k": 3, "top_p": 0.5}, "and no top_p"),
        ({"action": "candidate", "top_k": 11, "banned_tokens": (8,)}, "top_k=11 candidates, but .* only 10 tokens"),
        ({"action": "candidate", "top_k": 11, "min_new_tokens": 1}, "only 10 tokens"),
        ({"top_k": 12}, "top_k=12 must be 0"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"action": "rank"}, "action must be one of token, candidate"),
    ],
)
def test_what_cannot_be_truncated_is_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make_env(**kwargs)


def test_a_broken_reference_names_no_candidates():
    reference = random_model("llama")
    with torch.no_grad():
        reference.model.get_input_embeddings().weight[3] = torch.nan  # type: ignore[operator]
    envs = make_envs(2, reference=reference, top_k=3, kl_mode="off")
    with pytest.raises(NonFiniteError, match="reference's log-probability of action . in environment 1 is nan"):
        envs.reset(options={"prompt": ["a", "d"]})
    with pytest.raises(NonFiniteError, match="policy or reference's log-probabilities are not finite for prompt 1"):
        collect(random_model(seed=1), envs, ["a", "d"])


# --- references that are sure of themselves ---------------------------------------------------------


def test_top_k_alone_keeps_k_however_small_the_tail():
    """In float32 the likeliest one alone adds up to 1 here: top-p at 1 must not cut what follows."""
    law = SamplingLaw(8, None, top_k=5)
    log_probs = torch.tensor([20.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]).log_softmax(-1)
    assert law.candidates(log_probs).tolist() == [0, 1, 2, 3, 4]
    assert SamplingLaw(8, None, top_k=8).candidates(log_probs).tolist() == list(range(8))
    assert SamplingLaw(8, None, top_k=5, top_p=0.999).candidates(log_probs).tolist() == [0, -1, -1, -1, -1]


@pytest.mark.parametrize("k", [1, 2, 7, 50, 300])
def test_candidates_are_the_first_of_a_stable_sort(k):
    log_probs = torch.randn(4, 6, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1).log_softmax(-1)
    expected = log_probs.argsort(dim=-1, descending=True, stable=True)[..., :k]  # many ties
    assert torch.equal(SamplingLaw(300, None, top_k=k).candidates(log_probs), expected)


def test_a_peaked_reference_offers_its_candidates_to_whoever_asks():
    class Sure(CausalLM):
        def forward(self, *arguments, **named):
            logits, values = super().forward(*arguments, **named)
            return logits * 200, values

    model = random_model()
    sure = Sure(model.model, model.tokenizer).requires_grad_(False)
    check_env(make_env(reference=sure, top_k=3, action="candidate", kl_mode="off"))
