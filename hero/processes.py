"""Python processes that take no module for Python's own from the folder they are started in."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "PYTHONSAFEPATH"
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def safe_path() -> Iterator[None]:
    """Within, a spawned process has the import path of this one from its first import on, and not
    its folder before it; the process calls `started`."""
    with _ONE_AT_A_TIME:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = "1"
        try:
            yield
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def started() -> None:
    """Programs that this process starts find the modules beside them, as usual."""
    os.environ.pop(VARIABLE, None)
