"""Signals that wait until a run can keep what it has learned."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_env import processes

_SAID = b"\nfinishing what is running, to keep it; a second signal ends at once\n"
_AGAIN = 0.5  # seconds between attempts, should somebody's `except:` swallow the first


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end of what was going on."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class InterruptedAgain(Interrupted):
    """A second signal: nothing more is to be kept."""


def exit_code(error: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (error.signum if isinstance(error, Interrupted) else signal.SIGINT)


@contextmanager
def postponed_signals(grace: float = 4.0) -> Iterator[Callable[[], None]]:
    """Inside, SIGINT and SIGTERM wait for the next call of the function given, which raises `Interrupted` after one.

    Where none comes within `grace` seconds, or before the end, it is raised all the same; from then on the caller has
    all the time it needs to clean up. Where several `processes` work together, one that got a signal ends them all at
    the same call. A second signal raises `InterruptedAgain` at once. Only the main thread can handle signals: in any
    other nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: int | None = None
    has_timer = hasattr(signal, "setitimer")  # not on Windows

    def disarm() -> None:
        if came is not None and has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def raise_if_asked() -> None:
        if asked := [each for each in processes.gather(came) if each is not None]:
            disarm()
            raise Interrupted(asked[0])

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        if came is not None and not isinstance(sys.exc_info()[1], Interrupted):  # that is on its way out already
            raise Interrupted(came)

    def on_signal(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        if came is not None:
            raise InterruptedAgain(came)
        came = signum
        os.write(2, _SAID)  # print is not reentrant
        if has_timer:
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, on_alarm)
            signal.setitimer(signal.ITIMER_REAL, grace, _AGAIN)

    before = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield raise_if_asked
        raise_if_asked()
    finally:
        disarm()
        for signum, handler in before.items():
            signal.signal(signum, handler)
