"""What a run says in the terminal: a header, one row per update, the final table.

In a terminal a progress bar and the latest updates stay in place. Anywhere else (CI, a file, a
pipe) everything is plain ASCII and each update is one line: logs stay readable and can be searched.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hero.config import redacted
from hero.report.comparison import compare

WIDTH = 100
ROWS_KEPT = 8
"""Updates that stay visible in a terminal."""

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
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("updates, left"),
            TimeRemainingColumn(),
            console=self._rich,
            expand=True,
        )
        self._rows: deque[list[str]] = deque(maxlen=ROWS_KEPT)

    def say(self, text: str) -> None:
        """A line of information."""
        self._rich.print(redacted(text), soft_wrap=not self.terminal)

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """What is about to run, one fact a line."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts.items():
            grid.add_row(name, redacted(value))
        if self.terminal:
            self._rich.print(Panel(grid, title=Text(title), title_align="left"))
        else:
            self.say(title)
            self._rich.print(grid)

    @contextmanager
    def training(self, total: int, done: int = 0) -> Iterator[None]:
        """Show progress over `total` updates, `done` of which were made before a resume."""
        self._total = total
        if not self.terminal:
            yield
            return
        task = self._progress.add_task("training", total=total, completed=done)
        try:
            with Live(self._view(), console=self._rich, refresh_per_second=4) as self._live:
                yield
        finally:
            self._live = None
            self._progress.remove_task(task)

    def stage(self, name: str) -> None:
        """What the update is at, such as "rollout" or "evaluation". Shown in terminals only."""
        for task in self._progress.task_ids:
            self._progress.update(task, description=f"{name:<10}")

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One finished update; `metrics` as given to `Tracker.log`, whatever there is of them."""
        cells = [_cell(metrics.get(name), form) for _, name, form in COLUMNS]
        spent = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
        seconds = f"{spent:.1f}" if spent else ""
        if self._live is None:
            labels = [label for label, _, _ in COLUMNS]
            fields = [f"{label} {cell}" for label, cell in zip(labels, cells, strict=True) if cell]
            place = f"update {step:>{len(str(self._total))}}/{self._total}"
            self.say("  ".join([place, *fields, *([f"{seconds} s"] if seconds else [])]))
            return
        self._rows.append([str(step), *cells, seconds])
        for task in self._progress.task_ids:
            self._progress.update(task, completed=step)
        self._live.update(self._view())

    def _view(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, header_style="dim")
        for label in ("update", *(label for label, _, _ in COLUMNS), "s"):
            table.add_column(label, justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(*row)
        return Group(table, self._progress) if self._rows else Group(self._progress)

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


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
