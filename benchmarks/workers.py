"""A process for each subject: what breaks a CUDA context, or hangs, takes nobody with it.

Each compiles its kernels while the others compile theirs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Broken(Exception):
    """Why there is no answer: an error with its traceback, the end of the process, the time."""


class Worker:
    """Calls functions, one at a time, in a process of its own; what is passed is pickled."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a call; `answer` says what became of it, the end of the process included."""
        with contextlib.suppress(OSError):
            self._connection.send((function, arguments))

    def answer(self, deadline: float) -> Any:
        """What the call returned.

        Args:
            deadline: when to stop waiting, and the process with it, by `time.monotonic`.

        Raises:
            Broken: it raised, or its process ended, or it was too late.
        """
        if not self._connection.poll(max(0.0, deadline - time.monotonic())):
            self.stop()
            raise Broken("it was not ready in time")
        try:
            succeeded, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            status = self._process.exitcode
            raise Broken(f"its process ended with status {status}") from error
        if not succeeded:
            raise Broken(value)
        return value

    def stop(self) -> None:
        self._process.kill()
        self._connection.close()


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments)))
        except Exception as error:
            lines = traceback.format_exc().splitlines()[-8:]
            connection.send((False, f"{type(error).__name__}: {error}\n" + "\n".join(lines)))
