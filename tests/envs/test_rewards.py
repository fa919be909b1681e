"""Asking reward models: scores, named parts, ids, process rewards and penalties; and refusing improper answers."""

import functools
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st

from rlhf_env.envs.binding import bind_policy
from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.text.tokenizers import byte_tokenizer, char_tokenizer
from rlhf_env.training.collect import collect
from tests.builders import ALPHABET, EOS, make_env, make_envs, random_model
from tests.envs.playing import play

PROMPTS, RESPONSES = ["p", "q", "r"], ["one", "tw\x1bo", "three"]


def returning(answer):
    return lambda prompts, responses: answer


class ByLength:
    def score(self, prompts, responses):
        return np.array([len(p + r) for p, r in zip(prompts, responses, strict=True)])


def test_a_reward_model_or_a_callable_is_asked():
    for reward in (ByLength(), ByLength().score, functools.partial(ByLength().score)):
        scores = scores_of(reward, PROMPTS, RESPONSES)
        assert scores.dtype == np.float64
        np.testing.assert_array_equal(scores, [4, 5, 6])


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.5, -3],
        (1.0, 2.5, -3.0),
        np.array([1, 2.5, -3], dtype=np.float32),
        torch.tensor([1, 2.5, -3], requires_grad=True),
        torch.tensor([1, 2.5, -3], dtype=torch.bfloat16),
    ],
)
def test_tensors_arrays_and_lists_become_float64(answer):
    np.testing.assert_array_equal(scores_of(returning(answer), PROMPTS, RESPONSES), [1.0, 2.5, -3.0])


def test_integers_and_truth_values_count_as_numbers():
    np.testing.assert_array_equal(scores_of(returning(torch.tensor([1, 2, 3])), PROMPTS, RESPONSES), [1, 2, 3])
    np.testing.assert_array_equal(scores_of(returning([True, False, True]), PROMPTS, RESPONSES), [1, 0, 1])


def test_the_caller_keeps_its_own_copy():
    answer = np.zeros(3)
    scores_of(returning(answer), PROMPTS, RESPONSES)[0] = 5
    assert answer[0] == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], r"shape \[2\] for 3 responses"),
        (np.zeros((3, 1)), r"shape \[3, 1\] for 3 responses"),
        (1.0, r"shape \[\] for 3 responses"),
        (None, "NoneType of dtype object"),
        (["1", "2", "3"], "list of dtype <U1"),
        ([1.0, None, 2.0], "dtype object"),
        ([1.0, [2.0], 3.0], "no array of numbers"),
        ([1j, 2j, 3j], "complex"),
    ],
)
def test_a_wrong_answer_is_described(answer, message):
    with pytest.raises(RewardError, match=message):
        scores_of(returning(answer), PROMPTS, RESPONSES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_and_shown(bad):
    with pytest.raises(RewardError) as error:
        scores_of(returning([1.0, bad, bad]), PROMPTS, RESPONSES)
    assert f"2 of 3 scores that are not finite; the first is {bad} in row 1" in str(error.value)
    assert '"tw‹U+001B›o"' in str(error.value)


def test_the_reward_model_is_named():
    class Broken:
        def score(self, prompts, responses):
            return []

    with pytest.raises(RewardError, match=r"test_rewards\.test_the_reward_model_is_named\.<locals>\.Broken returned"):
        scores_of(Broken(), PROMPTS, RESPONSES)
    with pytest.raises(RewardError, match=r"builtins\.int is no reward model"):
        scores_of(3, PROMPTS, RESPONSES)


# --- named components -------------------------------------------------------------------------------


def in_parts(prompts, responses):
    return {"length": [len(r) for r in responses], "prompt": torch.tensor([0.5 * len(p) for p in prompts])}


def test_a_mapping_is_added_up():
    np.testing.assert_array_equal(scores_of(in_parts, PROMPTS, RESPONSES), [3.5, 4.5, 5.5])


def test_the_parts_of_a_score_stand_in_the_last_info():
    env = make_env(kl_mode="off", reward_model=in_parts, missing_eos_penalty=0.25, max_new_tokens=3)
    rewards, infos = play(env, [1, 2, 3], prompt="ab")
    assert not any(name.startswith("score") for info in infos[:-1] for name in info)
    last = infos[-1]
    assert (last["score_length"], last["score_prompt"], last["score"]) == (3.0, 1.0, 4.0)
    assert rewards == [0.0, 0.0, 3.75]
    assert type(last["score_length"]) is float
    envs = make_envs(2, kl_mode="off", reward_model=in_parts)
    envs.reset(options={"prompt": ["ab", "c"]})
    envs.step(np.array([1, 1]))
    *_, infos = envs.step(np.array([EOS, 1]))
    final = infos["final_info"]
    assert final["score_length"].tolist() == [1.0, 0.0] and final["_score_length"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            {"good": [1.0, 2.0, 3.0], "bad": [0.0, np.nan, 0.0]},
            "part 'bad', returned 1 of 3 .* the first is nan in row 1",
        ),
        ({"good": [1.0, 2.0, 3.0], "bad": [0.0]}, r"part 'bad', returned scores of shape \[1\] for 3 responses"),
        ({}, "a mapping without any score"),
    ],
)
def test_a_broken_part_is_named(answer, message):
    with pytest.raises(RewardError, match=message):
        scores_of(returning(answer), PROMPTS, RESPONSES)


