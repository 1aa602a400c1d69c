"""Ctrl-C and a cluster's SIGTERM, which never tear an update apart."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked to stop; `number` is which."""

    def __init__(self, number: int = signal.SIGINT, message: str = "") -> None:
        super().__init__(message)
        self.number = number


class Interrupt:
    """While entered, SIGINT, SIGTERM and SIGHUP raise Stopped at once, but after a `deferred()`
    block inside one.

    A second signal inside a deferred block raises at once and leaves `torn` set: what the block was
    changing is half changed and must not be saved. A SIGHUP that was ignored before (nohup) stays
    ignored. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending = 0
        self._previous: dict[int, Any] = {}
        self.torn = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (number == signal.SIGHUP and ignored):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back until the block has ended."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._pending and self._depth == 0:
            number, self._pending = self._pending, 0
            raise Stopped(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._depth and not self._pending:
            self._pending = number
            return
        self.torn = self._depth > 0
        raise Stopped(number)
