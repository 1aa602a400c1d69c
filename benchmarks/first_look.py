"""The first minute on a new machine, as groups of checks: does a kernel launch, is it right, what
does one call take."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from benchmarks.baselines import Ours, Unavailable
from benchmarks.check_problems import LIMIT, Check, Size
from benchmarks.measure import compare
from benchmarks.ours import Variant
from benchmarks.problem import NEAR, make_problem
from benchmarks.shapes import Case
from benchmarks.yardsticks import library_gemms, timed

LAUNCHED = Case("tiny", 64)
COMPARED = (Case("tiny", 161), Case("odd", 300), Case("smollm2-135m", 300))
TIMED = {"cuda": Case("qwen3-0.6b", 8192), "cpu": Case("tiny", 256)}
CALLS = 5


def launch(size: Size, device: str, variant: Variant, refused: set[str]) -> Iterator[Check]:
    """A call forward and backward, compiling included."""
    try:
        plan = Ours(variant).plan(LAUNCHED, device)
    except Unavailable as reason:
        refused.add(str(reason))
        return
    problem = make_problem(LAUNCHED, device)
    loss_of = Ours(variant)(LAUNCHED, device)
    seconds = timed(lambda: loss_of(problem).backward(), device)
    yield Check(f"launch ({plan}), with compiling", seconds, None)


def right(size: Size, device: str, variant: Variant, refused: set[str]) -> Iterator[Check]:
    """Loss, dX and dW against fp64, on three shapes."""
    for case in COMPARED if device == "cuda" else COMPARED[:1]:
        try:
            loss_of = Ours(variant)(case, device)
        except Unavailable as reason:
            refused.add(str(reason))
            return
        loss_error, gradients, _ = compare(loss_of, make_problem(case, device, NEAR))
        for which, error in zip(("loss", "dX", "dW"), (loss_error, *gradients), strict=True):
            yield Check(f"{case.id}, {which}", error, LIMIT[torch.bfloat16])


def one_call(size: Size, device: str, variant: Variant, refused: set[str]) -> Iterator[Check]:
    """Seconds of a call, and of the library's products alone; medians."""
    case = TIMED[device]
    problem = make_problem(case, device)
    try:
        loss_of = Ours(variant)(case, device)
    except Unavailable as reason:
        refused.add(str(reason))
        return
    products = library_gemms(problem)

    def step() -> None:
        for tensor in problem.trainable:
            tensor.grad = None
        loss_of(problem).backward()

    times = [(timed(step, device), timed(products, device)) for _ in range(CALLS + 1)]
    ours, theirs = (statistics.median(column) for column in zip(*times[1:], strict=True))
    yield Check(f"one call, {case.id}", ours, None)
    yield Check("the library's four products alone", theirs, None)
