"""A reward behind a server: what is sent, and that nothing but a proper answer is ever a reward."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, RemoteError
from rlhf_env.reward_models.remote import REWARD_KEY, RemoteConfig, RemoteReward
from rlhf_env.settings import HTTPConfig
from tests.builders import letter_score
from tests.serving import Handler, reply, scoring, serving

QUICK = RemoteConfig(
    batch_size=3,
    at_once=2,
    http=HTTPConfig(connect_timeout=1.0, read_timeout=0.3, timeout=2.0, attempts=3, first_wait=0.01, longest_wait=0.02),
)
PROMPTS, RESPONSES = ["a", "bc", "a", "d", "e", "a", "f"], ["ab", "c", "ab", "", "hh", "ab", "ace"]


def test_the_scores_are_the_servers_in_bounded_batches_and_equal_texts_are_sent_once():
    with serving(scoring(letter_score)) as served:
        scores = RemoteReward(served.url, QUICK).score(PROMPTS, RESPONSES)
    np.testing.assert_array_equal(scores, letter_score(PROMPTS, RESPONSES))
    bodies = [body for _, body in served.asked]
    assert all(set(body) == {"id", "prompts", "responses"} and len(body["prompts"]) <= 3 for body in bodies)
    sent = sorted(pair for body in bodies for pair in zip(body["prompts"], body["responses"], strict=True))
    assert sent == [("a", "ab"), ("bc", "c"), ("d", ""), ("e", "hh"), ("f", "ace")]
    assert len({body["id"] for body in bodies}) == 2 and served.at_once <= 2


def test_nothing_is_asked_about_nothing():
    assert RemoteReward("http://127.0.0.1:9/score", QUICK).score([], []).shape == (0,)


def test_any_text_travels():
    hostile = ["\x1b[2J", "\ud800", "é😀\r\n", '"}', "x" * 100_000]
    seen: list[str] = []

    def score(prompts, responses):
        seen.extend(responses)
        return [0.5] * len(responses)

    with serving(scoring(score)) as served:
        RemoteReward(served.url, replace(QUICK, batch_size=9)).score([""] * 5, hostile)
    assert seen == hostile


def test_the_token_is_its_own_and_never_shown(monkeypatch):
    monkeypatch.setenv(REWARD_KEY, "s3cret")
    monkeypatch.setenv("RLHF_ENV_API_KEY", "for others")
    with serving(scoring(letter_score)) as served:
        reward = RemoteReward(served.url, QUICK)
        reward.score(["a"], ["b"])
    assert served.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(reward) and b"s3cret" not in pickle.dumps(reward)
    with serving(lambda c, b, n: reply(c, {"error": "you sent s3cret"}, 401)) as served:
        with pytest.raises(RemoteError, match=f"status 401.*you sent ‹{REWARD_KEY}›.*variable {REWARD_KEY} holds"):
            RemoteReward(served.url, QUICK).score(["a"], ["b"])


@pytest.mark.parametrize("answer", [{"authorization": "Bearer s3cret"}, {"id": "s3cret", "scores": [1.0]}])
def test_a_server_that_says_the_token_again_does_not_get_it_shown(monkeypatch, answer):
    """As those do that answer with the headers they got, with status 200."""
    monkeypatch.setenv(REWARD_KEY, "s3cret")
    with serving(lambda c, b, n: reply(c, answer)) as served:
        with pytest.raises(RemoteError, match=f"‹{REWARD_KEY}›") as caught:
            RemoteReward(served.url, QUICK).score(["a"], ["b"])
    assert "s3cret" not in str(caught.value)


def test_a_url_that_cannot_be_asked_is_refused_at_once():
    with pytest.raises(ConfigError, match="no http:// or https:// URL"):
        RemoteReward("ftp://host/score")
    with pytest.raises(ConfigError, match=f"environment variable {REWARD_KEY}") as caught:
        RemoteReward("http://me:s3cret@host/score")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_or_broken_server_is_asked_again_with_the_same_request(status):
    def handle(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
        reply(connection, b"", status) if n < 2 else scoring(letter_score)(connection, body, n)

    with serving(handle) as served:
        np.testing.assert_array_equal(RemoteReward(served.url, QUICK).score(["a"], ["b"]), letter_score(["a"], ["b"]))
    first, *others = (body for _, body in served.asked)
    assert others == [first, first]


def raw(data: bytes, seconds: float = 0.0, times: int = 1) -> Handler:
    """Bytes as they stand, then silence, so many times over."""

    def handle(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
        for _ in range(times):
            connection.wfile.write(data)
            time.sleep(seconds)

    return handle


def says(answer: Any) -> Handler:
    """This, with the id that was asked for where it says ID."""
    return lambda c, body, n: reply(c, {k: body["id"] if v == "ID" else v for k, v in answer.items()})


OK = b"HTTP/1.1 200 OK\r\n"
#: Of three responses each: what the server does, and what is said of it.
HOSTILE: dict[str, tuple[Handler, str]] = {
    "stalls": (lambda *_: time.sleep(0.6), "was silent for 0.3 seconds"),
    "drips": (raw(b"x", 0.02, 100), "did not finish its answer in 0.5 seconds"),
    "truncates": (raw(OK + b'Content-Length: 90\r\n\r\n{"id": "'), "broke off its answer: 82 bytes"),
    "truncates its JSON": (lambda c, b, n: reply(c, b'{"id": "x", "scores": [1.0, '), "not JSON"),
    "sends a page": (lambda c, b, n: reply(c, b"<html>\x1b]0;log in"), r"not JSON: <html>‹U\+001B›"),
    "sends NaN": (lambda c, b, n: reply(c, b'{"id": "x", "scores": [NaN, 1, 1]}'), "it holds NaN"),
    "sends what no float holds": (lambda c, b, n: reply(c, f'{{"id": "{b["id"]}", "scores": [1, 1e999, 1]}}'.encode()),
                                  "score 1 is beyond what a float holds"),
    "sends an endless number": (says({"id": "ID", "scores": [10**400, 1, 1]}), "score 0 is beyond what a float holds"),
    "sends one score too few": (says({"id": "ID", "scores": [1, 2]}), "a list of 3 scores was expected.* not 2 scores"),
    "sends one too many": (says({"id": "ID", "scores": [1, 2, 3, 4]}), "a list of 3 scores .* not 4 scores"),
    "sends one for all": (says({"id": "ID", "scores": 1.0}), "a list of 3 scores was expected.* not 1.0"),
    "sends lists": (says({"id": "ID", "scores": [[1], [2], [3]]}), r"score 0 must be a number, it is \[1\]"),
    "sends texts": (says({"id": "ID", "scores": ["1", 2, 3]}), 'score 0 must be a number, it is "1"'),
    "sends truth": (says({"id": "ID", "scores": [1, True, 0]}), "score 1 must be a number, it is true"),
    "sends nothing": (says({"id": "ID", "scores": [1, None, 0]}), "score 1 must be a number, it is null"),
    "answers another": (says({"id": "another\x1b[2J", "scores": [1, 2, 3]}), "answers another request: .* this is"),
    "answers nobody": (says({"scores": [1, 2, 3]}), '"id": …, "scores": .* was expected'),
    "says why not": (says({"id": "ID", "error": "no\x1bmodel"}), r"was expected, not .*no\\u001bmodel"),
    "sends an array": (lambda c, b, n: reply(c, [1, 2, 3]), r"was expected, not \[1, 2, 3\]"),
    "refuses": (lambda c, b, n: reply(c, {"error": "too long"}, 422), 'status 422: {"error": "too long"}'),
    "moves away": (lambda c, b, n: reply(c, b"", 301, Location="http://127.0.0.1:9/"), "status 301"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_proper_answer_is_an_error_asked_for_once(name):
    handle, message = HOSTILE[name]
    config = replace(QUICK, http=replace(QUICK.http, timeout=0.5))
    with serving(handle) as served:
        with pytest.raises(RemoteError, match=message) as caught:
            RemoteReward(served.url, config).score(["", "", ""], ["a", "b", "c"])
        assert str(caught.value).startswith(served.url) and str(caught.value).isprintable()
        assert len(served.asked) == 1


def test_one_answer_given_twice_is_an_error():
    """As by a proxy that keeps answers: the second batch gets what belongs to the first."""
    first: list[Any] = []

    def handle(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
        first.append({"id": body["id"], "scores": [1.0] * len(body["responses"])})
        reply(connection, first[0])

    with serving(handle) as served:
        reward = RemoteReward(served.url, QUICK)
        np.testing.assert_array_equal(reward.score([""], ["a"]), [1])
        with pytest.raises(RemoteError, match="answers another request"):
            reward.score([""], ["a"])


def test_a_server_that_fails_is_not_asked_for_the_rest():
    with serving(lambda c, b, n: reply(c, b"", 400)) as served:
        with pytest.raises(RemoteError, match="status 400"):
            RemoteReward(served.url, replace(QUICK, batch_size=1)).score([""] * 100, [str(i) for i in range(100)])
        assert len(served.asked) <= 2 * QUICK.at_once
