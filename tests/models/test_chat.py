"""A chat model behind a server: what it is asked, what of its answers is taken, and what is never made up."""

from __future__ import annotations

import pytest

from rlhf_env.errors import ConfigError, RemoteError
from rlhf_env.models.chat import chat_generator
from rlhf_env.settings import HTTPConfig
from tests.serving import chat, chatting, reply, serving

ONCE = HTTPConfig(read_timeout=5.0, attempts=1)


ECHO = chatting(lambda prompt: f"re: {prompt}")


def test_each_prompt_is_one_request_and_replies_keep_their_order():
    with serving(ECHO) as served:
        generate = chat_generator(f"{served.url}/", "judge", max_new_tokens=7, temperature=0.5, seed=3, http=ONCE)
        assert generate(["a", "b", "c", "a"]) == ["re: a", "re: b", "re: c", "re: a"]
        assert generate([]) == []
    assert {path for path, _ in served.asked} == {"/v1/chat/completions"}
    bodies = sorted((body for _, body in served.asked), key=lambda body: body["messages"][0]["content"])
    assert [body["messages"] for body in bodies] == [[{"role": "user", "content": text}] for text in "aabc"]
    seeds = [body.pop("seed") for body in bodies]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3  # of the seed and the prompt alone
    assert {name: value for name, value in bodies[0].items() if name != "messages"} == {
        "model": "judge",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
    }


def test_it_has_a_token_of_its_own_that_no_other_server_is_sent(monkeypatch):
    monkeypatch.setenv("RLHF_ENV_API_KEY", "policys")
    with serving(ECHO) as served:
        chat_generator(served.url, "judge", max_new_tokens=1, http=ONCE)(["a"])
        monkeypatch.setenv("RLHF_ENV_JUDGE_API_KEY", "s3cret")
        chat_generator(served.url, "judge", max_new_tokens=1, http=ONCE)(["a"])
    assert [headers.get("Authorization") for headers in served.headers] == [None, "Bearer s3cret"]


def test_no_text_is_an_empty_reply():
    with serving(lambda connection, body, n: reply(connection, chat(None))) as served:
        assert chat_generator(served.url, "judge", max_new_tokens=1, http=ONCE)(["a"]) == [""]


def test_half_a_surrogate_pair_is_no_character_and_does_not_cost_the_run():
    with serving(lambda connection, body, n: reply(connection, chat("a\ud83d b \U0001f600"))) as served:
        (text,) = chat_generator(served.url, "judge", max_new_tokens=1, http=ONCE)(["a"])
    assert text == "a\ufffd b \U0001f600"


@pytest.mark.parametrize(
    "answer",
    [{}, [], "hello", {"choices": []}, {"choices": [{"text": "x"}]}, {"choices": [7]}, chat(7), chat(["\x1b[2J"])],
    ids=str,
)  # fmt: skip
def test_what_is_no_chat_completion_is_an_error_safe_to_show(answer):
    with serving(lambda connection, body, n: reply(connection, answer)) as served:
        with pytest.raises(RemoteError, match="/v1/chat/completions answered with no chat completion") as error:
            chat_generator(served.url, "judge", max_new_tokens=1, http=ONCE)(["a"])
    assert "\x1b" not in str(error.value)


def test_a_busy_server_is_asked_again_and_a_lost_one_is_an_error():
    def busy_at_first(connection, body, n):
        reply(connection, chat("late") if n else b"busy", status=200 if n else 503)

    with serving(busy_at_first) as served:
        patient = HTTPConfig(read_timeout=5.0, attempts=2, first_wait=0.01)
        assert chat_generator(served.url, "judge", max_new_tokens=1, http=patient)(["a"]) == ["late"]
        gone = served.url
    with pytest.raises(RemoteError, match="cannot be reached"):
        chat_generator(gone, "judge", max_new_tokens=1, http=ONCE)(["a"])
    with pytest.raises(ConfigError, match="no http:// or https:// URL"):
        chat_generator("ftp://host/v1", "judge", max_new_tokens=1)
