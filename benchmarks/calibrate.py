"""Measures the constants of the planner and writes them to hero_kernels/costs/.

    python -m benchmarks.calibrate [--out FILE] [--quick]

On the machine at hand: the rates of the head's products as this package takes them, of every row
kernel that runs, of a copy, of the first touch of memory, and what a chunk costs apart from its
size. `--quick` takes tiny shapes: it shows that the program runs, its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.yardsticks import median_time, timed
from hero_kernels import KernelOptions, backends, cpu_gemm, fused, fused_linear_divergence, gemm
from hero_kernels.chunked import Head, LogitChunk
from hero_kernels.divergence_loop import RowTensors
from hero_kernels.layout import buffer, buffer_types
from hero_kernels.machines import CUDA_COSTS, FOLDER
from hero_kernels.options import Divergence, Objective

SHAPES = {"cpu": (256, 576, 49152), "cuda": (8192, 2560, 151936)}
"""Rows, hidden size and vocabulary of a chunk."""
QUICK = (32, 24, 500)
ROUNDS = 9


def products(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, float]:
    """`machines.Products` as numbers."""
    rows, hidden, vocab = shape

    def rates(num_rows: int) -> dict[str, float]:
        flops = 2.0 * num_rows * hidden * vocab
        states = torch.randn(num_rows, hidden, device=device).to(dtype)
        weight = torch.randn(vocab, hidden, device=device).to(dtype)
        types = buffer_types(dtype, states.device, "float32", True)
        teacher, student = (buffer(states, num_rows, vocab, torch.float32) for _ in range(2))
        grad = buffer(states, num_rows, vocab, types.gradient).normal_()
        total = torch.zeros(vocab, hidden, device=device, dtype=types.gradient)
        steps: dict[str, tuple[Callable[[], object], int]] = {
            "logits": (
                lambda: gemm.logits_into(weight, (teacher, states), (student, states)),
                2,
            ),
            "hidden": (lambda: gemm.hidden_gradient(grad, weight), 1),
            "weight": (lambda: gemm.weight_gradient_into(total, grad, states, False), 1),
        }
        return {
            name: count * flops / median_time(step, device, ROUNDS)
            for name, (step, count) in steps.items()
        }

    large, small = rates(rows), rates(max(1, rows // 4))
    # seconds per row ~ 1 + half / rows, from the two sizes, averaged over the three products.
    slowdowns = [large[name] / small[name] for name in large]
    slowdown = max(1.0, sum(slowdowns) / len(slowdowns))
    small_rows = max(1, rows // 4)
    half = (slowdown - 1) / max(1e-9, 1 / small_rows - slowdown / rows)
    half = min(max(half, 0.0), float(rows))
    peak = {name: rate * (1 + half / rows) for name, rate in large.items()}
    return {**peak, "half_rows": half}


def row_rates(shape: tuple[int, int, int], device: str) -> dict[str, dict[str, float]]:
    """Logits a second of each row kernel that runs here, gradient included."""
    rows, _, vocab = shape
    states = torch.empty(1, device=device, dtype=torch.bfloat16)
    types = buffer_types(states.dtype, states.device, "float32", True)
    teacher = buffer(states, rows, vocab, torch.float32).normal_().mul_(3)
    delta = buffer(states, rows, vocab, types.student).normal_().mul_(0.1)
    grad = buffer(states, rows, vocab, types.gradient)
    rates: dict[str, dict[str, float]] = {}
    for name in backends.IMPLEMENTATIONS:
        request = backends.Request(states.device, states.dtype, "full", False)
        if backends.refusal(name, request):
            continue
        kernel = backends.row_kernel(name)
        rates[name] = {}
        for divergence in Divergence:

            def step(kernel: Callable[..., Tensor] = kernel, code: int = divergence.code) -> object:
                return kernel(
                    delta,
                    teacher,
                    grad,
                    delta=True,
                    divergence=code,
                    beta=0.5,
                    inv_temperature=1.0,
                    softcap=0.0,
                    logit_scale=1.0,
                    student_bias=None,
                    teacher_bias=None,
                    target_ids=None,
                    row_weights=torch.ones(rows, device=device),
                    old_logprobs=None,
                    is_clip=0.0,
                    vocab_size=vocab,
                    with_stats=False,
                )

            seconds = median_time(step, device, 3 if name == "torch" else ROUNDS)
            rates[name][str(divergence)] = rows * vocab / seconds
    return rates


def fused_rates(shape: tuple[int, int, int], device: str) -> tuple[float, dict[str, float]] | None:
    """Of the fused design: FLOP/s of its GEMM for both sides, and logits a second of what follows,
    by divergence; None where the design cannot serve."""
    request = backends.Request(torch.device(device), torch.bfloat16, "full", False)
    if fused.refusal("auto", request, shape[2]):
        return None
    rows, hidden, vocab = shape
    h_t = torch.randn(rows, hidden, device=device).bfloat16()
    h_s = (h_t + 0.03 * torch.randn_like(h_t)).bfloat16()
    weight = (torch.randn(vocab, hidden, device=device) * 3 / hidden**0.5).bfloat16()
    types = buffer_types(h_t.dtype, h_t.device, "float32", True, fused=True)
    width = -(-vocab // 16) * 16  # as the chunk loop spaces its rows
    teacher, delta, grad = (
        buffer(h_t, rows, width, dtype)[:, :vocab]
        for dtype in (torch.float32, types.student, types.gradient)
    )
    ones = torch.ones(rows, device=device)
    row_tensors = RowTensors(ones, None, None, None, None)

    def objective(divergence: Divergence) -> Objective:
        code = divergence.code
        return Objective(code, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, vocab, "full", 0, "student", True)

    def logits() -> Tensor:
        sides = Head(h_s, weight, None), Head(h_t, weight, None)
        return fused.logits_into(*sides, delta, teacher, objective(Divergence.JSD), None)

    flops = 2.0 * rows * hidden * vocab
    rate = 2 * flops / median_time(logits, device, ROUNDS)
    part = slice(0, rows)
    chunk = LogitChunk(part, delta, teacher, None, grad, None, None, logits())
    rates = {}
    for divergence in Divergence:
        what = objective(divergence)

        def step(what: Objective = what) -> object:
            return fused.divergence_from_statistics(chunk, row_tensors, what, True, False)

        rates[str(divergence)] = rows * vocab / median_time(step, device, ROUNDS)
    return rate, rates


def bandwidth(device: str, num_bytes: int) -> float:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_time(lambda: target.copy_(source), device, ROUNDS)


def fresh_rate(device: str, num_bytes: int) -> float:
    """Bytes a second of the first touch of a buffer as the chunk loop takes it."""
    like = torch.empty(1, device=device)

    def step() -> object:
        return buffer(like, num_bytes // 4096, 1024, torch.float32).fill_(1.0)

    return num_bytes / median_time(step, device, ROUNDS)


def chunk_seconds(device: str) -> float:
    """What a chunk costs apart from its size: Python, dispatch, and on CUDA the launches.

    From calls of many tiny chunks and of one, in turn; the least time of each, since whatever else
    runs on the machine only adds to it. On CPU with one thread: a parallel region over a tiny chunk
    waits for threads to wake, milliseconds on a busy machine, which says nothing of chunks of full
    size, whose regions are part of the rates above.
    """
    rows, chunk = 256, 4
    hidden, weight = torch.randn(rows, 16, device=device), torch.randn(64, 16, device=device)

    def call(chunk: int) -> Callable[[], object]:
        options = KernelOptions(chunk_size=chunk)
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        teacher = hidden.flip(0)
        return lambda: fused_linear_divergence(states, head, teacher, options=options)

    threads = torch.get_num_threads()
    many, one = call(chunk), call(rows)
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        for _ in range(2):
            many(), one()
        times = [(timed(many, device), timed(one, device)) for _ in range(2 * ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    least_many, least_one = map(min, zip(*times, strict=True))
    return max(0.0, (least_many - least_one) / (rows // chunk - 1))


def measure(device: str, quick: bool) -> dict[str, Any]:
    """The contents of a file of costs."""
    shape = QUICK if quick else SHAPES[device]
    copied = 1 << 16 if quick else (1 << 32 if device == "cuda" else 1 << 28)
    described = machine.describe(device)
    versions = described["versions"]
    name = described["processor"] if device == "cpu" else described["device"]
    rates = {
        name: products(shape, getattr(torch, name), device) for name in ("bfloat16", "float32")
    }
    rows = row_rates(shape, device)
    if of_fused := fused_rates(shape, device):
        half = rates["bfloat16"]["half_rows"]
        rates["bfloat16"]["fused"] = of_fused[0] * (1 + half / shape[0])
        rows["fused"] = of_fused[1]
    return {
        "source": f"measured on {name}, {described['threads']} threads, torch {versions['torch']}, "
        f"{described['date']}, rows x H x V = {' x '.join(map(str, shape))}",
        "measured": not quick,
        "products": rates,
        "rows": rows,
        "bandwidth": bandwidth(device, copied),
        "fresh": fresh_rate(device, copied // 4),
        "chunk_seconds": chunk_seconds(device),
    }


def own_name(device: str) -> str:
    """The file that this machine's costs belong to."""
    if device == "cpu":
        return "cpu-amx" if cpu_gemm.kind() == "amx" else "cpu"
    major, minor = torch.cuda.get_device_capability()
    known = [arch for arch in CUDA_COSTS if arch <= 10 * major + minor]
    return CUDA_COSTS[max(known or [min(CUDA_COSTS)])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the constants of the planner.")
    parser.add_argument(
        "--out",
        type=Path,
        help="file, or folder for a file named after the machine; default: hero_kernels/costs",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument(
        "--without-bf16-products",
        action="store_true",
        help="as a CPU that lacks them: operands are widened",
    )
    options = parser.parse_args()
    if options.quick and not options.out:
        parser.error("--quick needs --out: its numbers must not become the machine's.")
    if options.without_bf16_products:
        cpu_gemm.kind = lambda: cpu_gemm.KINDS[0]  # type: ignore[assignment]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = measure(device, options.quick)
    out = options.out or FOLDER
    if out.is_dir():
        out /= f"{own_name(device)}.json"
    out.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
