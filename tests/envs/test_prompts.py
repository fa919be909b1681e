"""Which prompts an environment is asked: seeds, groups, files, functions, the two sides of a split, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tokenizers.processors import TemplateProcessing

from rlhf_env.errors import ConfigError, DataError, PromptTooLongError
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.training.collect import collect
from tests.builders import ALPHABET, EOS, PROMPTS, make_env, make_envs, random_model

MANY = tuple(a + b for a in ALPHABET for b in ALPHABET)


def asked(env, episodes: int, seed: int | None = None) -> list[str]:
    """The prompts of so many episodes, the first of them after reset(seed)."""
    found = []
    for episode in range(episodes):
        env.reset(seed=seed if episode == 0 else None)
        found.append(env.core.prompts[0])
    return found


def asked_of_many(envs, steps: int, **reset: Any) -> list[list[str]]:
    """Every environment's prompts where each step ends each episode."""
    envs.reset(**reset)
    found = [list(envs.core.prompts)]
    for _ in range(steps):
        envs.step(np.full(envs.num_envs, EOS))
        found.append(list(envs.core.prompts))
    return found


def made_up(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(ALPHABET), rng.integers(1, 5)))


# --- sources ----------------------------------------------------------------------------------------


def test_a_file_a_data_set_and_a_list_are_the_same_prompts(tmp_path):
    lines, rows, folder = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "d"
    lines.write_text("".join(f"{p}\n" for p in PROMPTS))
    rows.write_text("".join(json.dumps({"prompt": p, "n": 1}) + "\n" for p in PROMPTS))
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": list(PROMPTS)}).save_to_disk(folder)
    expected = asked(make_env(kl_mode="off"), 12, seed=3)
    for source in (lines, str(lines), rows, str(rows), f"hf:{folder}", list(PROMPTS)):
        assert asked(make_env(kl_mode="off", prompts=source), 12, seed=3) == expected


def test_a_broken_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2"):
        make_env(prompts=file)
    file.write_text('{"prompt": "a"}\n{"prompt": "' + "a" * 60 + '"}\n')
    with pytest.raises(PromptTooLongError, match=r"p\.jsonl: prompt 1 has 60 tokens.*context of 64"):
        make_env(prompts=file)


