"""`hero study`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from hero.commands.base import Command, make_importable
from hero.config import EnvConfig
from hero.config.kinds import CountOrZero
from hero.report.console import Console


@dataclass(kw_only=True)
class Study(Command):
    """Compare methods: arms x starts x seeds at equal budgets of environment turns.

    What is done is not done again, so an interrupted study goes on where it was.
    """

    name: Annotated[str, Positional, arg(metavar="STUDY")]
    """Name of a shipped study (`hero recipes`), or a YAML file (docs/study.md)."""
    output_dir: str = ""
    """Folder of the study; "" is studies/NAME."""
    jobs: CountOrZero = 0
    """Runs side by side; 0 takes the study's own. No figure but the seconds depends on it."""
    smoke: Annotated[bool, FlagCreatePairsOff] = False
    """The study's small version, to see that it runs: its figures mean nothing."""
    report: Annotated[bool, FlagCreatePairsOff] = False
    """Only make the report of what is done so far."""

    def run(self) -> None:
        from hero.study.plan import load_study
        from hero.study.runner import run_study
        from hero.study.tables import write_report

        console, study = Console(), load_study(self.name, self.smoke)
        if self.jobs:
            study.jobs = self.jobs
        name = Path(self.name).stem + ("-smoke" if self.smoke else "")
        folder = Path(self.output_dir or f"studies/{name}").absolute()
        if not self.report:
            settings = study.of(next(iter(study.arms)))
            make_importable(settings.get("env", {}).get("name", EnvConfig.name))
            try:
                run_study(study, folder, console.say)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"Finished runs are kept in {folder}: the same command goes on from them."
                ) from None
        for path in write_report(study, folder):
            console.say(f"Report: {path}")
