"""Correctness on a GPU, against fp64, with fresh random inputs and poisoned memory.

    python -m benchmarks.gpu_check [--first-look] [--size smallest|full] [--subjects triton,...]
                                   [--one-process] [--seed N] [--out FILE]

Every implementation passes all checks of `correctness.py` on its own: it launches, is right on
three shapes, and one call is timed (--first-look ends here); then rows of given logits, the whole
operation, `linear_logprobs`, exact behaviour, more than 2^31 logits. Every check prints its error
and its limit; the exit status says whether all were kept. What a subject refuses (a type, say) is
printed with its reason, and one for which no check is made fails.

Each subject has a process of its own, and all run at once, except where one is timed or fills the
memory. --one-process is for tools that watch one process. The file is complete after each group.

Without a GPU the same checks run what a CPU can. The seed is drawn anew for each run and printed,
to repeat one that failed.
"""

from __future__ import annotations

import argparse
import gc
import math
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.check_problems import SIZES, Check
from benchmarks.correctness import ALONE, CHECKS, FIRST_LOOK
from benchmarks.machine import describe, device_type, write_json
from benchmarks.ours import SUBJECTS, SUBJECTS_OF
from benchmarks.workers import Broken, Worker

Answer = tuple[list[Check], set[str]]
"""Checks, and the reasons of what was refused."""


def run_group(subject: str, group: str, size: str, device: str, seed: int) -> Answer:
    """One group of checks of one subject, in this process."""
    torch.manual_seed(seed)
    refused: set[str] = set()
    checks = []
    try:
        for check in CHECKS[group](SIZES[size], device, SUBJECTS[subject], refused):
            checks.append(check)
    except ValueError as reason:
        refused.add(str(reason))
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # the largest check of another process needs it
    return checks, refused


class Report:
    """What was checked so far."""

    def __init__(
        self, names: Sequence[str], device: str, seed: int, quiet: bool, out: Path | None = None
    ) -> None:
        self.checks: dict[str, list[Check]] = {name: [] for name in names}
        self.refused: dict[str, set[str]] = {name: set() for name in names}
        self._about = {"machine": describe(device), "seed": seed, "subjects": list(names)}
        self._quiet, self._out = quiet, out

    def add(self, subject: str, answer: Answer) -> None:
        self.refused[subject] |= answer[1]
        for check in answer[0]:
            self.checks[subject].append(check)
            if not check.passed or check.limit is None or not self._quiet:
                print(f"{subject:12} {check}", flush=True)
        if self._out:
            write_json(self._out, self.as_json())  # now: nothing that comes later must lose it

    @property
    def failed(self) -> int:
        return sum(not check.passed for checks in self.checks.values() for check in checks)

    @property
    def passed(self) -> bool:
        return not self.failed and all(self.checks.values())

    def as_json(self) -> dict[str, Any]:
        return {
            **self._about,
            "refused": {name: sorted(reasons) for name, reasons in self.refused.items()},
            "checks": [
                {"subject": name, **check._asdict(), "passed": check.passed}
                for name, checks in self.checks.items()
                for check in checks
            ],
        }

    def summary(self) -> str:
        lines = [
            f"refused by {name}: {reason}"
            for name, reasons in self.refused.items()
            for reason in sorted(reasons)
        ]
        for name, checks in self.checks.items():
            failed = sum(not check.passed for check in checks)
            lines.append(
                f"{name}: {len(checks)} checks, "
                + (f"{failed} failed" if checks else "which is a failure")
            )
        return "\n".join(lines)


def run_in_processes(
    groups: Sequence[str], size: str, device: str, seed: int, seconds: float, report: Report
) -> None:
    """All groups, a process for each subject; one that ends early, or is too slow, fails."""
    deadline = time.monotonic() + seconds
    workers = {name: Worker() for name in report.checks}

    for group in groups:
        for names in [[name] for name in workers] if group in ALONE else [list(workers)]:
            for name in names:
                workers[name].ask(run_group, name, group, size, device, seed)
            for name in names:
                try:
                    report.add(name, workers[name].answer(deadline))
                except Broken as reason:
                    report.add(name, ([Check(f"{group}: {reason}", math.nan, 0.0)], set()))
                    workers.pop(name).stop()
    for worker in workers.values():
        worker.stop()


def chosen(text: str | None, known: Sequence[str], default: Sequence[str], what: str) -> list[str]:
    """The names given, or the default.

    Raises:
        SystemExit: a name is unknown.
    """
    names = list(default) if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(
            f"{what}: unknown {', '.join(unknown)}; expected some of {', '.join(known)}."
        )
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what this package computes with fp64.")
    parser.add_argument("--first-look", action="store_true", help="the first three groups only")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--subjects", help=f"default: by device; of {', '.join(SUBJECTS)}")
    parser.add_argument("--groups", help=f"of checks; default: all of {', '.join(CHECKS)}")
    parser.add_argument("--one-process", action="store_true", help="no process for each subject")
    parser.add_argument("--seconds", type=float, default=600, help="after which a subject fails")
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quiet", action="store_true", help="print failures only")
    options = parser.parse_args()
    device = device_type()
    names = chosen(options.subjects, tuple(SUBJECTS), SUBJECTS_OF[device], "--subjects")
    usual = FIRST_LOOK if options.first_look else tuple(CHECKS)
    groups = chosen(options.groups, tuple(CHECKS), usual, "--groups")
    seed = secrets.randbits(31) if options.seed is None else options.seed
    print(f"{', '.join(names)} on {device}, seed {seed}")

    start = time.perf_counter()
    report = Report(names, device, seed, options.quiet, options.out)
    if options.one_process:
        for group in groups:
            for name in names:
                report.add(name, run_group(name, group, options.size, device, seed))
    else:
        run_in_processes(groups, options.size, device, seed, options.seconds, report)
    print(report.summary())
    total = sum(map(len, report.checks.values()))
    seconds = time.perf_counter() - start
    print(f"{total} checks, {report.failed} failed, {seconds:.0f} s")
    raise SystemExit(not report.passed)


if __name__ == "__main__":
    main()
