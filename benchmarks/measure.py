"""Measures all contestants of a case side by side.

Before a contestant is timed its loss is compared with fp64, so that nothing is timed that computes
something else. Times come from a round robin: in every round each contestant and each yardstick
runs once, the first of a round another one each time, so that a machine that slows down slows all
of them alike. Ratios are taken within rounds. A contestant that needs more than `SLOW_SECONDS` is
timed once, and one that would need more than a given limit is left out, with the time it would
take.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.baselines import CONTESTANTS, SLOW_TO_START, Ours, Unavailable
from benchmarks.problem import FAR, NEAR, Problem, make_problem, relative_error, truth
from benchmarks.shapes import Case
from benchmarks.yardsticks import YARDSTICKS, Step, timed

CHECK_TOKENS, CHECK_VOCAB = 128, 16384
"""Size of the problem that is compared with fp64."""
MAX_LOSS_ERROR = {"float32": 1e-3, "bfloat16": 0.05}
"""A contestant further off than this, for distributions far apart, computes something else."""
MIN_ROUNDS, MAX_ROUNDS = 3, 30
SLOW_SECONDS = 20.0


class Excluded(Exception):
    """Why a contestant is not timed although it runs."""


@dataclass(frozen=True)
class Limits:
    """How long a case may take."""

    rounds_seconds: float
    """Of the round robin; at least `MIN_ROUNDS` rounds are made."""
    call_seconds: float
    """Of one call of a contestant, as foreseen from the small problem."""
    memory: bool = True
    """Measure the peak memory too, on CPU in one more process for each contestant."""


@dataclass
class Result:
    """One contestant, or one yardstick, in one case."""

    skipped: str | None = None
    """Why it was not measured; the rest is then empty."""
    seconds: list[float] = field(default_factory=list)
    """One time for each round; entry i of all results of a case is of the same round."""
    extra_bytes: int | None = None
    """Peak memory added by a call, its gradients included."""
    loss_error: float | None = None
    """Relative, against fp64, for distributions far apart."""
    gradient_errors: list[float] = field(default_factory=list)
    """Relative, of dX and (trainable head) dW, for distributions near as in self-distillation."""
    failed: bool = False
    """Skipped for an error or a wrong loss, not because it is unavailable here."""
    plan: str | None = None
    """Of ours: implementation and tile, in the words of `hero_kernels.explain`."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(case: Case, names: Sequence[str], device: str, limits: Limits) -> dict[str, Result]:
    """All results of a case: contestants `names`, then the yardsticks.

    Args:
        case: what to run.
        names: keys of `CONTESTANTS`.
        device: "cpu" or "cuda".
        limits: how long it may take.
    """
    torch._dynamo.reset()  # compiled code of other shapes would count against its limit
    problem = make_problem(case, device)
    results = {name: Result() for name in names}
    steps: dict[str, Step] = {}
    for name, result in results.items():
        try:
            step = _prepare(name, case, problem, limits, result)
        except Unavailable as reason:
            result.skipped = str(reason)
        except Excluded as reason:
            result.skipped, result.failed = str(reason), True
        except torch.OutOfMemoryError:
            result.skipped, result.failed = "out of memory", True
        except Exception as error:  # of another package, say: the others are still to be measured
            result.skipped, result.failed = f"{type(error).__name__}: {error}", True
        else:
            if not result.seconds:
                steps[name] = step
        _drop(problem)
    for name, make in YARDSTICKS.items():
        results[name] = Result()
        steps[name] = make(problem)
        steps[name]()
    for name, times in round_robin(steps, device, limits.rounds_seconds).items():
        results[name].seconds = times
    return results


def _prepare(name: str, case: Case, problem: Problem, limits: Limits, result: Result) -> Step:
    """Check, warm up, measure the memory; if the contestant is slow, fill in its time."""
    device = problem.weight.device.type
    expected = check(name, case, device, result)
    make = CONTESTANTS[name]
    if isinstance(make, Ours):
        result.plan = make.plan(case, device)
    if expected > limits.call_seconds:
        raise Excluded(
            f"a call would take about {expected:.0f} s, more than the limit of "
            f"{limits.call_seconds:.0f} s"
        )
    step = memory.step_of(name, case, problem)
    seconds = timed(step, device)
    if name in SLOW_TO_START and seconds > SLOW_SECONDS:
        seconds = timed(step, device)  # without compiling
    if seconds > SLOW_SECONDS:
        result.seconds = [seconds]
    if limits.memory:
        on_cuda = device == "cuda"
        result.extra_bytes = memory.on_cuda(step, problem) if on_cuda else memory.on_cpu(case, name)
    return step


def check(name: str, case: Case, device: str, result: Result) -> float:
    """Fill in the errors against fp64; returns the seconds that a call of full size would take.

    Raises:
        Excluded: the loss is not the one asked for.
    """
    small = replace(case, tokens=min(case.tokens, CHECK_TOKENS))
    vocab = min(case.vocab, CHECK_VOCAB)
    loss_of = CONTESTANTS[name](case, device)
    result.loss_error, _, _ = compare(loss_of, make_problem(small, device, FAR, vocab))
    if not result.loss_error <= MAX_LOSS_ERROR[case.dtype]:
        raise Excluded(f"its loss is {100 * result.loss_error:.2g} % off that of fp64")
    _, result.gradient_errors, seconds = compare(loss_of, make_problem(small, device, NEAR, vocab))
    return seconds * case.active_tokens * case.vocab / (small.active_tokens * vocab)


def compare(
    loss_of: Callable[[Problem], Tensor], problem: Problem
) -> tuple[float, list[float], float]:
    """Errors of the loss and of the gradients against fp64, and the seconds of the call."""
    expected = truth(problem)
    losses: list[Tensor] = []

    def step() -> None:
        losses.append(loss_of(problem))
        losses[0].backward()

    seconds = timed(step, problem.weight.device.type)
    pairs = zip(problem.trainable, expected.gradients, strict=True)
    errors = [relative_error(tensor.grad, gradient) for tensor, gradient in pairs]
    return relative_error(losses[0], expected.loss), errors, seconds


def round_robin(steps: Mapping[str, Step], device: str, seconds: float) -> dict[str, list[float]]:
    """Times of each step, which has been called before, one for each round."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [timed(steps[name], device)] for name in names}
    one_round = sum(first for (first,) in times.values())
    for turn in range(1, max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round)))):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(steps[name], device))
    return times


def _drop(problem: Problem) -> None:
    """Free what a contestant left, so that the next finds the memory as it was."""
    for tensor in problem.trainable:
        tensor.grad = None
    gc.collect()
    if problem.weight.is_cuda:
        torch.cuda.empty_cache()


def speedup(results: Mapping[str, Result], name: str, over: str) -> float:
    """How many times faster `name` is than `over`: the median of the ratios within rounds."""
    fast, slow = results[name], results[over]
    if len(fast.seconds) != len(slow.seconds):  # one of them is slow, and was timed once
        return slow.median / fast.median
    return statistics.median(b / a for a, b in zip(fast.seconds, slow.seconds, strict=True))


def as_json(case: Case, results: Mapping[str, Result]) -> dict[str, Any]:
    return {
        "case": asdict(case),
        "id": case.id,
        "results": {name: asdict(result) for name, result in results.items()},
    }


def from_json(entry: Mapping[str, Any]) -> tuple[Case, dict[str, Result]]:
    results = {name: Result(**values) for name, values in entry["results"].items()}
    return Case(**entry["case"]), results
