"""Every contestant of every case; see docs/benchmarks.md for the method.

The contestants of a case are timed together, in a round robin (`measure.py`). pytest-benchmark,
which times one test after the other, is given those times to show, compare and store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.baselines import OURS
from benchmarks.measure import speedup
from benchmarks.ours import ALWAYS
from benchmarks.shapes import Case

if TYPE_CHECKING:
    from benchmarks.conftest import Session


class Clock:
    """A timer for pytest-benchmark on which the recorded times pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, seconds: list[float]) -> Callable[[], None]:
        """A function whose calls take these times, one after the other."""
        remaining = iter(seconds)

        def call() -> None:
            self.now += next(remaining)

        return call


CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK)
def test_divergence(case: Case, contestant: str, measurements: Session, benchmark: Any) -> None:
    results = measurements.results(case)
    result = results[contestant]
    if result.skipped:
        if contestant in ALWAYS or (contestant in OURS and result.failed):
            pytest.fail(result.skipped)
        pytest.skip(result.skipped)
    benchmark.group = case.id
    benchmark.extra_info.update(
        extra_bytes=result.extra_bytes,
        loss_error=result.loss_error,
        gradient_errors=result.gradient_errors,
        times_library_gemms=speedup(results, "library-gemms", contestant),
    )
    benchmark.pedantic(CLOCK.replay(result.seconds), rounds=len(result.seconds))
