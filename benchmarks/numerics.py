"""How exact the gradient and the value are when student and teacher come close: docs/loss.md.

    OMP_NUM_THREADS=1 python -m benchmarks.numerics [--out FILE]

Student and teacher share the head; all inputs are bf16, so the gradient dX is too, and every column
holds its rounding. The truth is the dense fp64 definition on the same, rounded inputs. Ways from
these inputs to the loss are compared, for h_s ever nearer to h_t.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.problem import BETA, SHARPNESS, Problem, relative_error, truth
from hero_kernels import KernelOptions, fused_linear_divergence
from hero_kernels.options import Storage

RESULTS = Path(__file__).parent / "results" / "numerics-cpu.json"
SHAPE = (256, 256, 8192)
"""N, H, V."""
DISTANCES = (0.5, 0.15, 0.047, 0.0147, 0.0045, 5e-4, 5e-5)
"""Standard deviation of h_s - h_t before rounding, where that of h_t is 1."""
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")


def bf16_logits(problem: Problem) -> Tensor:
    """Plain torch on logits rounded to bf16: what a bf16 product that sums in fp32 returns.

    The product is taken in fp32 and then rounded, since CPUs without bf16 arithmetic take seconds
    for a bf16 one. Autograd rounds the gradient of the logits to bf16 in return.
    """
    h_s, weight, h_t = _widened(problem)
    with torch.no_grad():
        teacher = (h_t @ weight.t()).bfloat16().float()
    return plain_divergence((h_s @ weight.t()).bfloat16().float(), teacher, problem.divergence)


def fp32_logits(problem: Problem) -> Tensor:
    """Plain torch, everything in fp32 from the products on."""
    h_s, weight, h_t = _widened(problem)
    return plain_divergence(h_s @ weight.t(), h_t @ weight.t(), problem.divergence)


def delta(problem: Problem, options: KernelOptions | None = None) -> Tensor:
    """The shared-head path of `hero_kernels`, as a call without options takes it."""
    loss = fused_linear_divergence(
        problem.student_hidden,
        problem.weight,
        problem.teacher_hidden,
        divergence=problem.divergence,
        beta=BETA,
        options=options,
    )
    assert isinstance(loss, Tensor)
    return loss


def mixed(problem: Problem) -> Tensor:
    """The same with (h_s - h_t)·Wᵀ held in bf16, where the machine can multiply bf16."""
    return delta(problem, KernelOptions(storage=Storage.MIXED))


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "bf16 logits": bf16_logits,
    "fp32 logits": fp32_logits,
    "delta": delta,
    "mixed": mixed,
}


def _widened(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """h_s, head and h_t in fp32."""
    return problem.student_hidden.float(), problem.weight.float(), problem.teacher_hidden.float()


def plain_divergence(z_s: Tensor, z_t: Tensor, divergence: str) -> Tensor:
    """Mean divergence of logits [N, V], in the textbook form that users write."""
    logp_s, logp_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if divergence == "forward_kl":
        terms = logp_t.exp() * (logp_t - logp_s)
    elif divergence == "reverse_kl":
        terms = logp_s.exp() * (logp_s - logp_t)
    else:
        logp_m = torch.logaddexp(logp_s + math.log(1 - BETA), logp_t + math.log(BETA))
        terms = (1 - BETA) * logp_s.exp() * (logp_s - logp_m)
        terms = terms + BETA * logp_t.exp() * (logp_t - logp_m)
    return terms.sum(-1).mean()


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


def section(result: dict[str, Any]) -> str:
    """What docs/loss.md shows of a result: the machine, and tables for two divergences."""
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
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    table = measure(SHAPE, DISTANCES)
    result = {"machine": describe("cpu"), "shape": SHAPE, "dtype": "bfloat16", "rows": table}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(section(result))


if __name__ == "__main__":
    main()
