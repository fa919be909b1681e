"""A reward model as a server: the contract, the token, what it refuses, and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection, RemoteDisconnected
from typing import Any

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, RemoteError
from rlhf_env.reward_models import serve
from rlhf_env.reward_models.remote import REWARD_KEY, RemoteConfig, RemoteReward
from rlhf_env.reward_models.serve import RewardServer
from rlhf_env.settings import HTTPConfig
from tests.builders import letter_score

JSON = {"Content-Type": "application/json"}
ASK = {"id": "7", "prompts": ["a"], "responses": ["b"]}
QUICK = RemoteConfig(batch_size=2, http=HTTPConfig(attempts=3, first_wait=0.01, longest_wait=0.02, read_timeout=5.0))


@contextmanager
def running(reward: Any = letter_score, token: str | None = None):
    with RewardServer(reward, "127.0.0.1", 0, token) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def ask(server: RewardServer, method: str, path: str, body: Any = None, headers: Any = JSON) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body).encode(), headers)
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(response.read())


def test_it_gives_the_models_scores_to_the_client():
    prompts, responses = ["a", "bc", "d", "e", "f"], ["ab", "c", "\ud800", "x" * 9, ""]
    with running() as server:
        scores = RemoteReward(server.url, QUICK).score(prompts, responses)
        assert ask(server, "POST", "/score", ASK) == (200, {"id": "7", "scores": letter_score(["a"], ["b"])})
        assert ask(server, "POST", "/score", {**ASK, "prompts": [], "responses": []})[1]["scores"] == []
        assert ask(server, "GET", "/health") == (200, {"status": "ok"})
    np.testing.assert_array_equal(scores, letter_score(prompts, responses))


def test_the_parts_of_a_score_are_added_up():
    with running(lambda p, r: {"one": [1.0] * len(p), "two": [2.0] * len(p)}) as server:
        assert ask(server, "POST", "/score", ASK)[1]["scores"] == [3]


def test_the_model_is_asked_by_one_request_at_a_time():
    inside, most = [], []

    def slow(prompts, responses):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return [0.0] * len(prompts)

    with running(slow) as server:
        RemoteReward(server.url, RemoteConfig(batch_size=1, at_once=8)).score([""] * 16, [str(i) for i in range(16)])
    assert most == [1] * 16


def test_the_token_is_wanted_for_scores_and_for_nothing_else(monkeypatch):
    with running(token="s3cret") as server:
        for given in (None, "", "s3cre", "s3cret2", "Bearer", "Bearer s3cret2", "Basic s3cret", "Bearer schlüssel"):
            headers = JSON | ({} if given is None else {"Authorization": given.encode()})
            status, said = ask(server, "POST", "/score", ASK, headers)
            assert status == 401 and REWARD_KEY in said["error"] and "s3cret" not in said["error"], given
        assert ask(server, "POST", "/score", ASK, JSON | {"Authorization": "Bearer s3cret"})[0] == 200
        assert ask(server, "GET", "/health")[0] == 200
        with pytest.raises(RemoteError, match="status 401"):
            RemoteReward(server.url, QUICK).score(["a"], ["b"])
        monkeypatch.setenv(REWARD_KEY, "s3cret")
        np.testing.assert_array_equal(RemoteReward(server.url, QUICK).score(["a"], ["b"]), letter_score(["a"], ["b"]))


def test_others_are_served_only_with_a_token():
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match=f"others can reach {host}, so it needs a token.*{REWARD_KEY}"):
            RewardServer(letter_score, host, 0)
        with pytest.raises(ConfigError, match="needs a token"):
            RewardServer(letter_score, host, 0, token="")
    RewardServer(letter_score, "0.0.0.0", 0, token="s3cret").server_close()
    RewardServer(letter_score, "localhost", 0).server_close()


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"{", JSON, 400, "not JSON"),
        (b"[" * 100_000, JSON, 400, "not JSON"),
        (b"\xff", JSON, 400, "not JSON"),
        ([], JSON, 400, "an object with id"),
        ({"prompts": [], "responses": []}, JSON, 400, "an object with id"),
        ({**ASK, "modle": "x"}, JSON, 400, "and nothing else"),
        ({**ASK, "id": 7}, JSON, 400, "the id must be a text"),
        ({**ASK, "id": "7" * 201}, JSON, 400, "at most 200 characters"),
        ({**ASK, "prompts": "a"}, JSON, 400, "prompts must be a list of texts"),
        ({**ASK, "responses": [1]}, JSON, 400, "responses must be a list of texts"),
        ({**ASK, "prompts": ["a", "b"]}, JSON, 400, "2 prompts for 1 responses"),
        (ASK, {"Content-Type": "text/plain"}, 415, "application/json"),
        (ASK, {}, 415, "application/json"),
        (ASK, JSON | {"Content-Length": "99999999"}, 413, "16777216 bytes"),
        (ASK, JSON | {"Content-Length": "9" * 5000}, 413, "16777216 bytes"),
        (ASK, JSON | {"Content-Length": "-1"}, 411, "Content-Length"),
    ],
)
def test_what_is_no_request_is_refused_in_json(body, headers, status, reason):
    with running() as server:
        answered, said = ask(server, "POST", "/score", body, headers)
        assert answered == status and reason in said["error"]
        assert ask(server, "POST", "/score", ASK)[0] == 200


def test_there_is_nothing_elsewhere():
    with running() as server:
        assert ask(server, "POST", "/other", ASK)[0] == 404
        assert ask(server, "GET", "/score")[0] == 404


def test_a_model_that_fails_says_so_and_the_server_goes_on(capsys):
    calls = []

    def moody(prompts, responses):
        calls.append(1)
        if responses == ["nan"]:
            return [float("nan")]
        if responses == ["boom"]:
            raise ZeroDivisionError("of /secret/path")
        return [1.0]

    with running(moody) as server:
        with pytest.raises(RemoteError, match="status 422: .*1 of 1 scores that are not finite"):
            RemoteReward(server.url, QUICK).score([""], ["nan"])
        assert len(calls) == 1, "it would say the same again"
        with pytest.raises(RemoteError, match="status 500: .*raised ZeroDivisionError.*tried 3 times") as caught:
            RemoteReward(server.url, QUICK).score([""], ["boom"])
        assert "secret" not in str(caught.value) and "of /secret/path" in capsys.readouterr().err
        np.testing.assert_array_equal(RemoteReward(server.url, QUICK).score([""], ["fine"]), [1])


def test_an_error_of_the_servers_own_is_told_and_a_client_that_left_is_not(monkeypatch, capsys):
    errors = [BrokenPipeError("gone"), TimeoutError("silent"), KeyError("a mistake of ours")]

    def breaks(body):
        raise errors.pop(0)

    with running() as server:
        monkeypatch.setattr(server, "answer", breaks)
        while errors:
            with pytest.raises(RemoteDisconnected):
                ask(server, "POST", "/score", ASK)
    told = capsys.readouterr().err
    assert "a mistake of ours" in told and "gone" not in told and "silent" not in told


def test_a_client_that_is_silent_or_leaves_stops_nobody(monkeypatch):
    monkeypatch.setattr(serve._Connection, "timeout", 0.2)
    with running() as server:
        idle = [socket.create_connection(server.server_address) for _ in range(3)]
        idle[0].sendall(b"POST /score HTTP/1.1\r\nContent-Length: 10\r\nContent-Type: application/json\r\n\r\n{")
        idle[1].close()
        assert ask(server, "POST", "/score", ASK)[0] == 200
        idle[2].settimeout(2)
        assert idle[2].recv(1) == b"", "it is hung up on"


def test_who_finds_no_place_is_hung_up_on_and_asks_again(monkeypatch):
    monkeypatch.setattr(serve, "MOST_AT_ONCE", 1)

    def slow(prompts, responses):
        time.sleep(0.05)
        return letter_score(prompts, responses)

    patient = RemoteConfig(batch_size=1, at_once=3, http=HTTPConfig(attempts=50, first_wait=0.02, longest_wait=0.05))
    with running(slow) as server:
        scores = RemoteReward(server.url, patient).score(["a"] * 6, list("abcdef"))
    np.testing.assert_array_equal(scores, letter_score(["a"] * 6, list("abcdef")))


def test_an_address_that_is_taken_is_named():
    with running() as server:
        port = server.server_address[1]
        with pytest.raises(ConfigError, match=f"cannot serve at 127.0.0.1, port {port}: Address already in use"):
            RewardServer(letter_score, "127.0.0.1", port)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(signum, command, monkeypatch):
    def use_and_end() -> None:
        try:
            scores.append(RemoteReward(url, patient).score([""], ["very good"])[0])
        finally:
            os.kill(os.getpid(), signum)

    monkeypatch.delenv(REWARD_KEY, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{(port := free.getsockname()[1])}/score"
    scores, before = [], signal.getsignal(signum)
    patient = RemoteConfig(http=HTTPConfig(attempts=500, first_wait=0.02, longest_wait=0.02))
    user = threading.Thread(target=use_and_end)
    user.start()
    assert command("serve-reward", "vader", "--port", port) == (0, f"serving vader at {url}\n", "")
    user.join()
    assert scores[0] > 0.3 and signal.getsignal(signum) is before
    with pytest.raises(RemoteError, match="cannot be reached"):
        RemoteReward(url, QUICK).score([""], ["x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vadr"], "unknown reward model 'vadr'. Did you mean 'vader'"),
        (["vader", "--host", "0.0.0.0"], "others can reach 0.0.0.0"),
        (["vader", "--port", "70000"], "a port is between 0 and 65535, not 70000"),
        (["vader", "--device", "tpu"], "device 'tpu' cannot be used"),
    ],
)
def test_a_mistake_is_one_line(command, words, message, monkeypatch):
    monkeypatch.delenv(REWARD_KEY, raising=False)
    code, out, err = command("serve-reward", *words)
    assert (code, out, err.count("\n")) == (1, "", 1) and message in err
