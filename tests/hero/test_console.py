"""Counters of long stages."""

from __future__ import annotations

import io

import pytest

from hero.report import console as module
from hero.report.console import Console


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_stage_counts_and_says_what_is_left(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(out, terminal)
    with console.counting("test tasks") as count:
        for done in range(1, 5):
            now[0] += 20.0
            count(done, 4)
    if terminal:
        assert "4/4" in out.getvalue()
    else:  # a line at 40 s and at 80 s
        assert out.getvalue().splitlines() == [
            "test tasks: 2 of 4 episodes, about 40 s left",
            "test tasks: 4 of 4 episodes, about 0 s left",
        ]
