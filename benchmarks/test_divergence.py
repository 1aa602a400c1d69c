"""Every contestant of every case; see docs/benchmarks.md for the method.

The contestants of a case are timed together, in a round robin (`measure.py`), when its first test
asks. A test fails if one of ours cannot serve what it should, or computes something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.baselines import OURS
from benchmarks.ours import ALWAYS
from benchmarks.shapes import Case

if TYPE_CHECKING:
    from benchmarks.conftest import Session


def test_divergence(case: Case, contestant: str, measurements: Session) -> None:
    result = measurements.results(case)[contestant]
    if result.skipped and (contestant in ALWAYS or (contestant in OURS and result.failed)):
        pytest.fail(result.skipped)
    if result.skipped:
        pytest.skip(result.skipped)
    assert result.seconds
