"""What `hero probe` prints, one table and what it says in words, and its page with examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hero.report.comparison import bootstrap_interval
from hero.types import Trajectory

if TYPE_CHECKING:
    from hero.evaluation import Probe

EXAMPLES = 3
"""Turns of each context that the page shows, first those where hindsight made a difference."""


def report(
    model: str, episodes: Sequence[Trajectory], grouped: Sequence[Trajectory], reward: str,
    gaps: Mapping[str, Probe], reflecting: Mapping[str, float], line: Mapping[str, float] | None,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """The text, and the figures as they are written to a file.

    Args:
        model: its name.
        episodes: one of each task.
        grouped: eight of each of some tasks.
        reward: `env.reward`.
        gaps: of each context.
        reflecting: parse rate and agreement of the model's own reflections.
        line: `fit.json` of a study, or None.
    """
    from hero.probe import advice

    turns = [turn for episode in episodes for turn in episode.turns]
    well_formed = sum(turn.parse_ok for turn in turns) / max(1, len(turns))
    successes = [float(episode.success) for episode in episodes]
    success = sum(successes) / len(successes)
    low, high = bootstrap_interval(successes)
    silent = silent_groups(grouped, reward)
    lines = [
        f"{model} on {len(episodes)} tasks:",
        f"  well-formed actions  {well_formed:.0%}",
        f"  success              {success:.1%} (95 % interval {low:.1%} to {high:.1%})",
        f"  GRPO groups of eight without signal  {silent:.0%}",
    ]
    if reflecting:
        shown = ", ".join(f"{name} {value:.0%}" for name, value in reflecting.items())
        lines.append(f"  its own reflections  {shown}")
    if gaps:
        lines += ["", f"  {'context':<20} {'trained':>8} {'student':>8} {'teacher':>8} {'gap':>7}"]
        lines[-1] += "  expected gain" if line else ""
    for name, gap in sorted(gaps.items(), key=lambda item: -item[1].gap):
        row = f"  {name:<20} {gap.share:8.0%} {gap.student_right:8.0%} {gap.teacher_right:8.0%}"
        row += f" {gap.gap:+7.2f}"
        if line:
            gain = line["intercept"] + line["slope"] * gap.gap
            row += f"  {100 * gain:+.0f} points (within {200 * line['spread']:.0f} in most runs)"
        lines.append(row)
    said = advice(success, well_formed, silent, dict(gaps))
    figures = {
        "model": model, "well_formed": well_formed, "success": success, "interval": [low, high],
        "silent_groups": silent, "reflecting": dict(reflecting), "advice": said,
        "gaps": {name: gap.figures for name, gap in gaps.items()},
    }  # fmt: skip
    return "\n".join([*lines, "", *said]), figures


def page(text: str, gaps: Mapping[str, Probe]) -> Iterator[str]:
    """Lines of Markdown: what was printed, then turns that were answered again in each context."""
    yield from (f"    {line}" if line.startswith("  ") else line for line in text.splitlines())
    for name, gap in gaps.items():
        yield f"## Examples: {name}"
        differing = sorted(gap.answers, key=lambda it: it.student_right == it.teacher_right)
        for answer in differing[:EXAMPLES]:
            right = {True: "right", False: "wrong"}
            for what, said in (
                ("The agent saw", answer.saw), ("It did", answer.acted),
                ("The teacher reads besides", answer.hindsight),
                (f"Asked again, without it ({right[answer.student_right]})", answer.student),
                (f"With it ({right[answer.teacher_right]})", answer.teacher),
            ):  # fmt: skip
                yield f"**{what}:** {' '.join(said.split()) or 'nothing'}"
            yield "---"


def silent_groups(episodes: Sequence[Trajectory], reward: str) -> float:
    """Share of tasks whose episodes all have the same reward."""
    rewards: dict[str, set[float]] = defaultdict(set)
    for episode in episodes:
        paid = episode.reward if reward == "score" else float(episode.success)
        rewards[episode.task_id].add(round(paid, 6))
    return sum(len(found) == 1 for found in rewards.values()) / max(1, len(rewards))
