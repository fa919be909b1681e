"""JSON over HTTP, for servers that may be away, busy, slow, broken or hostile. It knows nothing of what is asked."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from rlhf_env.errors import ConfigError, RemoteError
from rlhf_env.records.safe_text import safe_text
from rlhf_env.settings import HTTPConfig

T = TypeVar("T")

API_KEY = "RLHF_ENV_API_KEY"  # the environment variable that may hold a bearer token

_MOST_BYTES = 64 * 2**20  # of one answer
_SHOWN = 200  # characters of an answer in a message
_jitter = random.Random()  # its own: nobody else's random numbers change


def is_url(name: str) -> bool:
    """Whether a name is the address of a server rather than a folder or a hub name."""
    return name.startswith(("http://", "https://"))


def require_url(url: str, *, key: str = API_KEY) -> SplitResult:
    """The parts of a URL that can be asked; `ConfigError` for any other, and for one with a secret in it."""
    try:
        address = urlsplit(url)
        address.port  # noqa: B018 (it raises where the port is no number)
    except ValueError as error:
        raise ConfigError(f"the URL {url!r} cannot be read: {error}") from None
    if "@" in address.netloc or address.query or address.fragment:
        # Not shown: what stands there may be a password.
        raise ConfigError(
            f"the URL of {address.hostname!r} must have no user, query or fragment: settings and messages show a URL, "
            f"so a secret belongs in the environment variable {key}"
        )
    if not is_url(url) or not address.hostname or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{url!r} is no http:// or https:// URL in ASCII")
    return address


def post_json(url: str, body: Any, config: HTTPConfig | None = None, *, key: str = API_KEY) -> Any:
    """POST `body` as JSON to `url`; the JSON that the server answers with.

    The environment variable `key`, where it is set, is sent as a bearer token and shown nowhere. The request is sent
    again only where there is no connection, or none until an answer begins, and after the statuses 429 and 5xx: after
    growing random waits, or the one that the server asks for (Retry-After), until the attempts or the seconds of
    `config` are used up. Everything else fails at once: other statuses (redirections, too, so that no token travels
    on), silence, an answer cut short, one that is not JSON. Raises `RemoteError` naming the URL, `ConfigError` for a
    URL or token that cannot be used.
    """
    config = config or HTTPConfig()
    address, headers = require_url(url, key=key), _headers(key)
    payload = json.dumps(body, allow_nan=False).encode()
    deadline, wait = time.monotonic() + config.timeout, config.first_wait
    for attempt in range(1, config.attempts + 1):
        try:
            status, asked, data = _attempt(address, payload, headers, config, deadline)
        except _Unreachable as error:
            asked, trouble = 0.0, f"cannot be reached ({error}): is the server running, and is this its address?"
        except (OSError, HTTPException, ValueError) as error:
            raise RemoteError(f"{url} {_broke(error, config)}") from None
        else:
            if status == 200:
                return _parsed(url, data, key)
            trouble = f"answered with status {status}{_excerpt(data, key)}"
            if status in (401, 403):
                trouble += f"; the environment variable {key} holds the bearer token to send"
            if status != 429 and status < 500:
                raise RemoteError(f"{url} {trouble}")
        pause = max(asked, wait * _jitter.uniform(0.5, 1.0))
        if attempt == config.attempts or time.monotonic() + pause >= deadline:
            times = "" if attempt == 1 else f"; tried {attempt} times"
            asks = f"; it asks to wait {asked:g} seconds" if asked else ""
            raise RemoteError(f"{url} {trouble}{asks}{times}")
        time.sleep(pause)
        wait = min(2 * wait, config.longest_wait)
    raise AssertionError("unreachable")


def post_all(
    url: str,
    bodies: Sequence[Any],
    config: HTTPConfig | None = None,
    *,
    at_once: int,
    read: Callable[[int, Any], T],
    key: str = API_KEY,
    progress: Callable[[int], None] | None = None,
) -> list[T]:
    """`post_json` of each of `bodies`, `at_once` of them at a time; what `read(i, answer)` makes of each, in order.

    An answer is read as soon as it is there. The first failure, be it of `read`, ends it: nothing more is sent, and
    nobody waits for what is under way. `progress` is told how many more are read.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    answered: SimpleQueue[tuple[int, Any, Exception | None]] = SimpleQueue()
    over = threading.Event()
    for i in range(len(bodies)):
        waiting.put(i)

    def work() -> None:
        while not over.is_set():
            try:
                i = waiting.get_nowait()
            except Empty:
                return
            try:
                answered.put((i, post_json(url, bodies[i], config, key=key), None))
            except Exception as error:
                answered.put((i, None, error))

    for _ in range(min(at_once, len(bodies))):
        threading.Thread(target=work, daemon=True).start()  # a daemon: Ctrl-C does not wait for the server
    results: dict[int, T] = {}
    try:
        for _ in bodies:
            i, answer, error = answered.get()
            if error is not None:
                raise error
            results[i] = read(i, answer)
            if progress is not None:
                progress(1)
    finally:
        over.set()
    return [results[i] for i in range(len(bodies))]


