"""Peak memory that one forward and backward pass adds.

On CUDA the allocator knows. On CPU the process is asked, a fresh one for each contestant. That
counts everything: tensors, gradients, the scratch memory of libraries.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.baselines import CONTESTANTS, SLOW_TO_START
from benchmarks.machine import clock, device_type
from benchmarks.problem import Problem, make_problem
from benchmarks.shapes import Case
from benchmarks.workers import Broken, Worker
from benchmarks.yardsticks import Step

SECONDS = 900.0
"""After which the process is given up."""


def step_of(name: str, case: Case, problem: Problem) -> Step:
    """Forward and backward of a contestant; gradients of the call before are dropped first."""
    loss = CONTESTANTS[name](case, problem.weight.device.type)

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
        RuntimeError: the process failed, or this system has no /proc.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("Peak memory is read from Linux's /proc: use --skip-memory here.")
    worker = Worker()
    worker.ask(_one_call, case, name, torch.get_num_threads())
    try:
        size: int = worker.answer(time.monotonic() + SECONDS)
    except Broken as reason:
        raise RuntimeError(f"Measuring the memory of {name} failed: {reason}") from reason
    finally:
        worker.stop()
    return size


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return 1024 * int(found[1])


def _one_call(case: Case, name: str, threads: int) -> int:
    """Bytes added by a call after one that loads, and compiles, what it needs.

    What that first call leaves behind is not counted.
    """
    torch.set_num_threads(threads)
    problem = make_problem(case, "cpu")
    step = step_of(name, case, problem)
    if name in SLOW_TO_START:  # compiled for this shape
        step()
    else:
        small = replace(case, tokens=min(case.tokens, 16))
        step_of(name, small, make_problem(small, "cpu"))()
    for tensor in problem.trainable:
        tensor.grad = None
    before = _settled()
    step()
    return _resident("VmHWM") - before


def counted(call: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """`call` with its seconds, unless it tells them, and the MiB it added at the peak to the GPU's
    memory, or to this process; NaN where that is not told."""
    on_gpu = device_type() == "cuda"
    if not on_gpu and not Path("/proc/self/clear_refs").exists():
        return lambda: {**call(), "MiB": float("nan")}

    def run() -> dict[str, float]:
        before = _settled_gpu() if on_gpu else _settled()
        began = clock()
        did = call()
        seconds = clock() - began
        peak = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")
        return {"seconds": seconds, **did, "MiB": (peak - before) / 2**20}

    return run


def _settled_gpu() -> int:
    """Allocated bytes, after what is free went back; the peak is set back to them."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _settled() -> int:
    """Resident bytes, after what is free went back to the system; the peak is set back to them."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")