# --- how often and about what it is asked -----------------------------------------------------------


def test_it_is_asked_once_per_step_about_all_that_finished():
    asked = []

    def reward(prompts, responses):
        asked.append(list(zip(prompts, responses, strict=True)))
        return [0.0] * len(prompts)

    envs = make_envs(3, kl_mode="off", reward_model=reward)
    envs.reset(options={"prompt": ["ab", "c", "d"]})
    envs.step(np.array([0, 1, 2]))
    assert asked == []
    envs.step(np.array([EOS, 3, EOS]))
    assert asked == [[("ab", "a"), ("d", "c")]]
    envs.reset(options={"prompt": ["ab", "c", "d"]})
    envs.step(np.array([4, EOS, 4]))
    assert asked[1:] == [[("c", "")]]


class ById:
    """Scores ids where it shares the vocabulary, and text otherwise; says which it did."""

    def __init__(self, tokenizer=None):
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def score_ids(self, prompt_ids, response_ids):
        assert all(isinstance(token, int) for row in response_ids for token in row)
        return [1000 * len(p) + sum(r) for p, r in zip(prompt_ids, response_ids, strict=True)]

    def score(self, prompts, responses):
        return [-1.0] * len(prompts)


@pytest.mark.parametrize(
    ("model", "score"),
    [
        (ById(), 2000 + 1 + 2 + EOS),  # nothing said: the ids are the environment's
        (ById(char_tokenizer(ALPHABET)), 2000 + 1 + 2 + EOS),  # another object, the same vocabulary
        (ById(char_tokenizer(ALPHABET[::-1])), -1.0),
    ],
)
def test_ids_are_scored_only_where_they_mean_the_same_text(model, score):
    _, infos = play(make_env(kl_mode="off", reward_model=model), [1, 2, EOS])
    assert infos[-1]["score"] == score
    rollout = collect(random_model(), make_envs(2, kl_mode="off", reward_model=model), ["ab"] * 3)
    ids = [r[m].sum().item() for r, m in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    assert rollout.score.tolist() == ([2000 + total for total in ids] if score > 0 else [-1.0] * 3)


# --- process rewards --------------------------------------------------------------------------------


class OfPrefix:
    """Every token is worth what the text up to it, the prompt included, hashes to; counts its calls."""

    calls = 0

    def score_tokens(self, prompts, responses):
        self.calls += 1
        return [
            [zlib.crc32((p + "".join(r[: t + 1])).encode()) % 1000 / 100 for t in range(len(r))]
            for p, r in zip(prompts, responses, strict=True)
        ]


class Both(OfPrefix):
    def score(self, prompts, responses):
        return {"length": [len(r) for r in responses], "constant": [0.5] * len(responses)}


def worth(text: str) -> float:
    return zlib.crc32(text.encode()) % 1000 / 100


def test_every_token_is_paid_when_it_is_written():
    env = make_env(kl_mode="off", reward_model=OfPrefix())
    rewards, infos = play(env, [1, 2, EOS])
    expected = [worth("abb"), worth("abbc"), worth("abbc<eos>")]
    assert [info["token_score"] for info in infos] == expected
    assert rewards == pytest.approx(expected, abs=1e-12)
    assert infos[-1]["score"] == pytest.approx(sum(expected)), "a model of tokens alone: the score is their sum"


def test_token_scores_and_the_score_of_the_whole_add_up():
    env = make_env(reward_model=Both(), missing_eos_penalty=0.7, length_penalty=0.1, max_new_tokens=2)
    bind_policy(env, random_model(seed=1))
    rewards, infos = play(env, [1, 2])
    last, tokens = infos[-1], worth("abb") + worth("abbc")
    assert (last["score_length"], last["score_constant"]) == (2.0, 0.5)
    assert last["score"] == pytest.approx(tokens + 2.5)
    assert last["penalty"] == pytest.approx(0.7 + 2 * 0.1)
    assert sum(rewards) == pytest.approx(last["score"] - 0.3 * last["kl"] - last["penalty"], abs=1e-9)
    first_kl = infos[0]["logp"] - infos[0]["ref_logp"]
    assert rewards[0] == pytest.approx(worth("abb") - 0.3 * first_kl, abs=1e-12)


def test_a_cut_response_keeps_what_its_tokens_were_paid():
    env = make_env(kl_mode="off", reward_model=Both(), length_limit="truncate", max_new_tokens=2)
    rewards, infos = play(env, [1, 2])
    assert rewards == [worth("abb"), worth("abbc")]
    assert "score" not in infos[-1] and infos[-1]["token_score"] == worth("abbc")


def test_it_is_asked_once_per_step_about_all_that_are_written():
    model = OfPrefix()
    envs = make_envs(3, kl_mode="off", reward_model=model, autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    envs.step(np.array([EOS, 1, 1]))
    *_, infos = envs.step(np.array([1, EOS, EOS]))
    assert infos["_token_score"].tolist() == [False, True, True]
    assert model.calls == 2
    envs.step(np.array([1, 1, 1]))
    assert model.calls == 3


@pytest.mark.parametrize(
    "tokens",
    [
        list("é😀a".encode()),  # 2, 4 and 1 bytes
        [*"a😀".encode()[:3], 257],  # cut short by EOS
        [0x61, *"😀".encode()[:2]],  # cut short by the limit
        [0xFF, 0x61, 0xC3, 257],  # never valid
        [*"\ufffd".encode(), 0x62, 257],  # the replacement character itself
    ],
    ids=["whole", "eos", "limit", "invalid", "replacement"],
)
def test_half_a_character_is_worth_the_same_as_it_comes_and_afterwards(tokens):
    """The bytes of an emoji are tokens of their own; what is said of a token never depends on what follows it."""
    texts = []

    class Listening(OfPrefix):
        def score_tokens(self, prompts, responses):
            texts.append(list(responses[-1]))
            return super().score_tokens(prompts, responses)

    kwargs = {"tokenizer": byte_tokenizer(), "reference": None, "prompts": ["ü "], "kl_mode": "off"}
    env = make_env(**kwargs, max_new_tokens=len(tokens), reward_model=Listening())
    rewards, infos = play(env, tokens, prompt="ü ")
    for t, heard in enumerate(texts):
        assert heard == texts[-1][: t + 1] or t + 1 < len(texts) and heard[:-1] == texts[-1][:t] and heard[-1] == ""
    ids = list("ü ".encode())
    said = env.task.token_scores(["ü "], [ids], [tokens])[0]
    assert [info["token_score"] for info in infos] == said.tolist()
    assert sum(rewards) == pytest.approx(said.sum())
    assert "".join(texts[-1]) == env.task.codec._text([*ids, *tokens], skip_special_tokens=False)[2:]


@given(
    st.lists(
        st.sampled_from([0x61, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0xEF, 0xBF, 0xBD, 0xFF]), min_size=1, max_size=9
    )
)
def test_a_token_score_does_not_depend_on_later_tokens(tokens):
    task = byte_task()
    whole = task.token_scores(["x"], [[120]], [tokens])[0]
    env = make_env(
        tokenizer=byte_tokenizer(),
        reference=None,
        prompts=["x"],
        kl_mode="off",
        reward_model=OfPrefix(),
        stop_at_eos=False,
        max_new_tokens=len(tokens) + 1,
    )
    env.reset(options={"prompt": "x"})
    as_they_come = [env.step(token)[4]["token_score"] for token in tokens]  # with room for more to follow
    assert as_they_come[:-1] == whole[:-1].tolist()


@cache
def byte_task():
    return make_env(
        tokenizer=byte_tokenizer(), reference=None, prompts=["x"], kl_mode="off", reward_model=OfPrefix()
    ).task


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned NoneType for tokens"),
        ([], "scored the tokens of 0 responses, but 1 were asked about"),
        ([[1.0]], r"numbers of shape \[1\] for response 0, which has 2 tokens"),
        ([1.0], r"numbers of shape \[\] for response 0"),
        ([[1.0, np.nan]], "returned 1 of 2 scores that are not finite; the first is nan in row 1"),
        ([["a", "b"]], "scores must be real numbers"),
    ],
)
def test_a_broken_process_reward_is_described(answer, message):
    class Broken:
        def score_tokens(self, prompts, responses):
            return [[0.0]] if len(responses[0]) == 1 else answer

    env = make_env(kl_mode="off", reward_model=Broken())
    env.reset(seed=0)
    env.step(1)
    with pytest.raises(RewardError, match=f"Broken.*{message}"):
        env.step(2)
    with pytest.raises(RuntimeError, match="reset it first"):
        env.step(2)


