"""`rlhf-env serve-reward`."""

from __future__ import annotations

import os
import signal
import threading
from typing import Annotated

import typer

from rlhf_env.cli import settings as cli
from rlhf_env.errors import ConfigError


def serve_reward(
    reward: Annotated[str, typer.Argument(metavar="REWARD", help="What to serve, as --reward takes it.")],
    host: Annotated[str, typer.Option(help="Address to listen at; one that others reach needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any that is free.")] = 8000,
    device: Annotated[str, typer.Option(help="Where classifiers run: cpu, cuda, cuda:1, mps.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help=cli.THREADS)] = None,
) -> None:
    """Serve a reward model, for `--reward http://HOST:PORT/score` elsewhere, until Ctrl-C or SIGTERM.

    Where the environment variable RLHF_ENV_REWARD_KEY is set, here and at the client, requests need it as bearer token.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"a port is between 0 and 65535, not {port}")
    cli.use_threads(threads)

    from rlhf_env.reward_models.load import load_reward
    from rlhf_env.reward_models.remote import REWARD_KEY
    from rlhf_env.reward_models.serve import RewardServer
    from rlhf_env.training.assemble import parse_device

    model = load_reward(reward, device=parse_device(device))
    asked_to_end = threading.Event()
    with RewardServer(model, host, port, os.environ.get(REWARD_KEY)) as server:
        before = {each: signal.signal(each, lambda *_: asked_to_end.set()) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
            thread.start()
            print(f"serving {reward} at {server.url}", flush=True)
            asked_to_end.wait()
        finally:
            for each, handler in before.items():  # a second signal does not wait
                signal.signal(each, handler)
            server.shutdown()
