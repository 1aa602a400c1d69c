"""What a run says: a header, one line per update, the final table.

In a terminal a progress bar stays below. Anywhere else (CI, a file, a pipe) everything is plain
ASCII: logs stay readable and can be searched.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hero.config import redacted
from hero.report.comparison import compare
from hero.text import harmless

WIDTH = 100
EVERY = 30.0
"""Seconds between two lines of a counter where there is no terminal."""
TOGETHER = 0.01
"""Share of the time so far within which what ends has ended together."""
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
        self._total = self._done = 0
        self._training: TaskID | None = None
        self._began = self._paced = 0.0
        self._spent: Counter[str] = Counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}, left"),
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
        self._total, self._done, self._began, self._paced = total, done, time.monotonic(), 0.0
        self._training = self._progress.add_task(
            "training", total=total, completed=done, unit="updates"
        )
        try:
            with self._progress:
                yield
        finally:
            self._progress.remove_task(self._training)
            self._training = None

    @contextmanager
    def counting(
        self, stage: str, unit: str = "episodes", before: int = 0
    ) -> Iterator[Callable[[int, int], None]]:
        """A counter with the time left: a function of what is done and how much there is.

        In a terminal it is a bar; elsewhere a line every `EVERY` seconds. What ends together, as
        the episodes of a batch may, is counted together: the time left is that after the last such
        lot. An earlier process has done what is `before`.
        """
        task = self._progress.add_task(f"{stage:<10}", total=None, unit=unit)
        is_outermost = not self._progress.live.is_started
        started = said = lot = latest = time.monotonic()
        counted = before

        def count(done: int, total: int) -> None:
            nonlocal said, lot, latest, counted
            self._progress.update(task, completed=done, total=total)
            now = time.monotonic()
            if now - lot > TOGETHER * (now - started):
                lot = now
                if not self.terminal and counted > before and now - said >= EVERY:
                    pace = (latest - started) / (counted - before)
                    left = max(0.0, pace * (total - counted) - (now - latest))
                    self.say(f"{stage}: {done} of {total} {unit}, about {left:.0f} s left")
                    said = now
            counted, latest = done, now

        if is_outermost:
            self._progress.start()
        try:
            yield count
        finally:
            if is_outermost:
                self._progress.stop()
            self._progress.remove_task(task)

    def stage(self, name: str) -> None:
        """What the update is at, such as "rollout" or "evaluation". Shown in terminals only."""
        if self._training is not None:
            self._progress.update(self._training, description=f"{name:<10}")

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One finished update; `metrics` as given to `Tracker.log`, whatever there is of them."""
        fields = [f"update {step:>{len(str(self._total))}}/{self._total}"]
        for label, name, form in COLUMNS:
            if metrics.get(name) is not None:
                fields.append(f"{label} {form.format(metrics[name])}")
        if spent := sum(value for name, value in metrics.items() if name.startswith("seconds/")):
            fields.append(f"{spent:.1f} s")
        self.say("  ".join(fields))
        if metrics.get("reflection/read_rate") == 0:
            self.say("  no reflection could be read: without hints (reflection/read_rate 0)")
        if self._training is not None:
            self._progress.update(self._training, completed=step)
            self._pace(step, metrics)

    def _pace(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After the first update and then every `EVERY` seconds: where the time goes, what is left.

        Shares are those of all updates since the last such line.
        """
        for name, seconds in metrics.items():
            if name.startswith("seconds/"):
                self._spent[name.removeprefix("seconds/")] += seconds
        now, spent = time.monotonic(), sum(self._spent.values())
        if not spent or (self._paced and now - self._paced < EVERY):
            return
        left = (now - self._began) / max(1, step - self._done) * (self._total - step)
        shares = ", ".join(f"{name} {part / spent:.0%}" for name, part in self._spent.items())
        speed = metrics.get("tokens_per_second")
        self.say(
            f"  time: {shares}" + (f"; {speed:.0f} generated tokens/s" if speed else "")
            + f"; about {timedelta(seconds=round(left))} left"
        )  # fmt: skip
        self._paced = now
        self._spent.clear()

    def final_table(
        self, before: Mapping[str, Any], after: Mapping[str, Any],
        last: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Held-out tasks before and after training; the arguments as in `summary.json`.

        `after` is of the selected weights; those of the last update get a column of their own.

        Raises:
            ValueError: the two evaluations were not made on the same tasks.
        """
        rows = []
        for row, unselected in zip(
            compare(before, after), compare(before, last or after), strict=True
        ):
            cells = [row.label, f"{row.before:.{row.digits}f}", f"{row.after:.{row.digits}f}"]
            cells += [f"{row.difference:+.{row.digits}f}", signed(row.interval, row.digits)]
            rows.append(cells + ([f"{unselected.after:.{row.digits}f}"] if last else []))
        self.table(
            "Held-out tasks, before and after training",
            ["", "before", "after", "difference", "95 % interval", *["last weights"][: bool(last)]],
            rows, "95 % interval: bootstrap over tasks of the paired difference",
        )  # fmt: skip

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = ""
    ) -> None:
        """A table whose first column names the rows."""
        table = Table(
            title=harmless(title), title_justify="left", caption=caption, caption_justify="left",
            box=box.ROUNDED if self.terminal else box.ASCII,
        )  # fmt: skip
        for i, label in enumerate(columns):
            shown = harmless(redacted(label))
            table.add_column(shown, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(harmless(redacted(cell)) for cell in row))
        self._rich.print(table)


def signed(interval: tuple[float, float] | None, digits: int) -> str:
    """An interval of a difference, "-" if there is none."""
    return f"[{', '.join(f'{end:+.{digits}f}' for end in interval)}]" if interval else "-"
