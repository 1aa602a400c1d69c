"""One call of contestants for a profiler that waits for the program to start it.

    ncu --profile-from-start off ... python -m benchmarks.profiled CASE CONTESTANT,CONTESTANT...

Each contestant is called once to compile and load what it needs, and once more for the profiler.
Those that are unavailable are named with the reason and left out.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

import torch

from benchmarks import memory
from benchmarks.baselines import CONTESTANTS, Unavailable
from benchmarks.machine import device_type
from benchmarks.problem import make_problem
from benchmarks.shapes import Case
from benchmarks.yardsticks import synchronize


def profile(case: Case, names: Sequence[str], device: str) -> list[str]:
    """Call each contestant that is available twice, the second time within the profiler's range.

    Returns:
        The names of those that were called.
    """
    problem = make_problem(case, device)
    called = []
    for name in names:
        try:
            step = memory.step_of(name, case, problem)
        except Unavailable as reason:
            print(f"{name} is unavailable: {reason}")
            continue
        step()
        synchronize(device)
        within = torch.cuda.profiler.profile() if device == "cuda" else contextlib.nullcontext()
        with within:
            step()
            synchronize(device)
        called.append(name)
    return called


def main() -> None:
    parser = argparse.ArgumentParser(description="Calls of contestants, for a profiler.")
    parser.add_argument("case", type=Case.parse)
    parser.add_argument("contestants", help=f"comma-separated, of {', '.join(CONTESTANTS)}")
    options = parser.parse_args()
    device = device_type()
    names = options.contestants.split(",")
    if unknown := [name for name in names if name not in CONTESTANTS]:
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(CONTESTANTS)}")
    print(f"called: {', '.join(profile(options.case, names, device))}")


if __name__ == "__main__":
    main()
