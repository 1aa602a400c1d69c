"""Peak memory that one forward and backward pass adds.

On CUDA the allocator knows. On CPU the process is asked, in a fresh one for each contestant:
`python -m benchmarks.memory CASE CONTESTANT` prints bytes. That counts everything: tensors,
gradients, the scratch memory of libraries.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.baselines import CONTESTANTS, SLOW_TO_START
from benchmarks.machine import ROOT
from benchmarks.problem import Problem, make_problem
from benchmarks.shapes import Case
from benchmarks.yardsticks import Step


def step_of(name: str, case: Case, problem: Problem) -> Step:
    """Forward and backward of a contestant; gradients of the call before are dropped first."""
    loss = CONTESTANTS[name].make(case, problem.weight.device.type)

    def step() -> None:
        for tensor in problem.trainable:
            tensor.grad = None
        loss(problem).backward()

    return step


def on_cuda(step: Step, problem: Problem) -> int:
    """Bytes above what was allocated before the call; `step` has run once."""
    for tensor in problem.trainable:
        tensor.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_cpu(case: Case, name: str) -> int:
    """Bytes, measured in a fresh process with as many threads as this one.

    Raises:
        RuntimeError: the process failed; with the end of what it printed.
    """
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", case.id, name],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"Measuring the memory of {name} failed: {done.stderr[-800:]}")
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return 1024 * int(found[1])


def _one_call(case: Case, name: str) -> int:
    """Bytes added by a call after one that loads, and compiles, what it needs.

    What that first call leaves behind is not counted.
    """
    problem = make_problem(case, "cpu")
    step = step_of(name, case, problem)
    if name in SLOW_TO_START:  # compiled for this shape
        step()
    else:
        small = replace(case, tokens=min(case.tokens, 16))
        step_of(name, small, make_problem(small, "cpu"))()
    for tensor in problem.trainable:
        tensor.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    step()
    return _resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description="Extra peak memory of one contestant on CPU.")
    parser.add_argument("case", type=Case.parse)
    parser.add_argument("contestant", choices=CONTESTANTS)
    options = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("Peak memory is read from /proc, which this system lacks: use Linux.")
    print(_one_call(options.case, options.contestant))


if __name__ == "__main__":
    main()
