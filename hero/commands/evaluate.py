"""`hero eval` and `hero compare`."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from hero.commands.play import Play, weights_of
from hero.config import redacted
from hero.files import check_writable, only_writer, write_atomic
from hero.interrupt import Interrupt, Stopped
from hero.models import existing_model, find_model, revision
from hero.report.comparison import FIGURES, Comparison, bootstrap_interval, compare
from hero.report.console import Console, signed
from hero.text import in_words
from hero.types import Fault

if TYPE_CHECKING:  # they load torch
    from hero.evaluated import EvalFolder, Evaluated


@dataclass(kw_only=True)
class Evaluating(Play):
    """Base of the commands that need evaluations."""

    output: str = ""
    """Folder for the results, with a folder for each model; "" prints only."""

    def evaluated(self, model: str) -> Evaluated:
        """The evaluation of a model: what is missing of it is played."""
        existing_model(str(weights_of(model)))
        from hero.evaluated import RESULT, SETTINGS, EvalFolder, Evaluated, read_evaluated
        from hero.evaluation import summarise

        settings = redacted(asdict(self.settings))
        if not self.output:
            played, world = self.played(model)
            result = summarise(played).to_dict()
            return Evaluated(name=model, result=result, settings=settings, world=world)
        if Path(self.output).is_file():
            raise ValueError(f"--output {self.output} is a file; expected a folder, or a new name.")
        path = self.folder(model).absolute()  # worlds may change the folder one stands in
        saved = {"model": model, "weights": _fingerprint(weights_of(model)), **settings}
        if not (path / SETTINGS).is_file():
            EvalFolder(path, saved)  # begins one, or refuses the folder
        with only_writer(path, "hero eval", "--output"):
            kept = EvalFolder(path, saved)
            if not (path / RESULT).is_file():
                self._fill(kept, model)
        found = read_evaluated(path)
        assert found is not None
        return found

    def _fill(self, kept: EvalFolder, model: str) -> None:
        """Play what is missing."""
        message = f"The episodes so far are in {kept.path}; the same command goes on with them."
        try:
            with Interrupt():
                _, world = self.played(model, kept)
        except KeyboardInterrupt as stop:
            raise Stopped(getattr(stop, "number", signal.SIGINT), message) from None
        except Fault as fault:
            fault.add_note(message)
            raise
        kept.close(world)

    def folder(self, model: str) -> Path:
        """Of the evaluation of one model."""
        return Path(self.output) / re.sub(r"[^\w.-]+", "-", model).strip("-.")


@dataclass(kw_only=True)
class Eval(Evaluating):
    """How often, how well and in how many turns models solve held-out tasks.

    For a run: its own test tasks with its own settings, so that the figures are those of its
    summary. Several models play the same tasks with the same seeds. An evaluation with an --output
    that was interrupted goes on where it stopped.
    """

    model: Annotated[list[str], Positional, arg(metavar="MODEL…")]
    """Folders or hub ids of models, or folders of runs: their best models."""

    def models(self) -> list[str]:
        return self.model

    def run(self) -> None:
        if len({self.folder(model) for model in self.model}) < max(1, len(self.model)):
            raise ValueError(f"Name each model once, and at least one; got {self.model or 'none'}.")
        config, console = self.settings, Console()
        found = [self.evaluated(model) for model in self.model]
        number = len(found[0].result["per_task"])
        console.table(
            f"{config.split} tasks of {config.env.name}: {number} x {config.trials}",
            ["", *self.model], _rows(found), "in brackets: 95 % interval, bootstrap over tasks",
        )  # fmt: skip
        if found[0].world:
            console.say(in_words(found[0].world))
        for model in self.model if self.output else ():
            console.say(f"{model}: {self.folder(model)}")


def _rows(found: list[Evaluated]) -> list[list[str]]:
    """A row a figure, a column a model."""
    rows = []
    for key, label, scale, digits in FIGURES:
        row = [label]
        for result in (one.result for one in found):
            values = [scale * task[key] for task in result["per_task"].values() if key in task]
            if not values:
                row.append("-")
                continue
            low, high = bootstrap_interval(values)
            row.append(f"{scale * result[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        rows.append(row)
    most = max(map(int, found[0].result["pass_any"]))
    for name, key in (("pass@", "pass_any"), ("pass^", "pass_all")) if most > 1 else ():
        by_model = [{int(k): share for k, share in one.result[key].items()} for one in found]
        rows.append([f"{name}{most} %", *(f"{100 * shares[most]:.1f}" for shares in by_model)])
    if all("seconds" in one.result for one in found):
        rows.append(["seconds", *(f"{one.result['seconds']:.0f}" for one in found)])
    return rows


@dataclass(kw_only=True)
class Compare(Evaluating):
    """Whether B is better than A: both on the same tasks, task by task.

    A and B are folders of `hero eval`, runs with a test evaluation, or models. A model is played
    first, with the settings below.
    """

    a: Annotated[str, Positional, arg(metavar="A")]
    b: Annotated[str, Positional, arg(metavar="B")]

    def models(self) -> list[str]:
        return [self.a, self.b]

    def run(self) -> None:
        from hero.evaluated import difference, read_evaluated
        from hero.report.side_by_side import render

        folder = Path(self.output).absolute()
        page, file = folder / "compare.html", folder / "compare.json"
        if self.output:
            check_writable(page, " · HERO</title>")
            check_writable(file, '"worlds"')
        try:
            one, other = (
                read_evaluated(Path(model)) or self.evaluated(model) for model in self.models()
            )
        except ValueError as mistake:
            mistake.add_note("A and B are folders of hero eval, runs, or models to be played.")
            raise
        rows, console = compare(one.result, other.result, FIGURES), Console()
        known = {name: value for name, value in other.settings.items() if name in one.settings}
        shared = {name: one.settings[name] for name in known}
        unlike = difference(shared, known) + difference(one.world, other.world)
        for letter, side in (("A", one), ("B", other)):
            console.say(f"{letter}: {side.name}")
            if side.world:
                console.say(f"   {in_words(side.world)}")
        if unlike:
            console.say("They were not played with the same settings:\n" + "\n".join(unlike))
        number = len(one.result["per_task"])
        console.table(
            f"{number} tasks, paired", ["", "A", "B", "B - A", "95 % interval", "told from noise"],
            [_cells(row) for row in rows], "95 % interval: bootstrap over tasks",
        )  # fmt: skip
        if self.output:
            render(one, other, rows, unlike, page)
            found = {
                "a": one.name,
                "b": other.name,
                "worlds": [one.world, other.world],
                "tasks": number,
                "settings_that_differ": unlike,
            }
            write_atomic(file, json.dumps(found | {"rows": [_json(row) for row in rows]}, indent=1))
            console.say(f"{page} (episodes side by side), {file}")


def _cells(row: Comparison) -> list[str]:
    n = row.digits
    return [
        row.label, f"{row.before:.{n}f}", f"{row.after:.{n}f}", f"{row.difference:+.{n}f}",
        signed(row.interval, n), row.words,
    ]  # fmt: skip


def _json(row: Comparison) -> dict[str, Any]:
    return {
        "label": row.label, "a": row.before, "b": row.after, "difference": row.difference,
        "interval": row.interval, "told_from_noise": row.is_told, "tasks_needed": row.needed,
    }  # fmt: skip


def _fingerprint(model: Path) -> dict[str, Any]:
    """By which other weights under the same name are seen: size and time of each file of weights,
    or the commit of a model of the hub."""
    folder = Path(find_model(str(model)))
    if not folder.is_dir():
        return {"revision": revision(str(folder))}
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
