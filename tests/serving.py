"""Servers for tests: any function of a request behind a real socket, one with a model, with scores, with replies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sampling import sample_responses
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.text.codec import Codec
from rlhf_env.types import Rollout, SamplingLaw


@dataclass
class Served:
    """A running server: its address, and what it was asked, each with its headers and the time."""

    url: str
    asked: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0  # the most requests that were under way together


class _Server(ThreadingTCPServer):  # an HTTPServer would ask for its own name first
    daemon_threads, block_on_close, request_queue_size, allow_reuse_address = True, False, 128, True


Handler = Callable[[BaseHTTPRequestHandler, Any, int], None]


@contextmanager
def serving(handle: Handler, port: int = 0) -> Iterator[Served]:
    """A server that calls `handle(connection, body, n)` for the n-th request, from 0; at a free port, or at this."""
    lock, under_way = threading.Lock(), 0

    class Connection(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                n = len(served.asked)
                served.asked.append((self.path, body))
                served.headers.append(dict(self.headers))
                served.times.append(time.monotonic())
                under_way += 1
                served.at_once = max(served.at_once, under_way)
            try:
                handle(self, body, n)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client hung up, as it should
            finally:
                with lock:
                    under_way -= 1
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(("127.0.0.1", port), Connection)
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def reply(connection: BaseHTTPRequestHandler, answer: Any, status: int = 200, **headers: str) -> None:
    """Answer with JSON, or with bytes as they stand."""
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    connection.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        connection.send_header(name.replace("_", "-"), value)
    connection.end_headers()
    connection.wfile.write(data)


def completion(policy: CausalLM, body: dict[str, Any], *, processed: bool = False) -> dict[str, Any]:
    """What a vLLM server of this model answers; its log-probabilities are before the temperature, or after it."""
    codec, greedy = Codec.of(policy.tokenizer), body["temperature"] == 0
    law = SamplingLaw(codec.vocab_size, codec.eos_token_id, temperature=1.0 if greedy else body["temperature"])
    drawn = sample_responses(
        policy, [body["prompt"]], law, max_new_tokens=body["max_tokens"], seeds=[[body["seed"]]], greedy=greedy
    )
    ids, logp = drawn.response_ids[0].tolist(), drawn.logp[0].tolist()
    if not processed and law.temperature != 1:
        plain = Rollout.of_tokens([body["prompt"]], [ids], replace(law, temperature=1.0))
        logp = teacher_forced_logp(policy, plain)[0].tolist()
    return {
        "object": "text_completion",
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "text": codec.decode(ids),
                "finish_reason": "stop" if ids[-1] == codec.eos_token_id else "length",
                "stop_reason": None,
                "token_ids": ids,
                "prompt_token_ids": body["prompt"],
                "logprobs": {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": logp},
            }
        ],
    }


@contextmanager
def serving_model(
    policy: CausalLM, change: Callable[[dict[str, Any]], Any] = lambda answer: answer, **kwargs: Any
) -> Iterator[Served]:
    """A server that answers with `policy`, after `change` was made to each answer."""
    one_at_a_time = threading.Lock()  # the model is not the subject here

    def handle(connection: BaseHTTPRequestHandler, body: Any, _: int) -> None:
        with one_at_a_time:
            answer = change(completion(policy, body, **kwargs))
        reply(connection, answer)

    with serving(handle) as served:
        yield served


def scoring(score: Callable[[list[str], list[str]], Any]) -> Handler:
    """What a reward server does that works."""

    def handle(connection: BaseHTTPRequestHandler, body: Any, _: int) -> None:
        reply(connection, {"id": body["id"], "scores": score(body["prompts"], body["responses"])})

    return handle


def chat(content: Any) -> dict[str, Any]:
    """What a server answers with whose model replies with this."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}


def chatting(answer: Callable[[str], Any]) -> Handler:
    """What a chat server does whose model replies so to a user's one message."""

    def handle(connection: BaseHTTPRequestHandler, body: Any, _: int) -> None:
        (message,) = body["messages"]
        reply(connection, chat(answer(message["content"])))

    return handle