def test_a_function_draws_with_the_environments_generator():
    env = make_env(kl_mode="off", prompts=made_up, max_prompt_tokens=4)
    first = asked(env, 20, seed=5)
    assert asked(env, 20, seed=5) == first != asked(env, 20, seed=6)
    assert len(set(first)) > 10
    assert env.observation_space["input_ids"].shape == (10,)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda rng: "abcde",
            PromptTooLongError,
            "the prompts function returned has 5 tokens, but max_prompt_tokens is 4",
        ),
        (lambda rng: 3, ConfigError, "the prompts function returned must be a text, got int"),
        (lambda rng: "", ValueError, "the prompts function returned"),
    ],
)
def test_what_a_function_returns_is_checked(function, error, message):
    env = make_env(kl_mode="off", prompts=function, max_prompt_tokens=4)
    with pytest.raises(error, match=message):
        env.reset(seed=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": made_up}, "need max_prompt_tokens"),
        ({"prompts": made_up, "max_prompt_tokens": 4, "split": "train"}, "what a function makes has no sides"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"split": "test"}, "split must be one of all, train, eval"),
        ({"split": "eval", "eval_share": 1.0}, "share of a split must be between 0 and 1"),
        ({"prompts": ["a"], "split": "eval", "eval_share": 1e-9}, "none of the 1 prompts falls on the eval side"),
        ({"prompts": ["a", 3], "split": "eval"}, "prompt 1 must be a text"),
    ],
)
def test_prompts_that_cannot_be(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make_env(**kwargs)


# --- seeds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [MANY, made_up], ids=["list", "function"])
def test_environment_i_of_a_batch_is_asked_what_a_single_one_with_seed_plus_i_is(prompts):
    kwargs = {"kl_mode": "off", "prompts": prompts, "max_prompt_tokens": 4}
    batch = asked_of_many(make_envs(3, **kwargs), 9, seed=7)
    singles = [asked(make_env(**kwargs), 10, seed=7 + i) for i in range(3)]
    assert [list(row) for row in zip(*batch, strict=True)] == singles
    assert len(set(map(tuple, singles))) == 3
    assert asked_of_many(make_envs(3, **kwargs), 9, seed=[9, 8, 7])[0][2] == singles[0][0]


def test_a_seed_of_none_leaves_that_environment_going():
    envs = make_envs(2, kl_mode="off", prompts=MANY)
    whole = asked_of_many(envs, 6, seed=1)
    envs.reset(seed=1)
    envs.step(np.full(2, EOS))
    envs.reset(seed=[1, None])
    assert envs.core.prompts == [whole[0][0], whole[2][1]]


def test_a_prompt_given_by_hand_uses_up_none_of_the_environments_own():
    env = make_env(kl_mode="off", prompts=MANY, max_prompt_tokens=4)
    expected = asked(env, 4, seed=2)
    env.reset(seed=2)
    for prompt in expected[1:]:
        env.reset(options={"prompt": "hhhh"})
        assert env.core.prompts == ["hhhh"]
        env.reset()
        assert env.core.prompts == [prompt]


# --- groups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [MANY, made_up], ids=["list", "function"])
def test_k_episodes_in_a_row_share_a_prompt(prompts):
    kwargs = {"kl_mode": "off", "prompts": prompts, "max_prompt_tokens": 4}
    once, thrice = (asked(make_env(**kwargs, group_size=k), 4 * k, seed=3) for k in (1, 3))
    assert thrice == [prompt for prompt in once for _ in range(3)]


def test_seeding_within_a_group_begins_a_new_one_and_a_plain_reset_does_not():
    env = make_env(kl_mode="off", prompts=MANY, group_size=3)
    first = asked(env, 6, seed=3)
    env.reset(seed=8)  # of another prompt
    assert asked(env, 6, seed=3) == first
    env.reset(seed=3)
    assert asked(env, 5) == first[1:]
    envs = make_envs(2, kl_mode="off", prompts=MANY, group_size=3)
    every = asked_of_many(envs, 5, seed=3)
    envs.reset(seed=[8, 4])
    assert envs.core.prompts[0] != every[0][0]
    envs.reset(seed=[3, None])
    assert envs.core.prompts == every[0]
    envs.step(np.full(2, EOS))
    envs.step(np.full(2, EOS))
    assert envs.core.prompts == [every[2][0], every[3][1]]


def test_a_given_prompt_is_no_part_of_a_group():
    env = make_env(kl_mode="off", prompts=MANY, group_size=2)
    first = asked(env, 4, seed=3)
    env.reset(seed=3)
    env.reset(options={"prompt": "d"})
    assert asked(env, 3) == first[1:]


def test_the_group_of_an_environment_that_resets_late_or_by_a_mask_goes_on():
    kwargs = {"kl_mode": "off", "prompts": MANY, "group_size": 2}
    expected = asked_of_many(make_envs(2, **kwargs), 5, seed=4)
    later = make_envs(2, **kwargs, autoreset_mode=AutoresetMode.NEXT_STEP)
    later.reset(seed=4)
    for row in expected:
        assert later.core.prompts == row
        later.step(np.full(2, EOS))
        later.step(np.full(2, 99))  # only resets
    by_hand = make_envs(2, **kwargs, autoreset_mode=AutoresetMode.DISABLED)
    by_hand.reset(seed=4)
    for i in range(1, 4):
        by_hand.reset(options={"reset_mask": np.array([True, False])})
        assert by_hand.core.prompts == [expected[i][0], expected[0][1]]


@pytest.mark.parametrize("prompts", [MANY, made_up], ids=["list", "function"])
def test_collected_rows_share_prompts_in_groups(prompts):
    kwargs = {"prompts": prompts, "max_prompt_tokens": 4}
    envs, policy = make_envs(4, **kwargs, group_size=3), random_model(seed=1)

    def texts(episodes: int, start: int = 0, group: int = 3) -> list[str]:
        envs_ = envs if group == 3 else make_envs(4, **kwargs)
        rollout = collect(policy, envs_, episodes=episodes, seed=9, start=start)
        rows = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        return [envs.task.codec.decode(ids[mask].tolist()) for ids, mask in rows]

    whole = texts(15)
    assert whole == [prompt for prompt in texts(5, group=1) for _ in range(3)]
    for start, episodes in ((3, 6), (6, 9), (12, 3)):
        assert texts(episodes, start) == whole[start : start + episodes]
    for start, episodes in ((1, 3), (3, 4)):
        with pytest.raises(ConfigError, match=f"{episodes} episodes from position {start} cut groups of 3 apart"):
            texts(episodes, start)
    several, _ = envs.task.prompts_at(9, 1, 11, 3)  # the sequence itself may be entered anywhere
    assert several == whole[1:12]


def test_an_epoch_of_groups_meets_every_prompt_k_times():
    task = make_envs(1, prompts=list("abcde"), group_size=4).task
    prompts, ids = task.prompts_at(0, 0, 20, 4)
    assert sorted(prompts) == sorted("abcde" * 4)
    assert [task.codec.decode(row) for row in ids] == prompts


# --- the two sides ----------------------------------------------------------------------------------


def test_train_and_eval_share_no_prompt_and_leave_none_out():
    sides = {side: make_env(kl_mode="off", prompts=MANY, split=side, eval_share=0.3).task for side in ("train", "eval")}
    train, held_out = (set(sides[side].prompts) for side in ("train", "eval"))
    assert not train & held_out and train | held_out == set(MANY)
    assert 8 <= len(held_out) <= 32  # of 64, 19 expected
    fewer = make_env(kl_mode="off", prompts=MANY[::-2], split="eval", eval_share=0.3).task.prompts
    assert set(fewer) == held_out & set(MANY[::-2])
    assert set(asked(make_env(kl_mode="off", prompts=MANY, split="eval", eval_share=0.3), 200, seed=0)) == held_out


# --- resuming ---------------------------------------------------------------------------------------


def saved(env) -> dict[str, Any]:
    return json.loads(json.dumps(env.state_dict(), allow_nan=False))


@pytest.mark.parametrize("prompts", [MANY, made_up], ids=["list", "function"])
@pytest.mark.parametrize("before", [0, 1, 2, 3, 7])
def test_an_interrupted_environment_is_asked_the_same(prompts, before):
    kwargs = {"kl_mode": "off", "prompts": prompts, "max_prompt_tokens": 4, "group_size": 3}
    one, other = make_env(**kwargs), make_env(**kwargs)
    one.reset(seed=1)
    asked(one, before)
    other.load_state_dict(saved(one))
    assert asked(one, 8) == asked(other, 8)
    many, others = make_envs(3, **kwargs), make_envs(3, **kwargs)
    asked_of_many(many, before, seed=1)
    others.load_state_dict(saved(many))
    assert asked_of_many(many, 8) == asked_of_many(others, 8)


def test_taking_a_state_changes_nothing():
    env = make_env(kl_mode="off", prompts=MANY)
    env.reset(seed=1)
    state = saved(env)
    assert saved(env) == state
    first = asked(env, 5)
    assert saved(env) != state
    env.load_state_dict(state)
    assert asked(env, 5) == first


def test_an_empty_prompt_that_begins_with_bos_resumes():
    tokenizer = char_tokenizer(ALPHABET)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 8)])
    kwargs = {"kl_mode": "off", "prompts": ["", "a"], "tokenizer": tokenizer, "group_size": 50}
    one, other = make_env(**kwargs), make_env(**kwargs)
    seed = next(seed for seed in range(20) if asked(one, 1, seed)[0] == "")
    one.reset(seed=seed)
    other.load_state_dict(saved(one))
    assert other.reset()[1]["prompt_length"] == one.reset()[1]["prompt_length"] == 1


@pytest.mark.parametrize(("make", "here"), [(make_env, 1), (lambda **kw: make_envs(2, **kw), 2)])
def test_a_state_of_another_number_of_environments_is_refused(make: Callable[..., Any], here):
    with pytest.raises(ValueError, match=f"the state is of 3 environments, and here (is|are) {here}"):
        make(kl_mode="off").load_state_dict(make_envs(3, kl_mode="off").state_dict())


def test_seeded_synchronous_environments_resume_one_by_one():
    sync, again = (
        SyncVectorEnv([lambda: make_env(kl_mode="off", prompts=MANY)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
        for _ in range(2)
    )
    sync.reset(seed=3)
    for one, other in zip(sync.envs, again.envs, strict=True):
        other.unwrapped.load_state_dict(saved(one.unwrapped))
    assert (sync.reset()[0]["input_ids"] == again.reset()[0]["input_ids"]).all()
