"""Whatever a user does to the environment, in whatever order, the promises hold."""

from __future__ import annotations

import json
import pickle
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rlhf_env.envs.binding import bind_policy, push_logprobs
from rlhf_env.errors import MissingLogProbError, PromptTooLongError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import byte_tokenizer
from tests.builders import letter_score, make_envs, random_model

N = 3
BYTE_PROMPTS = ("é", "日本", "a😀", "\u202e\x1b[2J", "<eos>")
PARTS = {"score", "penalty", "beta", "stop_reason", "prompt_length", "response_length"}


@cache
def byte_model() -> CausalLM:
    tokenizer = byte_tokenizer()
    config = tiny_config("gpt2", len(tokenizer), n_layer=1, n_embd=16, n_head=2, n_positions=32)
    return CausalLM.from_config(config, tokenizer)


def byte_score(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(sum(map(ord, r)) % 97) - len(p) for p, r in zip(prompts, responses, strict=True)]


class Tokens:
    """A process reward with a named part for the whole."""

    def score_tokens(self, prompts, responses):
        return [[0.01 * sum(map(ord, piece)) for piece in r] for r in responses]

    def score(self, prompts, responses):
        return {"length": [0.1 * len(r) for r in responses]}


def log_pi(observation, actions) -> np.ndarray:
    """Some policy's log-probability of each action, [N]: a function of state and action alone."""
    return -0.1 - 0.01 * (observation["input_ids"].sum(-1) % 50) - 0.05 * (np.asarray(actions) % 7)


LAWS: list[dict[str, Any]] = [
    {},
    {"banned_tokens": (8, 10), "min_new_tokens": 2, "temperature": 0.7},
    {"top_k": 4},
    {"top_p": 0.8, "min_new_tokens": 1},
    {"top_k": 3, "action": "candidate"},
    {"reference_backend": "deferred"},
    {"reference_backend": "full", "kl_placement": "terminal"},
    {"kl_mode": "reference", "context_length": 8},
    {"kl_mode": "observe", "group_size": 2},
    {"kl_mode": "off"},
]


