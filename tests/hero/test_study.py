"""Studies: what is run, what is refused, and what the figures say; oracles are worked by hand."""

from __future__ import annotations

from hero.config import TrainConfig
from hero.state import State


def test_updates_without_signal_end_a_run_only_if_asked() -> None:
    state = State(update=10, idle_updates=7)
    assert state.finished(TrainConfig(max_idle_updates=5)) and "max_idle_updates" in state.stopped
    assert not state.finished(TrainConfig(max_idle_updates=0))


def test_a_collapsed_run_goes_on_if_nothing_shall_stop_it() -> None:
    def judged(drop: float) -> str:
        state = State(best_dev=0.6, watched={"dev/cut_rate": 0.1, "entropy": 1.0})
        state.judge({"dev/success": 0.0, "dev/cut_rate": 1.0, "entropy": 0.1}, 5, drop)
        return state.collapse

    assert judged(0.3) and not judged(1.0)
