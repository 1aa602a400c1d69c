"""Correctness on a GPU, against fp64, with fresh random inputs and poisoned memory.

    python -m benchmarks.gpu_check [--size smallest|tiny|full] [--subjects triton,cuda,...]
                                   [--parallel] [--seed N] [--out FILE]

Every implementation and design passes all checks of `correctness.py` on its own: row kernels, the
whole operation, `linear_logprobs`, exact behaviour, more than 2^31 logits. Every check prints its
error and its limit; the exit status says whether all were kept. What a subject refuses (a type,
say) is printed with its reason, and one for which no check is made fails.

Most of the time goes into compiling kernels: with --parallel each subject has a process of its
own. Only the largest check, which fills the memory, runs in this one.

Without a GPU the same checks run what a CPU can. The seed is drawn anew for each run and printed,
to repeat one that failed.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.check_problems import CHECKED, SIZES, SUBJECTS, Check
from benchmarks.correctness import CHECKS
from hero_kernels.options import Design

ROOT = Path(__file__).resolve().parents[1]
ALONE = "large"
"""The group of checks that leaves no memory for another process."""


class Report:
    """What was checked so far."""

    def __init__(self, names: Sequence[str], device: str, seed: int, quiet: bool) -> None:
        self.checks: list[Check] = []
        self.refused: dict[str, set[str]] = {name: set() for name in names}
        self._about = {"device": device, "seed": seed, "subjects": list(names)}
        self._quiet = quiet

    def add(self, check: Check) -> None:
        self.checks.append(check)
        if not check.passed or not self._quiet:
            print(
                f"{'ok  ' if check.passed else 'FAIL'} {check.error:8.1e} "
                f"(limit {check.limit:.1e})  {check.subject}: {check.name}",
                flush=True,
            )

    def of(self, name: str) -> list[bool]:
        """Which checks of a subject passed."""
        return [check.passed for check in self.checks if check.subject == name]

    @property
    def passed(self) -> bool:
        return all(self.of(name) and all(self.of(name)) for name in self.refused)

    def as_json(self) -> dict[str, Any]:
        return {
            **self._about,
            "refused": {name: sorted(reasons) for name, reasons in self.refused.items()},
            "checks": [{**check._asdict(), "passed": check.passed} for check in self.checks],
        }

    def write(self, path: Path | None) -> None:
        if path:
            path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def summary(self) -> str:
        lines = [
            f"refused by {name}: {reason}"
            for name, reasons in self.refused.items()
            for reason in sorted(reasons)
        ]
        for name in self.refused:
            own = self.of(name)
            failed = f"{own.count(False)} failed" if own else "which is a failure"
            lines.append(f"{name}: {len(own)} checks, {failed}")
        return "\n".join(lines)


def run_groups(groups: Sequence[str], size: str, device: str, report: Report) -> None:
    """The checks of these groups for all subjects of the report, in this process."""
    subjects = {name: SUBJECTS[name] for name in report.refused}
    for group in groups:
        for check in CHECKS[group](SIZES[size], device, subjects, report.refused):
            report.add(check)


def run_in_processes(groups: Sequence[str], size: str, seed: int, report: Report) -> None:
    """The same with a process for each subject, all at once; a process that ends early fails."""
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for name in report.refused:
            command = [sys.executable, "-m", "benchmarks.gpu_check", "--quiet", "--size", size]
            command += ["--subjects", name, "--groups", ",".join(groups), "--seed", str(seed)]
            command += ["--out", f"{folder}/{name}.json"]
            started[name] = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        for name, process in started.items():
            _, errors = process.communicate()
            path = Path(folder, f"{name}.json")
            found = json.loads(path.read_text()) if path.exists() else {"checks": [], "refused": {}}
            for entry in found["checks"]:
                entry.pop("passed")
                report.add(Check(**entry))
            report.refused[name].update(found["refused"].get(name, ()))
            if process.returncode not in (0, 1) or errors:
                print(errors[-3000:])
            if process.returncode not in (0, 1) or "Traceback" in errors:
                report.add(Check(name, f"ends with status {process.returncode}", math.nan, 0.0))


def chosen(text: str | None, known: Sequence[str], default: Sequence[str], what: str) -> list[str]:
    """The names given, or the default.

    Raises:
        SystemExit: a name is unknown.
    """
    names = list(default) if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{what}: no {', '.join(unknown)}; expected some of {', '.join(known)}.")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what this package computes with fp64.")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--subjects", help=f"default: by device; of {', '.join(SUBJECTS)}")
    parser.add_argument("--groups", help=f"of checks; default: all of {', '.join(CHECKS)}")
    parser.add_argument("--parallel", action="store_true", help="a process for each subject")
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quiet", action="store_true", help="print failures only")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A design that this build does not have yet is no failure of the others.
    usual = [name for name in CHECKED[device] if SUBJECTS[name].design in tuple(Design)]
    names = chosen(options.subjects, tuple(SUBJECTS), usual, "--subjects")
    groups = chosen(options.groups, tuple(CHECKS), tuple(CHECKS), "--groups")
    seed = secrets.randbits(31) if options.seed is None else options.seed
    torch.manual_seed(seed)
    print(f"{', '.join(names)} on {device}, seed {seed}")

    start = time.perf_counter()
    report = Report(names, device, seed, options.quiet)
    if options.parallel:
        run_in_processes([group for group in groups if group != ALONE], options.size, seed, report)
        report.write(options.out)
        groups = [group for group in groups if group == ALONE]
    for group in groups:
        run_groups([group], options.size, device, report)
        report.write(options.out)  # now: an error in the next must not lose them
    print(report.summary())
    failed = sum(not check.passed for check in report.checks)
    seconds = time.perf_counter() - start
    print(f"{len(report.checks)} checks, {failed} failed, {seconds:.0f} s")
    raise SystemExit(not report.passed)


if __name__ == "__main__":
    main()
