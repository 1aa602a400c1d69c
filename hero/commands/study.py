"""`hero study`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from hero.commands.base import Command
from hero.report.console import Console


@dataclass(kw_only=True)
class Study(Command):
    """Compare methods: arms x starts x seeds at equal budgets of environment turns.

    What is done is not done again, so an interrupted study goes on where it was.
    """

    name: Annotated[str, Positional, arg(metavar="STUDY")]
    """Name of a shipped study, or a YAML file (docs/study.md)."""
    output_dir: str = ""
    """Folder of the study; "" is studies/NAME."""
    jobs: int = 0
    """Runs side by side; 0 takes the study's own."""
    report: Annotated[bool, FlagCreatePairsOff] = False
    """Only make the report of what is done so far."""

    def run(self) -> None:
        from hero.study.plan import load_study
        from hero.study.runner import run_study
        from hero.study.tables import write_report

        console, study = Console(), load_study(self.name)
        if self.jobs:
            study.jobs = self.jobs
        folder = Path(self.output_dir or f"studies/{Path(self.name).stem}")
        if not self.report:
            run_study(study, folder, console.say)
        console.say(f"Report: {write_report(study, folder)}")
