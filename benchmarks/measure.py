"""Measures all contestants of a case side by side.

Before a contestant is timed its loss is compared with fp64, so that nothing is timed that computes
something else. Times come from a round robin: in every round each contestant and each yardstick
runs once, the first of a round another one each time, so that a machine that slows down slows all
of them alike. Ratios are taken within rounds.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks import memory
from benchmarks.baselines import CONTESTANTS, Unavailable
from benchmarks.problem import FAR, NEAR, Problem, make_problem, relative_error, truth
from benchmarks.shapes import Case
from benchmarks.yardsticks import YARDSTICKS, Step, timed

CHECK_TOKENS, CHECK_VOCAB = 128, 16384
"""Size of the problem that is compared with fp64."""
MAX_LOSS_ERROR = {"float32": 1e-3, "bfloat16": 0.05}
"""A contestant further off than this, for distributions far apart, computes something else."""
MIN_ROUNDS, MAX_ROUNDS = 5, 30


class SomethingElse(Exception):
    """A contestant whose loss is not the one asked for."""


@dataclass
class Result:
    """One contestant, or one yardstick, in one case."""

    title: str
    skipped: str | None = None
    """Why it was not measured; the rest is then empty."""
    seconds: list[float] = field(default_factory=list)
    """One time for each round; entry i of all results of a case is of the same round."""
    extra_bytes: int | None = None
    """Peak memory added by a call, its gradients included."""
    loss_error: float | None = None
    """Relative, against fp64, for distributions far apart."""
    gradient_errors: list[float] = field(default_factory=list)
    """Relative, of dX and (trainable head) dW, for distributions as near as in self-distillation."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    case: Case, names: Sequence[str], device: str, seconds: float, with_memory: bool
) -> dict[str, Result]:
    """All results of a case: contestants `names`, then the yardsticks.

    Args:
        case: what to run.
        names: keys of `CONTESTANTS`.
        device: "cpu" or "cuda".
        seconds: how long the round robin may take; at least `MIN_ROUNDS` rounds are made.
        with_memory: measure the peak memory too.
    """
    torch._dynamo.reset()  # compiled code of other shapes would count against its limit
    results = {name: Result(CONTESTANTS[name].title) for name in names}
    problem = make_problem(case, device)
    steps: dict[str, Step] = {}
    for name, result in results.items():
        try:
            check(name, case, device, result)
            step = memory.step_of(name, case, problem)
            step()
            if with_memory:
                result.extra_bytes = (
                    memory.on_cuda(step, problem) if device == "cuda" else memory.on_cpu(case, name)
                )
            steps[name] = step
        except (Unavailable, SomethingElse) as reason:
            result.skipped = str(reason)
        except torch.OutOfMemoryError:
            result.skipped = "out of memory"
        except Exception as error:  # of another package, say: the others are still to be measured
            result.skipped = f"{type(error).__name__}: {error}"
        _drop(problem)
    for name, (title, make) in YARDSTICKS.items():
        results[name] = Result(title)
        steps[name] = make(problem)
    for name, times in round_robin(steps, device, seconds).items():
        results[name].seconds = times
    return results


def check(name: str, case: Case, device: str, result: Result) -> None:
    """Fill in the errors against fp64.

    Raises:
        SomethingElse: the loss is not the one asked for.
    """
    small = replace(case, tokens=min(case.tokens, CHECK_TOKENS))
    vocab = min(case.vocab, CHECK_VOCAB)
    loss_of = CONTESTANTS[name].make(case, device)
    for distance in (FAR, NEAR):
        problem = make_problem(small, device, distance, vocab)
        expected = truth(problem)
        loss = loss_of(problem)
        loss.backward()
        if distance == FAR:
            result.loss_error = relative_error(loss, expected.loss)
            if not result.loss_error <= MAX_LOSS_ERROR[case.dtype]:
                raise SomethingElse(
                    f"its loss {float(loss):.4g} is not that of fp64, {float(expected.loss):.4g}"
                )
            continue
        for tensor, gradient in zip(problem.trainable, expected.gradients, strict=True):
            assert tensor.grad is not None
            result.gradient_errors.append(relative_error(tensor.grad, gradient))


def round_robin(steps: Mapping[str, Step], device: str, seconds: float) -> dict[str, list[float]]:
    """Times of each step, one for each round; every step has a warm-up call."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    one_round = sum(timed(steps[name], device) for name in names)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round)))
    for turn in range(rounds):
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
    pairs = zip(results[over].seconds, results[name].seconds, strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def as_json(case: Case, results: Mapping[str, Result]) -> dict[str, Any]:
    return {
        "case": asdict(case),
        "id": case.id,
        "results": {name: asdict(result) for name, result in results.items()},
    }


def from_json(entry: Mapping[str, Any]) -> tuple[Case, dict[str, Result]]:
    results = {name: Result(**values) for name, values in entry["results"].items()}
    return Case(**entry["case"]), results
