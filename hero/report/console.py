"""What a run says: a header, one line per update, the final table.

In a terminal a progress bar stays below. Anywhere else (CI, a file, a pipe) everything is plain
ASCII: logs stay readable and can be searched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hero.config import redacted
from hero.report.comparison import compare
from hero.text import harmless

WIDTH = 100
COLUMNS = (
    # label, metric, format
    ("reward", "rewards/mean", "{:.2f}"),
    ("success", "rollout/success", "{:.0%}"),
    ("turns", "rollout/turns_mean", "{:.1f}"),
    ("hints", "reflection/non_empty_rate", "{:.0%}"),
    ("div err", "divergence/error_turns", "{:.3f}"),
    ("div ok", "divergence/clean_turns", "{:.3f}"),
    ("dev", "dev/success", "{:.1%}"),
)


class Console:
    """Everything a run prints goes through one of these."""

    def __init__(self, file: TextIO | None = None, terminal: bool | None = None) -> None:
        """Write to `file` (default: standard output); `terminal` overrides what it says it is."""
        self._rich = RichConsole(
            file=file or sys.stdout,
            force_terminal=terminal,
            # Texts of tasks and errors hold brackets and colons: they are data, not markup.
            markup=False,
            emoji=False,
            highlight=False,
        )
        self.terminal = self._rich.is_terminal
        self._rich.width = min(self._rich.width, WIDTH) if self.terminal else WIDTH
        self._total = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("updates, left"),
            TimeRemainingColumn(),
            console=self._rich,
            expand=True,
            disable=not self.terminal,
        )

    def say(self, text: str) -> None:
        """A line of information."""
        self._rich.print(harmless(redacted(text)), soft_wrap=not self.terminal)

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """What is about to run, one fact per line."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts.items():
            grid.add_row(name, harmless(redacted(value)))
        self.say(title)
        self._rich.print(grid)

    @contextmanager
    def training(self, total: int, done: int = 0) -> Iterator[None]:
        """Show progress over `total` updates, `done` of which were made before a resume."""
        self._total = total
        task = self._progress.add_task("training", total=total, completed=done)
        try:
            with self._progress:
                yield
        finally:
            self._progress.remove_task(task)

    def stage(self, name: str) -> None:
        """What the update is at, such as "rollout" or "evaluation". Shown in terminals only."""
        for task in self._progress.task_ids:
            self._progress.update(task, description=f"{name:<10}")

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One finished update; `metrics` as given to `Tracker.log`, whatever there is of them."""
        fields = [f"update {step:>{len(str(self._total))}}/{self._total}"]
        for label, name, form in COLUMNS:
            if metrics.get(name) is not None:
                fields.append(f"{label} {form.format(metrics[name])}")
        if spent := sum(value for name, value in metrics.items() if name.startswith("seconds/")):
            fields.append(f"{spent:.1f} s")
        self.say("  ".join(fields))
        for task in self._progress.task_ids:
            self._progress.update(task, completed=step)

    def final_table(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Held-out tasks before and after training; the arguments as in `summary.json`.

        Raises:
            ValueError: the two evaluations were not made on the same tasks.
        """
        table = Table(
            title="Held-out tasks, before and after training",
            title_justify="left",
            box=box.ROUNDED if self.terminal else box.ASCII,
            caption="95 % interval: bootstrap over tasks of the paired difference",
            caption_justify="left",
        )
        table.add_column("")
        for label in ("before", "after", "difference", "95 % interval"):
            table.add_column(label, justify="right")
        for row in compare(before, after):
            low_high = [f"{end:+.{row.digits}f}" for end in row.interval or ()]
            table.add_row(
                row.label,
                f"{row.before:.{row.digits}f}",
                f"{row.after:.{row.digits}f}",
                f"{row.difference:+.{row.digits}f}",
                f"[{', '.join(low_high)}]" if low_high else "-",
            )
        self._rich.print(table)
