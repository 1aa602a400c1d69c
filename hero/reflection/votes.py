"""Several reflections of an episode: what only a minority of them says is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hero.episodes import derive_seed
from hero.reflection.base import Reflections, Reflector
from hero.types import Diagnosis, Trajectory


def elect(ballots: Sequence[Diagnosis]) -> Diagnosis:
    """Of several diagnoses of one turn the first that at least half of them agree with.

    They agree if all have a hint and the same corrected action; else the turn has no hint.
    """
    hinted = [diagnosis for diagnosis in ballots if diagnosis.hint]
    actions = Counter(diagnosis.corrected_action for diagnosis in hinted).most_common(1)
    if not actions or 2 * actions[0][1] < len(ballots):
        return Diagnosis(turn=ballots[0].turn, source=ballots[0].source)
    return next(d for d in hinted if d.corrected_action == actions[0][0])


@dataclass(frozen=True, slots=True)
class VotingReflector:
    """Asks `inner` several times; statistics of parsing and filters are those of the first."""

    inner: Reflector
    votes: int

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        """Diagnose every turn of every trajectory."""
        rounds = [
            self.inner.reflect(trajectories, derive_seed(seed, vote)) for vote in range(self.votes)
        ]
        diagnoses = [
            [elect(ballots) for ballots in zip(*rows, strict=True)]
            for rows in zip(*(read.diagnoses for read in rounds), strict=True)
        ]
        stats = replace(
            rounds[0].stats,
            non_empty=sum(bool(d.hint) for row in diagnoses for d in row),
            retried=sum(read.stats.retried for read in rounds),
            generated_tokens=sum(read.stats.generated_tokens for read in rounds),
            seconds=sum(read.stats.seconds for read in rounds),
        )
        return Reflections(diagnoses=diagnoses, stats=stats)
