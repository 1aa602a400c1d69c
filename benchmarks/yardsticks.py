"""What a time is compared with: the head's products alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.problem import Problem
from hero_kernels import gemm

Step = Callable[[], object]


def library_gemms(problem: Problem) -> Step:
    """The products that no implementation can avoid, as fast as the library does them.

    Teacher logits, student logits, dX and, unless the head is frozen, dW, for the rows that count,
    in the inputs' type. A CPU without 16-bit arithmetic multiplies 16-bit numbers tens of times
    slower than fp32 ones: there everything is fp32, and widening the operands is not timed.
    """
    h_s, h_t, weight, rows = _operands(problem)
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
    """The same products as this package does them: fp32 results, and sums over chunks in fp32.

    Where a product of 16-bit gradients has a wide result, the gradients of several chunks wait for
    one product that forms dW.
    """
    h_s, h_t, weight, rows = _operands(problem)
    narrow = gemm.takes_16_bit(weight.device, weight.dtype)
    waiting = weight.shape[1] * (4 if weight.device.type == "cpu" else 2) if narrow else rows
    group = max(1, waiting // rows) * rows
    student, teacher = (_matrix(weight, rows, torch.float32) for _ in range(2))
    grads = _matrix(weight, min(group, len(h_s)), weight.dtype).zero_() if narrow else student
    sum_type = weight.dtype if len(h_s) <= group else torch.float32
    d_weight = torch.zeros_like(weight, dtype=sum_type) if problem.weight.requires_grad else None

    def step() -> None:
        for first in range(0, len(h_s), group):
            end = min(first + group, len(h_s))
            for start in range(first, end, rows):
                part = slice(start, min(start + rows, end))
                size = part.stop - start
                gemm.logits_into(weight, (teacher[:size], h_t[part]), (student[:size], h_s[part]))
                gemm.hidden_gradient(grads[start - first : part.stop - first], weight)
            if d_weight is not None:
                states = h_s[first:end]
                gemm.weight_gradient_into(d_weight, grads[: end - first], states, first > 0)

    return step


def rows_at_once(device: str, vocab: int) -> int:
    """Rows whose logits are held at once by the yardsticks and by the chunked baseline.

    On CUDA 3 GiB of fp32 logits of both sides, since products of fewer rows do not fill the device.
    """
    if device == "cpu":
        return 256
    return max(256, min(8192, (3 << 30) // (8 * vocab) // 256 * 256))


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, int]:
    """h_s and h_t of the rows that count, weight, rows at once (in chunks of equal size)."""
    weight = problem.weight.detach()
    h_s, h_t = problem.active_rows()
    chunks = -(-len(h_s) // rows_at_once(weight.device.type, len(weight)))
    return h_s.detach(), h_t, weight, -(-len(h_s) // chunks)


def _matrix(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """An empty [rows, V]; its rows do not compete for the same lines of a CPU's cache."""
    return weight.new_empty(rows, len(weight) // 64 * 64 + 128, dtype=dtype)[:, : len(weight)]


YARDSTICKS: dict[str, Callable[[Problem], Step]] = {
    "library-gemms": library_gemms,
    "own-gemms": own_gemms,
}


def timed(step: Step, device: str) -> float:
    """Seconds of one call, the device's work included; of a single CPU thread those that it ran,
    which other programs on the machine do not lengthen."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize(device)
    start = clock()
    step()
    synchronize(device)
    return clock() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