class _Unreachable(Exception):
    """There is no connection, or there was none until an answer began."""


class _OutOfTime(OSError):
    """The answer was still on its way when the time for the request was over."""


def _attempt(
    address: SplitResult, payload: bytes, headers: dict[str, str], config: HTTPConfig, deadline: float
) -> tuple[int, float, bytes]:
    """Status, the seconds to wait that the server asks for, and body of one exchange."""
    left = deadline - time.monotonic()
    patience = max(min(config.connect_timeout, left), 1e-3)
    if address.scheme == "https":
        context = ssl.create_default_context()
        connection = HTTPSConnection(address.netloc, timeout=patience, context=context)
    else:
        connection = HTTPConnection(address.netloc, timeout=patience)
    try:
        try:
            connection.connect()
        except OSError as error:
            raise _Unreachable(error.strerror or str(error) or type(error).__name__) from None
        connected: socket.socket = connection.sock
        connected.settimeout(config.read_timeout)
        expired = threading.Event()

        def hang_up() -> None:  # a server that sends a byte now and then is never silent
            expired.set()
            try:
                socket.socket.shutdown(connected, socket.SHUT_RDWR)
            except OSError:
                pass

        watchdog = threading.Timer(deadline - time.monotonic(), hang_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            try:
                connection.request("POST", address.path, payload, headers)
                response = connection.getresponse()
            except ConnectionError:  # as a server does whose queue is full, or that is being restarted
                if expired.is_set():
                    raise
                raise _Unreachable("it hung up before it answered") from None
            data = response.read(_MOST_BYTES + 1)
        except (OSError, HTTPException, ValueError):
            if expired.is_set():
                raise _OutOfTime from None
            raise
        finally:
            watchdog.cancel()
        if expired.is_set():
            raise _OutOfTime
        if len(data) > _MOST_BYTES:
            raise HTTPException(f"an answer of more than {_MOST_BYTES} bytes")
        if response.length:  # read(n) is content with less than was announced
            raise HTTPException(f"{response.length} bytes of the answer are missing")
        return response.status, _seconds(response.headers.get("Retry-After")), data
    finally:
        connection.close()


def _headers(key: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    if token := os.environ.get(key):
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ConfigError(f"the environment variable {key} holds a space, a line break or a character beyond ASCII")
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _parsed(url: str, data: bytes, key: str) -> Any:
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = "" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else f" ({error})"
        raise RemoteError(f"{url} answered with something that is not JSON{reason}{_excerpt(data, key)}") from None


def _refuse(number: str) -> None:
    raise ValueError(f"it holds {number}")


def shown(text: str, key: str = API_KEY) -> str:
    """How a text of the server's begins: safe to show, and without the token, should the server repeat it."""
    text = text[: 64 * _SHOWN].strip()
    if token := os.environ.get(key):
        text = text.replace(token, f"‹{key}›")
    return safe_text(text[:_SHOWN]) + ("…" if len(text) > _SHOWN else "")


def _excerpt(data: bytes, key: str) -> str:
    excerpt = shown(data[: 64 * _SHOWN].decode("utf-8", "replace"), key)
    return f": {excerpt}" if excerpt else ""


def _broke(error: Exception, config: HTTPConfig) -> str:
    if isinstance(error, _OutOfTime):
        return f"did not finish its answer in {config.timeout:g} seconds (http.timeout)"
    if isinstance(error, TimeoutError):
        return f"was silent for {config.read_timeout:g} seconds (http.read_timeout)"
    return f"broke off its answer: {safe_text(str(error)) or type(error).__name__}"


def _seconds(retry_after: str | None) -> float:
    """What Retry-After asks for, where it is a number of seconds."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else 0.0
