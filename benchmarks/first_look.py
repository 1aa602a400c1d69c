"""The first minute on a new machine: does each kernel launch, is it right, what does a call take.

    python -m benchmarks.first_look [--subjects triton,cuda,...] [--seconds 60] [--out FILE]

In this order, so that most is known if the machine is taken away: all subjects launch (compiling at
the same time), all are compared with fp64 on three shapes, then each is timed alone, beside the
library's products. A subject that fails a step is left out of the next. The file is complete after
every answer. Exit status 1 if a subject failed; what a subject refuses is not a failure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import Ours, Unavailable
from benchmarks.correctness import limits
from benchmarks.gpu_check import chosen
from benchmarks.machine import describe, device_type, write_json
from benchmarks.measure import compare
from benchmarks.ours import SUBJECTS, SUBJECTS_OF
from benchmarks.problem import make_problem
from benchmarks.shapes import Case
from benchmarks.workers import Broken, Worker
from benchmarks.yardsticks import library_gemms, timed

LAUNCHED = Case("tiny", 64)
COMPARED = (Case("tiny", 161), Case("odd", 300), Case("smollm2-135m", 300))
TIMED = {"cuda": Case("qwen3-0.6b", 8192), "cpu": Case("tiny", 256)}
CALLS = 5
NEAR = 0.03
"""Distance of student and teacher, as in self-distillation."""

Answer = dict[str, Any]
"""With "refused", or "passed" and what was found, in the words of `line`."""


def launch(subject: str, device: str) -> Answer:
    """A call forward and backward, compiling included."""
    make = Ours(SUBJECTS[subject])
    try:
        plan = make.plan(LAUNCHED, device)
    except Unavailable as reason:
        return {"refused": str(reason)}
    problem = make_problem(LAUNCHED, device)
    loss_of = make(LAUNCHED, device)
    seconds = timed(lambda: loss_of(problem).backward(), device)
    finite = all(bool(tensor.grad.isfinite().all()) for tensor in problem.trainable)  # type: ignore[union-attr]
    return {"passed": finite, "plan": plan, "seconds": seconds}


def right(subject: str, device: str) -> Answer:
    """Errors of loss, dX and dW against fp64."""
    shapes = COMPARED if device == "cuda" else COMPARED[:1]
    allowed = limits(SUBJECTS[subject], torch.bfloat16, shared_head=True)
    errors = {}
    for case in shapes:
        problem = make_problem(case, device, NEAR)
        loss_error, gradients, _ = compare(Ours(SUBJECTS[subject])(case, device), problem)
        errors[case.id] = [loss_error, *gradients]
    passed = all(
        error <= limit
        for found in errors.values()
        for error, limit in zip(found, allowed, strict=True)
    )
    return {"passed": passed, "errors": errors}


def one_call(subject: str, device: str) -> Answer:
    """Seconds of a call, and of the library's products alone; medians."""
    case = TIMED[device]
    problem = make_problem(case, device)
    loss_of = Ours(SUBJECTS[subject])(case, device)
    products = library_gemms(problem)

    def step() -> None:
        for tensor in problem.trainable:
            tensor.grad = None
        loss_of(problem).backward()

    times = []
    for _ in range(CALLS + 1):
        times.append((timed(step, device), timed(products, device)))
    seconds, of_products = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return {"passed": True, "case": case.id, "seconds": seconds, "products": of_products}


STEPS: dict[str, Callable[[str, str], Answer]] = {
    "launch": launch,
    "right": right,
    "one call": one_call,
}


def line(step: str, subject: str, answer: Answer) -> str:
    """What was found, for readers."""
    if "refused" in answer:
        return f"--   {step:8} {subject}: {answer['refused']}"
    if "broken" in answer:
        return f"FAIL {step:8} {subject}: {answer['broken']}"
    words = f"{'ok  ' if answer['passed'] else 'FAIL'} {step:8} {subject}: "
    if step == "right":
        largest = [max(column) for column in zip(*answer["errors"].values(), strict=True)]
        return words + "largest errors of loss, dX, dW " + ", ".join(f"{e:.1e}" for e in largest)
    if step == "launch":
        return words + f"{answer['seconds']:.1f} s with compiling ({answer['plan']})"
    ratio = answer["seconds"] / answer["products"]
    return words + (
        f"{1e3 * answer['seconds']:.1f} ms, {ratio:.2f} x the library's products ({answer['case']})"
    )


def look(names: list[str], device: str, seconds: float, out: Path | None) -> bool:
    """All steps of all subjects; whether none failed."""
    deadline = time.monotonic() + seconds
    found: dict[str, dict[str, Answer]] = {step: {} for step in STEPS}
    about = describe(device)
    workers = {name: Worker() for name in names}

    def record(step: str, name: str, answer: Answer) -> None:
        found[step][name] = answer
        print(line(step, name, answer), flush=True)
        if out:
            write_json(out, {"machine": about, "steps": found})
        if not answer.get("passed"):
            workers.pop(name).stop()

    for step, function in STEPS.items():
        alone = step == "one call"
        for group in [[name] for name in workers] if alone else [list(workers)]:
            for name in group:
                workers[name].ask(function, name, device)
            for name in group:
                record(step, name, _answer(workers[name], deadline))
    for worker in workers.values():
        worker.stop()
    answers = [answer for step in found.values() for answer in step.values()]
    return all(answer.get("passed") or "refused" in answer for answer in answers)


def _answer(worker: Worker, deadline: float) -> Answer:
    try:
        answer: Answer = worker.answer(deadline)
    except Broken as reason:
        return {"passed": False, "broken": str(reason)}
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Launch, correctness, and time of one call.")
    parser.add_argument("--subjects", help=f"default: by device; of {', '.join(SUBJECTS)}")
    parser.add_argument("--seconds", type=float, default=60, help="after which a subject fails")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = device_type()
    names = chosen(options.subjects, tuple(SUBJECTS), SUBJECTS_OF[device], "--subjects")
    raise SystemExit(not look(names, device, options.seconds, options.out))


if __name__ == "__main__":
    main()
