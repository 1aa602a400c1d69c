"""How exact the gradient and the value are when student and teacher come close: docs/loss.md.

    OMP_NUM_THREADS=1 python -m benchmarks.numerics [--out FILE]

Student and teacher share the head; all inputs are bf16, so the gradient dX is too, and every column
holds its rounding. The truth is the dense fp64 definition on the same, rounded inputs. Four ways
from these inputs to the loss are compared, for h_s ever nearer to h_t.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import dense_loss
from benchmarks.machine import describe
from benchmarks.problem import SHARPNESS, Problem, relative_error, truth
from hero_kernels import KernelOptions, fused_linear_divergence

RESULTS = Path(__file__).parent / "results" / "numerics-cpu.json"
SHAPE = (256, 256, 8192)
"""N, H, V."""
DISTANCES = (0.5, 0.15, 0.047, 0.0147, 0.0045, 5e-4, 5e-5)
"""Standard deviation of h_s - h_t before rounding, where that of h_t is 1."""
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")


def bf16_logits(problem: Problem) -> Tensor:
    """Plain torch: bf16 products, softmax in fp32."""
    return _dense(problem, problem.student_hidden, problem.weight, problem.teacher_hidden)


def fp32_logits(problem: Problem) -> Tensor:
    """Plain torch: everything in fp32 from the products on."""
    h_s, weight, h_t = problem.student_hidden, problem.weight, problem.teacher_hidden
    return _dense(problem, h_s.float(), weight.float(), h_t.float())


def delta(problem: Problem) -> Tensor:
    """The shared-head path as a call without options takes it."""
    return _fused(problem, None)


def delta_mixed(problem: Problem) -> Tensor:
    """The same with delta and the gradient tile in bf16."""
    return _fused(problem, KernelOptions(storage="mixed"))


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "bf16 logits": bf16_logits,
    "fp32 logits": fp32_logits,
    "delta": delta,
    "delta, mixed": delta_mixed,
}


def _dense(problem: Problem, h_s: Tensor, weight: Tensor, h_t: Tensor) -> Tensor:
    return dense_loss(h_s, weight, h_t, problem.active, problem.divergence)


def _fused(problem: Problem, options: KernelOptions | None) -> Tensor:
    loss = fused_linear_divergence(
        problem.student_hidden,
        problem.weight,
        problem.teacher_hidden,
        divergence=problem.divergence,
        options=options,
    )
    assert isinstance(loss, Tensor)
    return loss


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


def markdown(table: list[dict[str, Any]], kind: str) -> str:
    """The table of `measure` for readers; `kind` is "gradient_error" or "value_error"."""
    lines = [
        "| divergence | its value | " + " | ".join(METHODS) + " |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    for row in table:
        errors = " | ".join(_percent(row[kind][name]) for name in METHODS)
        lines.append(f"| `{row['divergence']}` | {row['value']:.1e} | {errors} |")
    return "\n".join(lines)


def _percent(error: float) -> str:
    percent = 100 * error
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    table = measure(SHAPE, DISTANCES)
    result = {"machine": describe("cpu"), "shape": SHAPE, "dtype": "bfloat16", "rows": table}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("Relative error of dX\n\n" + markdown(table, "gradient_error"))
    print("\nRelative error of the loss\n\n" + markdown(table, "value_error"))


if __name__ == "__main__":
    main()
