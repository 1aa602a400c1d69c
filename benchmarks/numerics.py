"""How exact the gradient and the value are when student and teacher come close: docs/numerics.md.

    OMP_NUM_THREADS=1 python -m benchmarks.numerics [--output FILE]

Student and teacher share the head; all inputs are bf16, so the gradient dX is too, and every column
holds its rounding. The truth is the dense fp64 definition on the same, rounded inputs. Ways from
these inputs to the loss are compared, for h_s ever nearer to h_t.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import torch_divergence
from benchmarks.machine import describe, write_json
from benchmarks.ours import Variant
from benchmarks.problem import BETA, SHARPNESS, Problem, relative_error, truth

SHAPE = (256, 256, 8192)
"""N, H, V."""
DISTANCES = (0.5, 0.15, 0.047, 0.0147, 0.0045, 5e-4, 5e-5)
"""Standard deviation of h_s - h_t before rounding, where that of h_t is 1."""
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")


def logits_in(dtype: torch.dtype) -> Callable[[Problem], Tensor]:
    """Plain torch on logits rounded to a type: of bf16, what a product that sums in fp32 returns.

    The product is taken in fp32 and then rounded, since CPUs without bf16 arithmetic take seconds
    for a bf16 one. Autograd rounds the gradient of the logits to bf16 in return.
    """

    def loss(problem: Problem) -> Tensor:
        h_s, weight, h_t = (
            tensor.float()
            for tensor in (problem.student_hidden, problem.weight, problem.teacher_hidden)
        )
        student, teacher = (h_s @ weight.t()).to(dtype), (h_t @ weight.t()).to(dtype)
        return torch_divergence(student, teacher, problem.divergence).sum() / problem.num_active

    return loss


def delta(problem: Problem) -> Tensor:
    """The shared-head path of `hero_kernels`, as a call without options takes it."""
    variant = Variant()
    return variant.loss(problem, BETA, variant.options(len(problem.weight)))


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "bf16 logits": logits_in(torch.bfloat16),
    "fp32 logits": logits_in(torch.float32),
    "delta": delta,
}


def near_problem(
    shape: tuple[int, int, int], distance: float, divergence: str = "forward_kl"
) -> Problem:
    """Tensors of a call with a frozen head, the same for every call.

    Args:
        shape: N, H, V.
        distance: standard deviation of h_s - h_t before rounding to bf16.
        divergence: of the loss.
    """
    num_rows, hidden, vocab = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, hidden, generator=generator) * (SHARPNESS / hidden**0.5)
    h_t = torch.randn(num_rows, hidden, generator=generator)
    h_s = h_t + distance * torch.randn(num_rows, hidden, generator=generator)
    return Problem(
        h_s.bfloat16().requires_grad_(),
        weight.bfloat16(),
        h_t.bfloat16(),
        weight.bfloat16(),
        torch.ones(num_rows, dtype=torch.bool),
        num_rows,
        divergence,
    )


def measure(shape: tuple[int, int, int], distances: Iterable[float]) -> list[dict[str, Any]]:
    """One row for each divergence and distance.

    Args:
        shape: N, H, V.
        distances: as for `near_problem`.

    Returns:
        `divergence`, `value` (mean divergence in fp64, nats), and by method `gradient_error` and
        `value_error`, both relative to fp64.
    """
    table = []
    for divergence in DIVERGENCES:
        for distance in distances:
            problem = near_problem(shape, distance, divergence)
            exact = truth(problem)
            row: dict[str, Any] = {"divergence": divergence, "value": float(exact.loss)}
            row["gradient_error"], row["value_error"] = {}, {}
            for name, method in METHODS.items():
                loss = method(problem)
                [grad] = torch.autograd.grad(loss, problem.student_hidden)
                row["gradient_error"][name] = relative_error(grad, exact.gradients[0])
                row["value_error"][name] = relative_error(loss, exact.loss)
            table.append(row)
    return table


def section(result: dict[str, Any]) -> str:
    """What docs/numerics.md shows of a result: the machine, and tables for two divergences."""
    machine, (rows, hidden, vocab) = result["machine"], result["shape"]
    header = (
        f"N = {rows}, H = {hidden}, V = {vocab}, {result['dtype']}; {machine['processor']}, "
        f"{machine['threads']} thread(s), torch {machine['versions']['torch']}, {machine['date']}."
    )
    tables = (markdown(result["rows"], divergence) for divergence in ("jsd", "forward_kl"))
    return "\n\n".join([header, *tables])


def markdown(rows: list[dict[str, Any]], divergence: str) -> str:
    """The rows of one divergence as a table for readers."""
    kinds = {"dX": "gradient_error", "loss": "value_error"}
    methods = list(rows[0]["gradient_error"])  # a file may be older than a method
    columns = [f"{what}, {name}" for what in kinds for name in methods]
    lines = [
        "| `" + " | ".join([divergence + "`", *columns]) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in rows:
        if row["divergence"] == divergence:
            errors = [row[kind][name] for kind in kinds.values() for name in methods]
            lines.append(" | ".join([f"| {row['value']:.0e}", *map(_percent, errors)]) + " |")
    return "\n".join(lines)


def _percent(error: float) -> str:
    percent = 100 * error
    if percent < 0.1:
        return f"{percent:.0e} %"
    return f"{percent:.2f} %" if percent < 10 else f"{percent:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="JSON file to write; none by default")
    arguments = parser.parse_args()
    machine = describe("cpu")
    table = measure(SHAPE, DISTANCES)
    result = {"machine": machine, "shape": SHAPE, "dtype": "bfloat16", "rows": table}
    if arguments.output:
        write_json(arguments.output, result)
    print(section(result))


if __name__ == "__main__":
    main()
