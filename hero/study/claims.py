"""The five claims of docs/method.md, section 9, as far as a study's rows decide them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hero.study.plan import BASE, StudyConfig
from hero.study.statistics import Row, interval, values

MARGIN = 0.05
"""What "not worse" allows for, in success or recall."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison that a claim needs."""

    words: str
    start: str
    value: float
    low: float
    high: float
    bound: float = 0.0
    """The claim is that the difference is above it."""
    unit: float = 100.0
    """Shown are multiples: 100 for points of success, -1 for fewer turns."""

    @property
    def verdict(self) -> str:
        if self.low > self.bound:
            return "confirmed"
        return "denied" if self.high < self.bound else "undecided"

    def __str__(self) -> str:
        low, high = sorted((self.unit * self.low, self.unit * self.high))
        return f"{self.words} | {self.unit * self.value:+.1f} ({low:+.1f} to {high:+.1f})"


@dataclass(frozen=True, kw_only=True)
class Claim:
    number: int
    words: str
    parts: list[Part]

    def verdict(self, start: str) -> str:
        """At a start: confirmed if all parts are, denied if one is."""
        found = {part.verdict for part in self.parts if part.start == start}
        if not found:
            return "not measured"
        if "denied" in found:
            return "denied"
        return "confirmed" if found == {"confirmed"} else "undecided"


def claims(study: StudyConfig, rows: Sequence[Row]) -> list[Claim]:
    """All five; a claim without the arms that it needs has no parts and is undecided."""
    arms = Arms(study, rows)
    first = next(iter(study.arms))
    small = study.marks[0]
    return [
        Claim(number=1, words="hero > env_only > base > full_demo in success", parts=[
            part
            for pair in ((first, "env_only"), ("env_only", BASE), (BASE, "full_demo"))
            for part in arms.difference(*pair)
        ]),
        Claim(number=2, words="fewer turns than grpo at equal or better success", parts=[
            *arms.difference(first, "grpo", bound=-MARGIN),
            *arms.difference(first, "grpo", figure="turns"),
        ]),
        Claim(number=3, words=f"within {small:,} turns hero rises more than its rivals", parts=[
            part
            for other in (BASE, "reinforce", "grpo")
            for part in arms.difference(first, other, marks=(0,))
        ]),
        Claim(number=4, words="every control loses the gain", parts=[
            part for control in study.controls for part in arms.difference(first, control)
        ]),
        Claim(number=5, words="nothing else is forgotten: the model still diagnoses", parts=[
            *arms.kept(first)
        ]),
    ]  # fmt: skip


class Arms:
    """Comparisons of two arms at every start and budget where both were run."""

    def __init__(self, study: StudyConfig, rows: Sequence[Row]) -> None:
        self.study, self.rows = study, rows
        self.marks = range(len(study.marks))

    def difference(
        self, one: str, other: str, *, figure: str = "success", bound: float = 0.0,
        marks: Sequence[int] | None = None,
    ) -> Iterator[Part]:  # fmt: skip
        """`one` minus `other`; of turns, fewer are better."""
        there = {(row["start"], row["arm"]) for row in self.rows}
        unit, shown = (100.0, "success, points") if figure == "success" else (-1.0, figure)
        for start in self.study.starts:
            if not {(start, one), (start, other)} <= there:
                continue
            for mark in marks or self.marks:
                pair = [values(self.rows, start, arm, mark, figure) for arm in (one, other)]
                own, rival = pair if unit > 0 else reversed(pair)
                low, high = interval(own, rival)
                yield Part(
                    words=f"{one} - {other} | {shown} | {start}, {self.study.marks[mark]:,}",
                    start=start, value=float(own.mean() - rival.mean()),
                    low=low, high=high, bound=bound, unit=unit,
                )  # fmt: skip

    def kept(self, arm: str) -> Iterator[Part]:
        """Recall of faults by the trained model itself, minus the start's; over seeds."""
        for start in self.study.starts:
            recalls = {
                name: np.array([
                    [row["diagnosing"]["recall"]] for row in self.rows
                    if row["start"] == start and row["arm"] == name
                    and "recall" in row.get("diagnosing", {})
                ])
                for name in (arm, BASE)
            }  # fmt: skip
            own, before = recalls[arm], recalls[BASE]
            if own.size and before.size:
                low, high = interval(own, before)
                yield Part(
                    words=f"{arm} - {BASE} | recall of faults, points | {start}, the end",
                    start=start, value=float(own.mean() - before.mean()),
                    low=low, high=high, bound=-MARGIN,
                )  # fmt: skip


def claims_table(study: StudyConfig, rows: Sequence[Row]) -> list[str]:
    """Markdown: the verdicts, and what each rests on."""
    there = [start for start in study.starts if any(row["start"] == start for row in rows)]
    lines = ["| claim | " + " | ".join(there) + " |", "|---|" + "---|" * len(there)]
    found = claims(study, rows)
    for claim in found:
        verdicts = " | ".join(f"**{claim.verdict(start)}**" for start in there)
        lines.append(f"| {claim.number}. {claim.words} | {verdicts} |")
    lines += ["", "| claim | difference | of what | start, turns | value (95 %) | |"]
    lines += ["|---|---|---|---|---|---|"]
    for claim in found:
        if not claim.parts:
            lines.append(f"| {claim.number} | not measured: arms or figures are missing | | | | |")
        lines += [f"| {claim.number} | {part} | {part.verdict} |" for part in claim.parts]
    return lines
