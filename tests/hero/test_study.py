"""Studies: what is run, what is refused, and what the figures say; oracles are worked by hand."""

from __future__ import annotations

from hero.config import TrainConfig
from hero.state import State


def test_updates_without_signal_end_a_run_only_if_asked() -> None:
    state = State(update=10, idle_updates=7)
    assert state.finished(TrainConfig(max_idle_updates=5)) and "max_idle_updates" in state.stopped
    assert not state.finished(TrainConfig(max_idle_updates=0))
