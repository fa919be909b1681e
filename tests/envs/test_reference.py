"""The reference's back-ends: with a cache, without, and one pass per finished response. All say the same."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import ConfigError, NonFiniteError, PromptTooLongError
from rlhf_env.models.decoding import BlockDecoder, CachedDecoder, FullContextDecoder
from rlhf_env.types import SamplingLaw
from tests.builders import EOS, make_env, make_envs, random_model
from tests.envs.playing import play


class Plain:
    """A reference of a user's own: one decoder, no back-ends."""

    def __init__(self, model) -> None:
        self.model, self.tokenizer = model, model.tokenizer

    def decoder(self, num_rows: int, law: SamplingLaw):
        return self.model.decoder(num_rows, law)

    def evaluate(self, rollout):
        return self.model.evaluate(rollout)

    def parameters(self):
        return iter(())


def episodes(steps: int = 18, **kwargs: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Rewards [steps, 3], and the last infos of all episodes that ended, with what each was paid in all (`return`)."""
    envs = make_envs(3, reference=random_model(dtype="float64"), missing_eos_penalty=0.4, max_new_tokens=4, **kwargs)
    bind_policy(envs, lambda observation, actions: -0.1 - 0.01 * observation["input_ids"].sum(1) - 0.2 * actions)
    envs.reset(seed=5)
    rng, rewards, ended, total = np.random.default_rng(0), [], [], np.zeros(3)
    for _ in range(steps):
        _, reward, _, _, infos = envs.step(rng.choice([1, 2, 3, EOS], 3))
        rewards.append(reward)
        total += reward
        final = infos.get("final_info", {})
        for i in np.flatnonzero(infos.get("_final_info", ())).tolist():
            known = {k: v[i] for k, v in final.items() if k[0] != "_" and final[f"_{k}"][i]}
            ended.append(known | {"return": total[i]})
            total[i] = 0.0
    return np.array(rewards), ended


@pytest.mark.parametrize("placement", ["token", "terminal"])
def test_with_and_without_a_cache_every_token_is_charged_the_same(placement):
    cached, ours = episodes(reference_backend="cached", kl_placement=placement)
    full, theirs = episodes(reference_backend="full", kl_placement=placement)
    np.testing.assert_allclose(cached, full, atol=1e-10)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] if k == "stop_reason" else a[k] == pytest.approx(b[k], abs=1e-10) for k in a)


@pytest.mark.parametrize(
    ("placement", "limit", "kl_mode"),
    list(itertools.product(["token", "terminal"], ["terminate", "truncate"], ["reward", "observe"])),
)
def test_deferred_an_episode_is_worth_the_same(placement, limit, kl_mode):
    kwargs = {"kl_placement": placement, "length_limit": limit, "kl_mode": kl_mode}
    at_once, ours = episodes(reference_backend="auto", **kwargs)
    later, theirs = episodes(reference_backend="deferred", **kwargs)
    assert len(ours) == len(theirs) > 8
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() - b.keys() == {"ref_logp"}, "of the last token, which nobody asked about on its own"
        for name in ("return", "kl", "kl_k2", "kl_k3", "score", "penalty"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-10)
    if placement == "terminal":
        np.testing.assert_allclose(at_once, later, atol=1e-10)


def test_deferred_the_lump_is_what_the_last_token_was_charged_for_all():
    """Whoever wants per-token charges adds the lump back and spreads it: `lump` and `step_beta` say what it was."""
    policy = random_model(dtype="float64", seed=1)
    reference = random_model(dtype="float64")
    at_once, later = (make_env(reference=reference, reference_backend=b) for b in ("auto", "deferred"))
    for env in (at_once, later):
        bind_policy(env, policy)
    rewards, infos = play(at_once, [4, 2, EOS])
    env = later
    env.reset(seed=0, options={"prompt": "ab"})
    for token in (4, 2):
        _, reward, *_ = env.step(token)
        assert reward == 0.0 and env.core.lump[0] == 0.0 and env.core.step_beta[0] == 0.3
    env.beta = 7.0
    _, reward, _, _, info = env.step(EOS)
    assert env.core.step_beta[0] == 0.3
    assert env.core.lump[0] == pytest.approx(0.3 * info["kl"], abs=1e-12) and abs(env.core.lump[0]) > 0.01
    assert reward + env.core.lump[0] == pytest.approx(info["score"], abs=1e-12)
    charged = [0.3 * (i["logp"] - i["ref_logp"]) for i in infos]
    assert sum(charged) == pytest.approx(env.core.lump[0], abs=1e-10)
    np.testing.assert_allclose(env.core.ref_logp[0, :3], [i["ref_logp"] for i in infos], atol=1e-10)
    assert sum(rewards) == pytest.approx(reward, abs=1e-10)


def test_terminal_placement_and_immediate_references_have_no_lump():
    for kwargs in ({"kl_placement": "terminal", "reference_backend": "deferred"}, {"kl_placement": "terminal"}, {}):
        env = make_env(**kwargs)
        bind_policy(env, random_model(seed=1))
        play(env, [4, EOS])
        assert env.core.lump[0] == 0.0


def test_step_beta_is_of_the_episode_that_was_stepped_not_of_the_next():
    envs = make_envs(2, autoreset_mode=AutoresetMode.SAME_STEP)
    bind_policy(envs, lambda observation, actions: np.zeros(2))
    envs.reset(seed=0)
    envs.beta = 0.9
    envs.step(np.array([EOS, 1]))
    assert envs.core.step_beta.tolist() == [0.3, 0.3]
    envs.step(np.array([1, 1]))
    assert envs.core.step_beta.tolist() == [0.9, 0.3]


def test_deferred_nobody_asks_the_reference_before_the_end():
    reference, passes = random_model(), []
    reference.model.register_forward_pre_hook(lambda *_: passes.append(1))
    envs = make_envs(3, reference=reference, reference_backend="deferred")
    bind_policy(envs, lambda observation, actions: np.zeros(3))
    envs.reset(seed=0)
    envs.step(np.array([1, 2, 3]))
    assert passes == []
    envs.step(np.array([EOS, EOS, 3]))
    assert passes == [1], "one pass for all that ended"


def test_each_backend_is_the_decoder_it_is_called():
    for backend, kind in (("cached", CachedDecoder), ("full", FullContextDecoder), ("auto", BlockDecoder)):
        env = make_env(reference_backend=backend, kl_mode="observe")
        env.reset(seed=0)
        assert isinstance(env.core._decoder, kind)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reference_backend": "deferred", "top_k": 3}, "top_k and top_p need the reference at every token"),
        ({"reference_backend": "deferred", "top_p": 0.5}, "reference_backend cannot be 'deferred'"),
        ({"reference_backend": "deferred", "kl_mode": "reference"}, "reference_backend another than 'deferred'"),
        ({"reference_backend": "fast"}, "reference_backend must be one of auto, cached, full, deferred"),
        ({"reference_backend": "full", "reference": "plain"}, "Plain has one decoder of its own.*at 'auto'"),
        ({"reference_backend": "cached", "reference": "plain"}, "Plain has one decoder of its own"),
    ],
)
def test_backends_that_cannot_be(kwargs, message):
    if kwargs.get("reference") == "plain":
        kwargs = kwargs | {"reference": Plain(random_model())}
    with pytest.raises(ConfigError, match=message):
        make_env(**kwargs)


@pytest.mark.parametrize("backend", ["auto", "deferred"])
def test_a_reference_of_a_users_own_needs_no_backends(backend):
    rewards = []
    for reference in (random_model(), Plain(random_model())):
        env = make_env(reference=reference, reference_backend=backend)
        bind_policy(env, random_model(seed=1))
        rewards.append(play(env, [1, 2, EOS])[0])
    assert rewards[0] == rewards[1]


def test_deferred_a_broken_reference_names_the_environment():
    reference = random_model("llama")  # whose embedding is not its head too, so that only rows with a "d" break
    with torch.no_grad():
        reference.model.get_input_embeddings().weight[3] = torch.nan  # type: ignore[operator]
    envs = make_envs(3, reference=reference, reference_backend="deferred")
    bind_policy(envs, lambda observation, actions: np.zeros(3))
    envs.reset(options={"prompt": ["a", "b", "c"]})
    envs.step(np.array([1, 1, 3]))
    with pytest.raises(NonFiniteError, match="reference's log-probability of action . in environment 2 is nan"):
        envs.step(np.array([EOS, 1, EOS]))


# --- the context ------------------------------------------------------------------------------------


def test_a_response_ends_where_the_context_does():
    """Prompts of 3, 1, 6 and 2 letters in a context of 7: room for 4, 6, 1 and 5 tokens."""
    env = make_env(kl_mode="off", context_length=7, missing_eos_penalty=0.5, max_new_tokens=5)
    assert env.observation_space["input_ids"].shape == (7,)
    for prompt, room, reason in (
        ("abc", 4, "context"),
        ("d", 5, "length"),
        ("efghab", 1, "context"),
        ("ca", 5, "length"),
    ):
        _, infos = play(env, [1] * room, prompt)
        assert (infos[-1]["stop_reason"], infos[-1]["penalty"]) == (reason, 0.5)
    _, infos = play(env, [EOS], "efghab")
    assert (infos[-1]["stop_reason"], infos[-1]["penalty"]) == ("eos", 0.0)


def test_with_a_context_long_prompts_need_not_leave_room_for_the_longest_response():
    kwargs = {"prompts": ["a" * 60, "b"], "max_new_tokens": 48}
    with pytest.raises(PromptTooLongError, match="together exceed the model's context of 64.*context_length=64"):
        make_env(**kwargs)
    env = make_env(**kwargs, context_length=64)
    bind_policy(env, random_model(seed=1))
    _, infos = play(env, [1, 2, 3, 4], "a" * 60)
    assert infos[-1]["stop_reason"] == "context"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"context_length": 65}, ConfigError, "context_length=65 is more than the model's context of 64"),
        ({"context_length": 6}, PromptTooLongError, "prompt 2 has 6 tokens, which leaves a response no room"),
        ({"context_length": 5}, PromptTooLongError, "prompt 2 has 6 tokens"),
    ],
)
def test_contexts_that_cannot_be(kwargs, error, message):
    with pytest.raises(error, match=message):
        make_env(**kwargs)


def test_a_given_prompt_must_leave_room_too():
    env = make_env(kl_mode="off", context_length=7, prompts=["a"], max_prompt_tokens=7)
    with pytest.raises(PromptTooLongError, match=r"options\['prompt'\] has 7 tokens, which leaves a response no room"):
        env.reset(options={"prompt": "abcabca"})


def test_cut_by_the_context_is_cut():
    env = make_env(kl_mode="off", context_length=4, prompts=["ab"], length_limit="truncate", missing_eos_penalty=1.0)
    rewards, infos = play(env, [1, 1])
    assert infos[-1]["stop_reason"] == "context" and "score" not in infos[-1] and not any(rewards)
