"""JSON over HTTP with servers that are away, busy, slow, broken or hostile. No test waits for more than tenths."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from rlhf_env.errors import ConfigError, RemoteError
from rlhf_env.http import API_KEY, is_url, post_all, post_json
from rlhf_env.settings import HTTPConfig
from tests.serving import Handler, reply, serving

QUICK = HTTPConfig(connect_timeout=0.5, read_timeout=0.3, timeout=2.0, attempts=3, first_wait=0.02, longest_wait=0.05)


def echo(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
    reply(connection, {"said": body, "n": n})


def first(status: int, times: int, then: Handler = echo, data: bytes = b"", **headers: str) -> Handler:
    """A server that answers with `status` at first."""

    def handle(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
        if n < times:
            reply(connection, data, status, **headers)
        else:
            then(connection, body, n)

    return handle


def raw(data: bytes, pause: float = 0.0, times: int = 1) -> Handler:
    """A server that writes `data` as it stands, again and again, and then hangs up."""

    def handle(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
        for _ in range(times):
            connection.wfile.write(data)
            connection.wfile.flush()
            time.sleep(pause)

    return handle


def test_it_posts_json_and_returns_json():
    with serving(echo) as served:
        assert post_json(f"{served.url}/completions", {"a": [1, None, "é"]}, QUICK) == {
            "said": {"a": [1, None, "é"]},
            "n": 0,
        }
    assert served.asked == [("/v1/completions", {"a": [1, None, "é"]})]
    assert served.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in served.headers[0]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_or_broken_server_is_asked_again(status):
    with serving(first(status, 2)) as served:
        assert post_json(served.url, 1, QUICK)["n"] == 2
    early, late = served.times[1] - served.times[0], served.times[2] - served.times[1]
    assert early >= 0.01 and late >= 0.02  # at least half of 0.02 and of 0.04 seconds


def test_attempts_and_seconds_are_limited():
    with serving(first(503, 99, data=b"loading")) as served:
        with pytest.raises(RemoteError, match=r"/v1 answered with status 503: loading; tried 3 times$"):
            post_json(served.url, 1, QUICK)
        assert len(served.asked) == 3
        with pytest.raises(RemoteError, match="status 503: loading$"):  # the wait does not fit into the time
            post_json(served.url, 1, replace(QUICK, first_wait=0.6, longest_wait=0.6, timeout=0.25))
        assert len(served.asked) == 4


def test_the_wait_that_a_server_asks_for_is_kept():
    with serving(first(429, 1, Retry_After="1")) as served:
        with pytest.raises(RemoteError, match="status 429; it asks to wait 1 seconds$"):
            post_json(served.url, 1, replace(QUICK, timeout=0.9))
        assert len(served.asked) == 1, "asking earlier would be asking in vain"
    with serving(first(429, 1, Retry_After="Wed, 21 Oct 2037 07:28:00 GMT")) as served:
        assert post_json(served.url, 1, QUICK)["n"] == 1


@pytest.mark.parametrize("status", [201, 301, 307, 400, 401, 403, 404, 422])
def test_other_answers_fail_at_once(status):
    headers = {"Location": "http://127.0.0.1:9/"} if status in (301, 307) else {}
    with serving(first(status, 99, data=b'{"error": "no \x1b[2J such model"}', **headers)) as served:
        with pytest.raises(RemoteError, match=rf"/v1 answered with status {status}: .*no ‹U\+001B›\[2J such") as caught:
            post_json(served.url, 1, QUICK)
        assert len(served.asked) == 1
    assert (API_KEY in str(caught.value)) == (status in (401, 403))


def test_a_server_that_is_away_is_called_again_and_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"/v1 cannot be reached \(Connection refused\).*tried 3 times"):
            post_json(url, 1, QUICK)
        assert 0.02 <= time.monotonic() - began < 1


def hang_up(*_: Any) -> None:
    """As a server does that is being restarted."""


def test_a_server_that_hangs_up_before_it_answers_is_called_again():
    with serving(lambda c, b, n: hang_up() if n < 2 else echo(c, b, n)) as served:
        assert post_json(served.url, 1, QUICK)["n"] == 2
    with serving(hang_up) as served:
        with pytest.raises(RemoteError, match=r"cannot be reached \(it hung up before it answered\).*tried 3 times"):
            post_json(served.url, 1, QUICK)


OK = b"HTTP/1.1 200 OK\r\n"
HOSTILE: dict[str, tuple[Handler, str]] = {
    "stalls": (lambda *_: time.sleep(1.0), r"was silent for 0.3 seconds"),
    "stalls in the middle": (raw(OK + b"Content-Length: 9\r\n\r\n[1", 1.0), "was silent for 0.3 seconds"),
    "drips a header": (raw(b"x", 0.02, 200), "did not finish its answer in 0.4 seconds"),
    "drips a body": (
        lambda c, b, n: [raw(OK + b"\r\n[")(c, b, n), raw(b" ", 0.02, 200)(c, b, n)] and None,
        "did not finish its answer in 0.4 seconds",
    ),
    "cuts short": (raw(OK + b"Content-Length: 100\r\n\r\n[1, 2]"), "broke off its answer: 94 bytes of the answer are"),
    "cuts a chunk short": (raw(OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\n[1"), "broke off its answer"),
    "speaks another protocol": (raw(b"220 smtp.example ESMTP\r\n"), "broke off its answer: 220 smtp.example"),
    "claims a length that is none": (raw(OK + b"Content-Length: \xff\r\n\r\n[1"), "not JSON: \\[1$"),
    "sends a page": (
        lambda c, b, n: reply(c, b"<html>\x1b]0;log in</html>", Content_Type="text/html"),
        r"something that is not JSON: <html>‹U\+001B›\]0;log in</html>$",
    ),
    "sends nothing": (lambda c, b, n: reply(c, b""), "something that is not JSON$"),
    "sends bytes": (lambda c, b, n: reply(c, b"\xff\x00\xfe"), "something that is not JSON: "),
    "sends NaN": (lambda c, b, n: reply(c, b"[NaN]"), r"not JSON \(it holds NaN\): \[NaN\]"),
    "sends infinity": (lambda c, b, n: reply(c, b"[-Infinity]"), r"not JSON \(it holds -Infinity\)"),
    "sends a deep nest": (lambda c, b, n: reply(c, b"[" * 200_000), "something that is not JSON"),
    "sends half": (lambda c, b, n: reply(c, b'{"choices": ['), "something that is not JSON: "),
    "sends a novel": (lambda c, b, n: reply(c, b"x" * 1000), f"not JSON: {'x' * 200}…$"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_answer_that_is_none_is_one_line_and_asked_for_once(name):
    handle, message = HOSTILE[name]
    with serving(handle) as served:
        began = time.monotonic()
        with pytest.raises(RemoteError, match=message) as caught:
            post_json(served.url, 1, replace(QUICK, timeout=0.4))
        assert time.monotonic() - began < 2
        assert str(caught.value).startswith(served.url)
        assert str(caught.value).isprintable()
        assert len(served.asked) == 1


def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr("rlhf_env.http._MOST_BYTES", 1000)
    with serving(lambda c, b, n: reply(c, b"1" * 1001)) as served:
        with pytest.raises(RemoteError, match="an answer of more than 1000 bytes"):
            post_json(served.url, 1, QUICK)
    with serving(lambda c, b, n: reply(c, b" " * 999 + b"1")) as served:
        assert post_json(served.url, 1, QUICK) == 1


def test_the_token_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv(API_KEY, "s3cret-token")

    def betray(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
        reply(connection, {"you sent": connection.headers["Authorization"]}, 403)

    with serving(betray) as served:
        with pytest.raises(RemoteError) as caught:
            post_json(served.url, 1, QUICK)
    assert served.headers[0]["Authorization"] == "Bearer s3cret-token"
    assert "s3cret" not in str(caught.value)
    assert f"Bearer ‹{API_KEY}›" in str(caught.value)


def test_another_server_may_have_another_token(monkeypatch):
    monkeypatch.setenv(API_KEY, "for the first only")
    monkeypatch.setenv("OTHER_KEY", "second")
    with serving(echo) as served:
        post_json(served.url, 1, QUICK, key="OTHER_KEY")
    assert served.headers[0]["Authorization"] == "Bearer second"


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel"])
def test_a_token_that_no_header_can_hold_is_refused_without_showing_it(monkeypatch, token):
    monkeypatch.setenv(API_KEY, token)
    with pytest.raises(ConfigError, match=f"{API_KEY} holds a space, a line break") as caught:
        post_json("http://127.0.0.1:9", 1, QUICK)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/v1", "no http:// or https:// URL"),
        ("http://", "no http:// or https:// URL"),
        ("http://höst/v1", "no http:// or https:// URL"),
        ("http://host/v1\r\nHost: other", "no http:// or https:// URL"),
        ("http://host/a b", "no http:// or https:// URL"),
        ("http://host:eight/v1", "cannot be read"),
        ("http://[::1/v1", "cannot be read"),
    ],
)
def test_a_url_that_is_none_is_refused(url, message):
    with pytest.raises(ConfigError, match=message):
        post_json(url, 1, QUICK)


@pytest.mark.parametrize("url", ["http://me:s3cret@host/v1", "http://host/v1?key=s3cret", "http://host/v1#s3cret"])
def test_a_secret_in_a_url_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match=f"environment variable {API_KEY}") as caught:
        post_json(url, 1, QUICK)
    assert "s3cret" not in str(caught.value)


def test_what_a_url_is():
    assert is_url("http://host:8000/v1") and is_url("https://host")
    assert not is_url("runs/first/model") and not is_url("owner/name") and not is_url("httpfolder")


def test_numbers_that_json_has_not_are_never_sent():
    with serving(echo) as served:
        with pytest.raises(ValueError):
            post_json(served.url, float("nan"), QUICK)
        assert not served.asked


def test_many_at_once_come_back_in_order_and_no_more_than_allowed():
    def slow(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
        time.sleep(0.03 if body % 2 else 0.005)
        reply(connection, {"square": body**2})

    def square(i: int, answer: Any) -> tuple[int, int]:
        return i, answer["square"]

    told: list[int] = []
    with serving(slow) as served:
        answers = post_all(served.url, list(range(24)), QUICK, at_once=4, read=square, progress=told.append)
    assert answers == [(i, i**2) for i in range(24)]
    assert 1 < served.at_once <= 4
    assert told == [1] * 24
    assert post_all("http://127.0.0.1:9", [], QUICK, at_once=4, read=square) == []


@pytest.mark.parametrize("status", [400, 200])
def test_the_first_failure_ends_it_without_waiting_for_the_others(status):
    """Whether the server refuses, or what it says cannot be read."""

    def handle(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:
        if body == 1:
            reply(connection, b'"no such prompt"', status)
        else:
            time.sleep(1.0 if body == 0 else 0.05)
            reply(connection, body)

    def read(i: int, answer: Any) -> Any:
        if isinstance(answer, str):
            raise RemoteError(f"answer {i}: {answer}")
        return answer

    with serving(handle) as served:
        began = time.monotonic()
        with pytest.raises(RemoteError, match='400: "no such prompt"' if status == 400 else "answer 1: no such prompt"):
            post_all(served.url, list(range(50)), replace(QUICK, read_timeout=5.0), at_once=2, read=read)
        assert time.monotonic() - began < 0.9
        time.sleep(0.3)
        assert len(served.asked) <= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attempts": 0}, "HTTP needs attempts of at least 1, it is 0"),
        ({"first_wait": -1.0}, "HTTP needs first_wait of at least 0"),
        ({"timeout": 0.0}, "timeout must be a positive number of seconds"),
        ({"read_timeout": float("inf")}, "read_timeout must be a positive number of seconds"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        HTTPConfig(**change)
