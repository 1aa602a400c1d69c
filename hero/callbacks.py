"""Five places of a run where code of yours can stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hero.types import Diagnosis, Trajectory


class Callback:
    """Override what you need. What is raised ends the run as any error does: with what is finished
    saved. A run that goes on after an interruption repeats no update and none of its calls. Of
    several processes the first one alone calls them."""

    def on_start(self, trainer: Any) -> None:
        """Before anything is played, also when a run goes on; with its hero.trainer.Trainer."""

    def on_episodes(
        self, update: int, trajectories: Sequence[Trajectory],
        diagnoses: Sequence[Sequence[Diagnosis]],
    ) -> None:  # fmt: skip
        """Before an update learns: its episodes, and of each one diagnosis a turn (empty without a
        reflector). What is changed in them is what is learnt from."""

    def on_update(self, update: int, metrics: Mapping[str, float]) -> None:
        """After an update is logged, `metrics` as `metrics.jsonl` has them."""

    def on_evaluation(
        self, update: int, trajectories: Sequence[Trajectory], metrics: Mapping[str, float]
    ) -> None:
        """After the dev tasks were played; update 0 is before training."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """After the run, with what `summary.json` holds."""


class _OnUpdate(Callback):
    def __init__(self, function: Callable[[int, Mapping[str, float]], object]) -> None:
        self.function = function

    def on_update(self, update: int, metrics: Mapping[str, float]) -> None:
        self.function(update, metrics)


class Callbacks:
    """Several: a call of one of the five places goes to all, in order; a function among them gets
    number and metrics of each update.

    Raises:
        TypeError: what is neither.
    """

    def __init__(self, given: Sequence[Callback | Callable[[int, Any], object]]) -> None:
        self._all: list[Callback] = []
        for callback in given:
            if isinstance(callback, Callback):
                self._all.append(callback)
            elif isinstance(callback, type) or not callable(callback):
                raise TypeError(
                    "A callback is an object of a class derived from hero.callbacks.Callback, or a "
                    f"function of number and metrics; got {callback!r}."
                )
            else:
                self._all.append(_OnUpdate(callback))

    def __getattr__(self, place: str) -> Callable[..., None]:
        getattr(Callback, place)  # there is such a place

        def tell(*told: Any) -> None:
            for callback in self._all:
                getattr(callback, place)(*told)

        return tell