# --- penalties --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "missing", "kwargs"),
    [
        ([1, 2, 3, 4], 2.0, {}),
        ([1, 2, EOS], 0.0, {}),
        ([1, 2, 3, EOS], 0.0, {}),
        ([1, 2, 3], 2.0, {"context_length": 5}),  # two tokens of prompt
        ([1, 2, EOS], 0.0, {"context_length": 5}),
        ([4, 5], 0.0, {"stop_strings": ("ef",)}),
    ],
)
def test_penalties_by_hand(tokens, missing, kwargs):
    kwargs = {"prompts": ("abc", "ab"), "max_new_tokens": 4, **kwargs}
    env = make_env(kl_mode="off", missing_eos_penalty=2.0, length_penalty=0.5, **kwargs)
    rewards, infos = play(env, tokens)
    last = infos[-1]
    assert last["missing_eos_penalty"] == missing
    assert last["length_penalty"] == 0.5 * len(tokens)
    assert last["penalty"] == missing + 0.5 * len(tokens)
    assert sum(rewards) == pytest.approx(last["score"] - last["penalty"], abs=1e-12)


def test_a_penalty_that_is_not_asked_for_has_no_key():
    _, infos = play(make_env(kl_mode="off", length_penalty=0.5), [EOS])
    assert infos[-1]["penalty"] == 0.5 and "missing_eos_penalty" not in infos[-1]
    _, infos = play(make_env(kl_mode="off"), [EOS])
    assert infos[-1]["penalty"] == 0.0 and "length_penalty" not in infos[-1]
    with pytest.raises(ConfigError, match="length_penalty must be a finite number of at least 0"):
        make_env(length_penalty=-0.1)
