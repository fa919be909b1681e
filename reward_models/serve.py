"""A reward model as a server: the other side of `RemoteReward`.

One route takes POST, so the standard library's server is enough, and serving needs nothing that scoring does not. It is
made for a machine or a network of one's own; between it and the open internet belongs a proxy that speaks TLS.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler
from socket import AF_INET, AF_INET6
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from rlhf_env.envs.rewards import ScoreFn, require_whole, scores_of
from rlhf_env.errors import ConfigError, RewardError, RLHFEnvError
from rlhf_env.records.safe_text import safe_text
from rlhf_env.reward_models.remote import REWARD_KEY
from rlhf_env.types import RewardModel

MOST_BYTES = 16 * 2**20  # of one request
MOST_AT_ONCE = 64  # requests under way; a further connection is closed, and its client tries again
PATIENCE = 30.0  # seconds that a client may be silent
GRACE = 5.0  # seconds that a request under way is given when the server is closed


class _Refused(Exception):
    """A request that gets no scores: its status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RewardServer(ThreadingMixIn, TCPServer):
    """POST /score {"id", "prompts", "responses"} → {"id", "scores"}; GET /health → {"status": "ok"}.

    Where there is a `token`, /score wants it as a bearer token; a `host` that others can reach needs one. The model is
    asked by one request at a time. What is wrong is said as {"error": reason}: 400 for a request that is none, 401
    without the token, 413 for a body of more than 16 MiB, 422 where what the model says is no score (to ask again is
    of no use), 500 where it breaks. Port 0 takes a free one; `url` says which. `serve_forever` serves until
    another thread calls `shutdown`.
    """

    allow_reuse_address = daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, reward: RewardModel | ScoreFn, host: str, port: int, token: str | None = None) -> None:
        require_whole("a served reward", reward)
        if not token and not _only_here(host):
            raise ConfigError(
                f"others can reach {host}, so it needs a token: set the environment variable {REWARD_KEY} here and "
                "where the scores are asked for, or use the host 127.0.0.1"
            )
        self.reward, self._token = reward, token.encode() if token else None
        self._model, self._places = threading.Lock(), threading.Semaphore(MOST_AT_ONCE)
        self.address_family = AF_INET6 if ":" in host else AF_INET
        try:
            super().__init__((host, port), _Connection)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot serve at {host}, port {port}: {reason}") from None

    @property
    def url(self) -> str:
        """Where scores are asked for."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}/score"

    def admits(self, authorization: str | None) -> bool:
        """Whether a request with this header may ask for scores; equally fast whatever a wrong token looks like."""
        if self._token is None:
            return True
        given = (authorization or "").removeprefix("Bearer ").encode("utf-8", "surrogatepass")
        return hmac.compare_digest(given, self._token)

    def answer(self, body: bytes) -> dict[str, Any]:
        """The answer to the body of a request; raises `_Refused`."""
        name, prompts, responses = _read(body)
        if not responses:
            return {"id": name, "scores": []}
        try:
            with self._model:
                return {"id": name, "scores": scores_of(self.reward, prompts, responses).tolist()}
        except RLHFEnvError as error:
            raise _Refused(422 if isinstance(error, RewardError) else 500, str(error)) from error
        except Exception as error:
            print(safe_text(traceback.format_exc(), multiline=True), file=sys.stderr)
            raise _Refused(500, f"the reward model raised {type(error).__name__}") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in a thread of its own, if there is a place for it."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection, and make place for the next one."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or is silent is no error of the server's; anything else is told."""
        if not isinstance(sys.exception(), OSError):
            print(safe_text(traceback.format_exc(), multiline=True), file=sys.stderr)

    def server_close(self) -> None:
        """Close the address, and wait a moment for the requests that are under way."""
        super().server_close()
        until = time.monotonic() + GRACE
        for _ in range(MOST_AT_ONCE):
            if not self._places.acquire(timeout=max(0.0, until - time.monotonic())):
                break


class _Connection(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def do_GET(self) -> None:
        self._reply(*((200, {"status": "ok"}) if self.path == "/health" else (404, {"error": "GET /health is all"})))

    def do_POST(self) -> None:
        try:
            self._reply(200, self.server.answer(self._body()))
        except _Refused as refused:
            self._reply(refused.status, {"error": str(refused)})

    def _body(self) -> bytes:
        if self.path != "/score":
            raise _Refused(404, "scores are at POST /score")
        if not self.server.admits(self.headers.get("Authorization")):
            raise _Refused(401, f"the bearer token is missing or wrong; the client sends {REWARD_KEY}")
        # A page in a browser of this machine can send other types without being allowed to.
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "the Content-Type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refused(411, "the Content-Length is missing")
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise _Refused(413, f"a request may have {MOST_BYTES} bytes: send fewer responses at once")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise _Refused(400, "the body is shorter than its Content-Length")
        return body

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer, allow_nan=False).encode()
        self.close_connection = True  # also because a body that was refused is not read
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(data),
            "Connection": "close",
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a run asks thousands of times."""


def _only_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(body: bytes) -> tuple[str, list[str], list[str]]:
    """Id, prompts and responses of a request; raises `_Refused`."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refused(400, "the body is not JSON") from None
    if not isinstance(asked, dict) or asked.keys() != {"id", "prompts", "responses"}:
        raise _Refused(400, "the body must be an object with id, prompts and responses, and nothing else")
    name, prompts, responses = asked["id"], asked["prompts"], asked["responses"]
    if not isinstance(name, str) or len(name) > 200:
        raise _Refused(400, "the id must be a text of at most 200 characters")
    for key, texts in (("prompts", prompts), ("responses", responses)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _Refused(400, f"{key} must be a list of texts")
    if len(prompts) != len(responses):
        raise _Refused(400, f"there are {len(prompts)} prompts for {len(responses)} responses: one each is needed")
    return name, prompts, responses
