"""What a time is compared with: the head's products alone, and the machine's ceilings.

Run as a program, it measures the ceilings: `python -m benchmarks.yardsticks [--out FILE]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problem import Problem
from hero_kernels import backends, gemm
from hero_kernels.layout import Plan, buffer, chunk_sizes, layout

Step = Callable[[], object]


def library_gemms(problem: Problem) -> Step:
    """The products that no implementation can avoid, as fast as the library does them.

    Teacher logits, student logits, dX and, unless the head is frozen, dW, for the rows that count,
    in the inputs' type. A CPU without 16-bit arithmetic multiplies 16-bit numbers tens of times
    slower than fp32 ones: there everything is fp32, and widening the operands is not timed.
    """
    h_s, h_t, weight, rows, _ = _operands(problem)
    if weight.dtype == torch.bfloat16 and not multiplies_bfloat16(weight.device.type):
        h_s, h_t, weight = h_s.float(), h_t.float(), weight.float()
    logits = h_s.new_empty(rows, len(weight))
    d_weight = torch.zeros_like(weight) if problem.weight.requires_grad else None

    def step() -> None:
        for start in range(0, len(h_s), rows):
            part = slice(start, start + rows)
            out = logits[: len(h_s[part])]
            torch.mm(h_t[part], weight.t(), out=out)
            torch.mm(h_s[part], weight.t(), out=out)
            torch.mm(out, weight)
            if d_weight is not None:
                d_weight.addmm_(out.t(), h_s[part])

    return step


def multiplies_bfloat16(device: str) -> bool:
    """Whether the library has a fast product of bf16 matrices here."""
    return device != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def own_gemms(problem: Problem) -> Step:
    """The same products as this package does them: fp32 results, and sums over chunks in fp32."""
    h_s, h_t, weight, rows, _ = _operands(problem)
    trained = problem.weight.requires_grad
    plan = Plan("auto", rows, "float32", 0, True, trained, False, False)
    num_rows, hidden = h_s.shape
    sizes, types, groups, held, sum_type, _ = layout(
        num_rows, hidden, h_s.dtype, h_s.device, True, plan
    )
    student = buffer(h_s, rows, len(weight), types.student)
    teacher = buffer(h_s, rows, len(weight), types.student)
    grads = buffer(h_s, held, len(weight), types.gradient).zero_() if held else student
    d_weight = torch.zeros_like(weight, dtype=sum_type) if trained else None

    def step() -> None:
        start = 0
        chunks = iter(sizes)
        for group in groups:
            first = start
            for size in islice(chunks, group):
                part = slice(start, start + size)
                gemm.logits_into(weight, (teacher[:size], h_t[part]), (student[:size], h_s[part]))
                gemm.hidden_gradient(grads[start - first : start - first + size], weight)
                start += size
            if d_weight is not None:
                gemm.weight_gradient_into(
                    d_weight, grads[: start - first], h_s[first:start], first > 0
                )

    return step


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """h_s and h_t of the rows that count, weight, rows at once, number of chunks."""
    weight = problem.weight.detach()
    rows = backends.chunk_rows(weight.device, len(weight))
    sizes = chunk_sizes(problem.num_active, rows)
    active = problem.active
    h_s, h_t = problem.student_hidden.detach()[active], problem.teacher_hidden[active]
    return h_s, h_t, weight, max(sizes), len(sizes)


YARDSTICKS: dict[str, tuple[str, Callable[[Problem], Step]]] = {
    "library-gemms": ("library GEMMs alone", library_gemms),
    "own-gemms": ("the GEMMs of hero_kernels alone", own_gemms),
}


def timed(step: Step, device: str) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_time(step: Step, device: str, rounds: int) -> float:
    """Seconds, after two warm-up calls."""
    for _ in range(2):
        step()
    return statistics.median(timed(step, device) for _ in range(rounds))


def ceilings(device: str, copy_bytes: int, size: int) -> dict[str, float]:
    """Bandwidth of a copy (read plus written) in GB/s, and TFLOP/s of square products.

    Args:
        device: "cpu" or "cuda".
        copy_bytes: several times the last cache.
        size: rows and columns of the products.
    """
    source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = {
        "copy_gb_per_s": 2e-9 * copy_bytes / median_time(lambda: target.copy_(source), device, 10)
    }
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = median_time(lambda a=a, b=b: a @ b, device, 10)  # type: ignore[misc]
        name = str(dtype).removeprefix("torch.")
        rates[f"{name}_tflop_per_s"] = 2e-12 * size**3 / seconds
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the machine's ceilings.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy_bytes, size = (1 << 32, 8192) if device == "cuda" else (1 << 28, 1024)
    rates = ceilings(device, *((1 << 20, 64) if options.dry_run else (copy_bytes, size)))
    for name, rate in rates.items():
        print(f"{name:24} {rate:10.2f}")
    if options.out:
        options.out.write_text(json.dumps(rates, indent=1) + "\n")


if __name__ == "__main__":
    main()
