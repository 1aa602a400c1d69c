"""Ctrl-C that never tears an update apart."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """While entered, Ctrl-C (SIGINT) raises KeyboardInterrupt at once, but after a `deferred()`
    block inside one.

    A second Ctrl-C inside a deferred block raises at once and leaves `torn` set: what the block was
    changing is half changed and must not be saved. Outside the main thread signals are left
    alone.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending = False
        self._previous: Any = None
        self.torn = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold Ctrl-C back until the block has ended."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._pending and self._depth == 0:
            self._pending = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._depth and not self._pending:
            self._pending = True
            return
        self.torn = self._depth > 0
        raise KeyboardInterrupt
