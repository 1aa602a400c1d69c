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

    Several processes have to stop at the same place: with `agreed` a signal waits outside of
    `live()` until they have told each other (ranks.py).
    """

    def __init__(self, agreed: bool = False) -> None:
        self._depth = 0
        self._agreed, self._is_live = agreed, False
        self.pending = 0
        """Number of the signal that waits; 0 for none."""
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
        self._raise_pending()

    @contextmanager
    def live(self) -> Iterator[None]:
        """Within, a signal waits for the end of a deferred block, but for no other process."""
        self._is_live = True
        try:
            self._raise_pending()
            yield
        finally:
            self._is_live = False

    def told(self, number: int) -> Stopped | None:
        """What to raise for a signal that has come to one of the processes; None while deferred."""
        if self._depth:
            return None
        self.pending = 0
        return Stopped(number)

    @property
    def _waits(self) -> bool:
        return self._depth > 0 or (self._agreed and not self._is_live)

    def _raise_pending(self) -> None:
        if self.pending and not self._waits:
            number, self.pending = self.pending, 0
            raise Stopped(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._waits and not self.pending:
            self.pending = number
            return
        self.torn = self._waits
        raise Stopped(number)
