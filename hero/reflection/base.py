"""What a reflector is and what it returns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hero.reflection.filters import HintFilter, Verdict
from hero.types import Diagnosis, Trajectory


@dataclass(kw_only=True, frozen=True, slots=True)
class ReflectionStats:
    """What came of one call of `reflect`. All rates are shares of the turns."""

    turns: int
    parsed: int
    """Turns with a diagnosis that could be read."""
    non_empty: int
    """Turns with a hint, after the filters: those that are trained."""
    leaked: int
    """Turns that lost their hint or corrected action to the leak filter."""
    too_long: int
    """Turns that lost their hint to the length filter."""
    retried: int
    """Further calls for episodes of which nothing could be read."""
    generated_tokens: int
    seconds: float

    @property
    def parsed_rate(self) -> float:
        return self._share(self.parsed)

    @property
    def non_empty_rate(self) -> float:
        return self._share(self.non_empty)

    @property
    def leaked_rate(self) -> float:
        return self._share(self.leaked)

    @property
    def too_long_rate(self) -> float:
        return self._share(self.too_long)

    def metrics(self) -> dict[str, float]:
        return {
            "reflection/turns": float(self.turns),
            "reflection/parsed_rate": self.parsed_rate,
            "reflection/non_empty_rate": self.non_empty_rate,
            "reflection/leaked_rate": self.leaked_rate,
            "reflection/too_long_rate": self.too_long_rate,
            "reflection/retried": float(self.retried),
            "reflection/generated_tokens": float(self.generated_tokens),
            "reflection/seconds": self.seconds,
        }

    def _share(self, count: int) -> float:
        return count / self.turns if self.turns else 0.0


@dataclass(kw_only=True, frozen=True, slots=True)
class Reflections:
    """The diagnoses of a batch of episodes."""

    diagnoses: list[list[Diagnosis]]
    """One for each turn of each trajectory; without a hint where none could be read or shown.

    A turn without a hint is masked, even if it has a corrected action."""
    stats: ReflectionStats
    texts: list[str]
    """What the reflector wrote, one text a trajectory; "" where nothing was asked."""

    @classmethod
    def none(cls, trajectories: Sequence[Trajectory]) -> Reflections:
        """What a method without reflection has: no diagnosis at all."""
        stats = ReflectionStats(
            turns=sum(len(trajectory.turns) for trajectory in trajectories),
            parsed=0, non_empty=0, leaked=0, too_long=0, retried=0, generated_tokens=0, seconds=0.0,
        )  # fmt: skip
        return cls(diagnoses=[[] for _ in trajectories], stats=stats, texts=[])


class Reflector(Protocol):
    """Reads finished episodes."""

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        """Diagnose every turn of every trajectory."""
        ...


def collect(
    trajectories: Sequence[Trajectory],
    found: Sequence[Sequence[Diagnosis]],
    *,
    source: str,
    hint_filter: HintFilter,
    texts: list[str],
    retried: int,
    generated_tokens: int,
    started: float,
) -> Reflections:
    """Filter what was found, fill the turns without a diagnosis, and count."""
    verdicts: list[Verdict] = []
    diagnoses: list[list[Diagnosis]] = []
    for trajectory, of_trajectory in zip(trajectories, found, strict=True):
        of_turns = [Diagnosis(turn=turn) for turn in range(len(trajectory.turns))]
        for diagnosis in reversed(of_trajectory):  # so that of several for one turn the first stays
            of_turns[diagnosis.turn] = replace(diagnosis, source=source)
        for turn, diagnosis in enumerate(of_turns):
            of_turns[turn], verdict = hint_filter.apply(diagnosis, trajectory)
            verdicts.append(verdict)
        diagnoses.append(of_turns)
    all_turns = [diagnosis for of_turns in diagnoses for diagnosis in of_turns]
    stats = ReflectionStats(
        turns=len(all_turns),
        parsed=sum(bool(diagnosis.source) for diagnosis in all_turns),
        non_empty=sum(bool(diagnosis.hint) for diagnosis in all_turns),
        leaked=verdicts.count(Verdict.LEAKED),
        too_long=verdicts.count(Verdict.TOO_LONG),
        retried=retried,
        generated_tokens=generated_tokens,
        seconds=time.perf_counter() - started,
    )
    return Reflections(diagnoses=diagnoses, stats=stats, texts=texts)
