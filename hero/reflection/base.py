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
    """What came of one call of `reflect`, in turns unless said otherwise."""

    turns: int
    parsed: int = 0
    """Turns with a diagnosis that was written and could be read."""
    asked: int = 0
    """Episodes that a model was asked to read."""
    read: int = 0
    """Those of them whose answer could be read, be it that no turn has a fault."""
    non_empty: int = 0
    """Turns with a hint, after the filters."""
    hinted: int = 0
    """Turns with a hint, before the filters."""
    specific: int = 0
    """Those of them that give away a name which could not be known at their turn."""
    naming: int = 0
    """Those of them that name their corrected action: an answer, not a rule."""
    leaked: int = 0
    """Turns that lost their hint or corrected action to the leak filter."""
    too_long: int = 0
    """Turns that lost their hint to the length filter."""
    retried: int = 0
    """Further calls for episodes of which nothing could be read."""
    replayed: int = 0
    """Turns played again to try corrected actions: no part of `max_env_turns`."""
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def unread(self) -> bool:
        """A model was asked, and nothing that it wrote could be read."""
        return self.asked > 0 and not self.read

    def metrics(self) -> dict[str, float]:
        """Rates are shares of the turns; `specific_rate` and `naming_rate` of those with a hint."""
        of_episodes = {}
        if self.asked:
            share = self.read / self.asked
            of_episodes = {"reflection/asked": float(self.asked), "reflection/read_rate": share}
        rates = ("parsed", "non_empty", "leaked", "too_long")
        return {
            "reflection/turns": float(self.turns),
            **{f"reflection/{n}_rate": getattr(self, n) / max(1, self.turns) for n in rates},
            **of_episodes,
            "reflection/specific_rate": self.specific / max(1, self.hinted),
            "reflection/naming_rate": self.naming / max(1, self.hinted),
            "reflection/retried": float(self.retried),
            **({"reflection/replayed_turns": float(self.replayed)} if self.replayed else {}),
            "reflection/generated_tokens": float(self.generated_tokens),
            "reflection/seconds": self.seconds,
        }


@dataclass(kw_only=True, frozen=True, slots=True)
class Reflections:
    """The diagnoses of a batch of episodes."""

    diagnoses: list[list[Diagnosis]]
    """One for each turn of each trajectory; without a hint where none could be read or shown.

    A turn without a hint is masked, even if it has a corrected action."""
    stats: ReflectionStats

    @classmethod
    def none(cls, trajectories: Sequence[Trajectory]) -> Reflections:
        """What a method without reflection has: no diagnosis at all."""
        turns = sum(len(trajectory.turns) for trajectory in trajectories)
        return cls(diagnoses=[[] for _ in trajectories], stats=ReflectionStats(turns=turns))


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
    started: float,
    asked: int = 0,
    read: int = 0,
    retried: int = 0,
    generated_tokens: int = 0,
) -> Reflections:
    """Filter what was found, fill the turns without a diagnosis, and count."""
    verdicts: list[Verdict] = []
    hinted: list[Diagnosis] = []
    specific = 0
    diagnoses: list[list[Diagnosis]] = []
    for trajectory, of_trajectory in zip(trajectories, found, strict=True):
        of_turns = [Diagnosis(turn=turn) for turn in range(len(trajectory.turns))]
        for diagnosis in reversed(of_trajectory):  # so that of several for one turn the first stays
            of_turns[diagnosis.turn] = replace(diagnosis, source=source)
        for turn, diagnosis in enumerate(of_turns):
            if diagnosis.hint:
                hinted.append(diagnosis)
                specific += hint_filter.is_specific(diagnosis, trajectory)
            of_turns[turn], verdict = hint_filter.apply(diagnosis, trajectory)
            verdicts.append(verdict)
        diagnoses.append(of_turns)
    all_turns = [diagnosis for of_turns in diagnoses for diagnosis in of_turns]
    stats = ReflectionStats(
        turns=len(all_turns),
        parsed=sum(bool(diagnosis.source) for diagnosis in all_turns),
        non_empty=sum(bool(diagnosis.hint) for diagnosis in all_turns),
        hinted=len(hinted),
        specific=specific,
        naming=sum(bool(d.corrected_action) and d.corrected_action in d.hint for d in hinted),
        leaked=verdicts.count(Verdict.LEAKED),
        too_long=verdicts.count(Verdict.TOO_LONG),
        asked=asked,
        read=read,
        retried=retried,
        generated_tokens=generated_tokens,
        seconds=time.perf_counter() - started,
    )
    return Reflections(diagnoses=diagnoses, stats=stats)