class TokenEnvironment(RuleBasedStateMachine):
    """A batch of environments; beside it a plain record of what was done, from which every reward can be replayed."""

    steps = 0  # of all machines

    @initialize(
        law=st.sampled_from(LAWS),
        mode=st.sampled_from(list(AutoresetMode)),
        limit=st.sampled_from(["terminate", "truncate"]),
        stops=st.sampled_from([(), ("ab", "h"), ("😀",)]),
        process=st.booleans(),
        of_bytes=st.booleans(),
        wrapped=st.booleans(),
        seed=st.integers(0, 99),
    )
    def make(self, law, mode, limit, stops, process, of_bytes, wrapped, seed):
        self.kwargs: dict[str, Any] = {
            "length_limit": limit,
            "stop_strings": stops if of_bytes or "😀" not in stops else (),
            "missing_eos_penalty": 0.4,
            "length_penalty": 0.01,
            "max_new_tokens": 5,
            "reward_model": Tokens() if process else byte_score if of_bytes else letter_score,
            **law,
        }
        if of_bytes:
            model = byte_model()
            self.kwargs |= {"prompts": BYTE_PROMPTS, "tokenizer": model.tokenizer, "reference": model}
            self.kwargs.pop("context_length", None)
            self.kwargs.pop("banned_tokens", None)
        else:
            self.kwargs["reference"] = random_model()
        self.env = make_envs(N, autoreset_mode=mode, render_mode="ansi", **self.kwargs)
        self.mode, self.wrapped, self.of_bytes = mode, wrapped, of_bytes
        self.eos = self.env.task.law.eos_token_id
        self.charges = self.env.task.kl_mode in ("reward", "observe")
        self.bound, self.last = False, None
        self.prompt, self.done = [""] * N, [[] for _ in range(N)]  # what was asked, and the actions since
        self.paid, self.beta, self.over = np.zeros(N), np.zeros(N), np.ones(N, dtype=bool)
        self.wrapper = gym.wrappers.vector.RecordEpisodeStatistics(self.env) if wrapped else self.env
        self.begin(self.wrapper.reset(seed=seed), np.ones(N, dtype=bool))

    @property
    def core(self):
        return self.env.core

    def begin(self, returned, rows):
        """Note that new episodes stand in `rows`."""
        observation, infos = returned[0], returned[-1]
        for i in np.flatnonzero(rows).tolist():
            self.prompt[i], self.done[i], self.paid[i], self.beta[i] = self.core.prompts[i], [], 0.0, self.env.beta
            assert infos["beta"][i] == self.env.beta and infos["prompt_length"][i] == self.core.prompt_length[i]
        self.over[rows] = False
        self.look(observation)

    def look(self, observation):
        """Every observation is in its space, of right-padded consistent masks, and belongs to whoever holds it."""
        assert observation in self.env.observation_space
        ids, attention, response = (observation[k] for k in ("input_ids", "attention_mask", "response_mask"))
        assert (np.diff(attention, axis=1) <= 0).all(), "padding at the right"
        assert (response <= attention).all()
        assert (attention.sum(1) == self.core.prompt_length + self.core.written).all()
        assert (response.sum(1) == self.core.written).all()
        assert (ids[attention == 0] == self.env.task.codec.pad_token_id).all()
        if "candidates" in observation:
            named, logp = observation["candidates"], observation["candidate_logp"]
            assert ((named >= 0).any(1) == self.core.active).all()
            shares = np.where(named >= 0, np.exp(np.clip(logp, -100, 0).astype(np.float64)), 0).sum(1)
            np.testing.assert_allclose(shares[self.core.active], 1, atol=1e-5)
        self.last = {name: array.copy() for name, array in observation.items()}
        for array in observation.values():
            array[:] = 0  # what was returned is the caller's

    def finish(self, i, final):
        """An episode is what its decomposition says, and what a replay pays for the same actions."""
        known = {k: v for k, v in final.items() if k[0] != "_" and k != "episode"}  # that is the wrapper's
        facts = {k: v[i] for k, v in known.items() if final[f"_{k}"][i]}
        cut = "score" not in facts
        assert facts.keys() >= (PARTS - {"score", "penalty"} if cut else PARTS)
        assert facts["response_length"] == len(self.done[i]) and facts["beta"] == self.beta[i]
        assert cut == (self.kwargs["length_limit"] == "truncate" and facts["stop_reason"] in ("length", "context"))
        assert all(isinstance(v, str) or np.isfinite(v) for v in facts.values())
        assert ("kl" in facts) == self.charges
        task = self.env.task
        if task.kl_mode != "reference" and not (cut and task.scores_tokens):
            kl = self.beta[i] * facts["kl"] if task.kl_mode == "reward" else 0.0
            assert self.paid[i] == pytest.approx(facts.get("score", 0.0) - kl - facts.get("penalty", 0.0), abs=1e-9)
        assert self.paid[i] == pytest.approx(self.replay(i), abs=1e-4)

    def replay(self, i) -> float:
        """What one fresh environment pays for the actions of environment i."""
        env = make_envs(1, beta=self.beta[i], autoreset_mode=AutoresetMode.DISABLED, **self.kwargs)
        bind_policy(env, log_pi)
        env.reset(options={"prompt": self.prompt[i]})
        total, over = 0.0, False
        for action in self.done[i]:
            assert not over
            _, reward, terminated, truncated, _ = env.step(np.array([action]))
            total, over = total + reward[0], terminated[0] or truncated[0]
        assert over
        return total

    # --- what a user may do ---------------------------------------------------------------------

    @rule(data=st.data(), times=st.integers(1, 12))
    def go_on(self, data, times):
        for _ in range(times):
            self.step(data, ending=data.draw(st.integers(0, 4)) == 0)

    def step(self, data, ending):
        resetting = self.over.copy()
        if self.mode == AutoresetMode.DISABLED and resetting.any():
            return self.reset_by_mask(resetting, None)
        masks = self.core.action_masks()
        actions = np.zeros(N, dtype=np.int64)
        for i in range(N):
            allowed = np.flatnonzero(masks[i])
            if resetting[i]:
                actions[i] = data.draw(st.sampled_from([-1, 0, 10**6]))
            elif ending and self.env.task.action == "token" and masks[i, self.eos]:
                actions[i] = self.eos
            else:
                actions[i] = allowed[data.draw(st.integers(0, len(allowed) - 1))]
        if self.charges and not self.bound:
            logp = log_pi(self.last, np.where(resetting, 0, actions))
            push_logprobs(self.wrapper, np.where(resetting, np.nan, logp), actions)
        self.take(self.wrapper.step(actions), actions, resetting)

    def take(self, returned, actions, resetting):
        observation, reward, terminated, truncated, infos = returned
        TokenEnvironment.steps += int((~resetting).sum())
        assert reward.dtype == np.float64 and terminated.dtype == truncated.dtype == np.bool_
        assert not (terminated & truncated).any() and not reward[resetting].any()
        ended = (terminated | truncated) & ~resetting
        assert (ended == (terminated | truncated)).all()
        for i in np.flatnonzero(~resetting).tolist():
            self.done[i].append(int(actions[i]))
            self.paid[i] += reward[i]
        same_step = self.mode == AutoresetMode.SAME_STEP
        for i in np.flatnonzero(ended).tolist():
            self.finish(i, infos["final_info"] if same_step else infos)
            if same_step:
                last = infos["final_obs"][i]
                assert last["response_mask"].sum() == len(self.done[i])
        self.over = ended
        begun = ended if same_step else resetting
        if begun.any():
            self.begin((observation, infos), begun)
        else:
            self.look(observation)
        reward[:], terminated[:], truncated[:] = 99, True, True
        for name, values in infos.items():
            if isinstance(values, np.ndarray) and values.dtype != object and name not in ("episode", "_episode"):
                values[:] = 0

    @rule(rows=st.lists(st.booleans(), min_size=N, max_size=N).filter(any), given=st.integers(0, 9))
    def reset_some(self, rows, given):
        if not self.wrapped:  # the wrapper's own count of steps knows no masks outside of DISABLED
            prompt = self.some_prompt(given)
            self.reset_by_mask(np.array(rows) | (self.over if self.mode == AutoresetMode.DISABLED else False), prompt)

    def reset_by_mask(self, rows, prompt):
        options = {"reset_mask": rows.copy()} | ({"prompt": [prompt, None, prompt]} if prompt else {})
        self.begin(self.wrapper.reset(options=options), rows)
        if prompt:
            assert all(self.prompt[i] == prompt for i in (0, 2) if rows[i])

    def some_prompt(self, given):
        pool = ("hgf", "a", "bbbbbb") if not self.of_bytes else ("ß", "\x00", "𝕏")
        return pool[given] if given < 3 else None

    @rule(seed=st.none() | st.integers(0, 99))
    def reset_all(self, seed):
        self.begin(self.wrapper.reset(seed=seed), np.ones(N, dtype=bool))
        if seed is not None:
            first = list(self.prompt)
            self.begin(self.wrapper.reset(seed=seed), np.ones(N, dtype=bool))
            assert self.prompt == first

    @rule()
    def bind(self):
        bind_policy(self.wrapper, log_pi)
        self.bound = True

    @rule(value=st.sampled_from([0.0, 0.2, 1.5]))
    def set_beta(self, value):
        self.env.beta = value

    @rule()
    def pickle_it(self):
        self.wrapper = self.env = pickle.loads(pickle.dumps(self.env))
        self.wrapped = False

    @rule()
    def save_and_load(self):
        state = json.loads(json.dumps(self.env.state_dict(), allow_nan=False))
        self.env.load_state_dict(state)
        assert json.loads(json.dumps(self.env.state_dict())) == state

    @rule()
    def render(self):
        shown = self.wrapper.render()
        assert len(shown) == N and all(isinstance(text, str) and "\x1b[2J" not in text for text in shown)

    # --- what a user may not do, and what must not change when they try -------------------------------

    @precondition(lambda self: not self.over.any())
    @rule(which=st.integers(0, N - 1), wrong=st.sampled_from(["low", "high", "forbidden", "float", "shape"]))
    def act_against_the_law(self, which, wrong):
        masks = self.core.action_masks()
        actions = masks.argmax(1)
        forbidden = np.flatnonzero(~masks[which])
        if wrong == "forbidden" and not len(forbidden):
            return
        actions[which] = {"low": -1, "high": masks.shape[1], "forbidden": forbidden[:1].sum()}.get(wrong, 0)
        given = {"float": actions.astype(float), "shape": actions[:-1]}.get(wrong, actions)
        self.refused(ValueError, lambda: self.env.step(given))

    @precondition(lambda self: self.mode == AutoresetMode.DISABLED and self.over.any())
    @rule()
    def step_what_is_over(self):
        self.refused(RuntimeError, lambda: self.env.step(self.core.action_masks().argmax(1)))

    @precondition(lambda self: self.charges and not self.bound and not self.over.any())
    @rule(stale=st.booleans())
    def step_without_a_push(self, stale):
        actions = self.core.action_masks().argmax(1)
        self.core.log_pi.expect_push()
        if stale:
            self.env.push_logprobs(np.full(N, -1.0), actions + 1)
        self.refused(MissingLogProbError, lambda: self.env.step(actions))

    @rule(rows=st.lists(st.booleans(), min_size=N, max_size=N).filter(any))
    def ask_too_much(self, rows):
        active = self.core.active.copy()
        with pytest.raises(PromptTooLongError):
            self.env.reset(options={"prompt": "a" * 40, "reset_mask": np.array(rows)})
        assert (self.core.active == active).all()

    def refused(self, error, act):
        before = {name: array.copy() for name, array in self.core.observation().items()}
        kept = self.core.written.copy(), self.core.reward.copy(), self.core.active.copy()
        with pytest.raises(error):
            act()
        after = self.core.observation()
        assert all((before[name] == after[name]).all() for name in before)
        now = (self.core.written, self.core.reward, self.core.active)
        assert all((a == b).all() for a, b in zip(kept, now, strict=True))

    @invariant()
    def what_was_returned_is_nobodys_state(self):
        if self.last is not None:
            observation = self.core.observation()
            assert all((observation[name] == self.last[name]).all() for name in self.last)
            assert (self.core.episode_beta[~self.over] == self.beta[~self.over]).all()


def explore(machines: int, length: int) -> int:
    TokenEnvironment.steps = 0
    run_state_machine_as_test(
        TokenEnvironment,
        settings=settings(
            max_examples=machines,
            stateful_step_count=length,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return TokenEnvironment.steps


def test_some_hundred_steps_break_no_promise():
    assert explore(machines=16, length=40) > 300


@pytest.mark.slow
def test_ten_thousand_steps_break_no_promise():
    assert explore(machines=360, length=50) > 10_000
