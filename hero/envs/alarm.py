"""A time limit for what a world does in the main thread: an alarm that raises there.

Rollouts have the limit of their workers. Whatever else a world is asked (tasks, oracle, diagnosis,
vocabulary) is asked in the main thread, where a signal ends what loops, sleeps, waits for a socket
or computes in Python. In other threads, and on systems without alarms, there is no limit.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hero.config import RolloutConfig

AGAIN = 1.0
"""Seconds until the alarm rings again, for worlds that catch whatever is raised."""
hangs: Counter[tuple[type, str]] = Counter()
"""How often in a row a method of a class gave no answer."""
_limit = (RolloutConfig.step_timeout, "rollout.step_timeout")


class TimeUp(BaseException):
    """No Exception, so that a world that catches those does not take it for one of its own."""


def set_limit(seconds: float, setting: str = "rollout.step_timeout") -> None:
    """The limit of this process, 0 for none, and the setting that the message names; for a run."""
    global _limit
    _limit = (seconds, setting)
    hangs.clear()


@contextmanager
def alarm() -> Iterator[None]:
    """Raise TimeUp inside the block when the time is up."""
    in_main = threading.current_thread() is threading.main_thread()
    if not (_limit[0] and in_main and hasattr(signal, "setitimer")):
        yield
        return
    handler = signal.signal(signal.SIGALRM, _ring)
    timer = signal.setitimer(signal.ITIMER_REAL, _limit[0], AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _ring(number: int, frame: object) -> None:
    seconds, setting = _limit
    raise TimeUp(f"no answer within {setting}={seconds:g} s; raise it if the world needs longer")
