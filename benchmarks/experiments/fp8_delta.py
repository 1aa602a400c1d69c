"""delta = (h_s - h_t)·Wᵀ from 8-bit operands: what that costs in exactness.

    python -m benchmarks.experiments.fp8_delta [--out FILE]

delta is relative to itself, so a coarse type might do. The operands are rounded as a GPU's tensor
cores would take them (e4m3 or int8, with one scale for each row or for each 128 numbers of it;
bf16; fp16) and multiplied in fp32: kinder than hardware, whose e4m3 products sum in fewer bits.
Teacher logits, the row kernel and both products for the gradient are the library's in bf16.
"library" is what it does: bf16 operands, and where the difference is no bf16 number, the logits of
both subtracted in fp32. "products" is the reverse: the library's delta, and dX and dW from e4m3
operands with one scale for each 1 x 128 of the gradient and each 128 x 128 of head and states.

The student's states are moved towards the teacher's, h_t + s·(h_s - h_t) rounded to bf16, to see
divergences from 1 down to 1e-6 on the same text. Errors are relative to fp64 for these states.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.states import (
    DIVERGENCES,
    States,
    fp64_truth,
    gaussian,
    logit_gradient,
    logits,
    smollm2,
)
from benchmarks.machine import describe
from benchmarks.problem import relative_error
from hero_kernels import gemm

RESULTS = Path(__file__).parents[1] / "results" / "experiments-fp8-delta.json"
TOKENS, STRIDE = 1024, 4
"""Tokens that the model reads, and every which of them is taken."""
SCALES = (0.5, 0.15, 0.05, 0.015, 0.005, 1.5e-3, 5e-4)
"""|h_s - h_t| as a share of what the model has."""
BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
CASES: dict[str, Callable[[], States]] = {
    "SmolLM2, answer": lambda: smollm2("answer", TOKENS),
    "Gaussian": lambda: gaussian(TOKENS, 576, 49152, 1.0),
}


def e4m3(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """fp32 values that are left of [R, C] in e4m3, with a scale for each `block`."""
    return _scaled(matrix, block, LARGEST, lambda values: values.to(torch.float8_e4m3fn).float())


def int8(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """The same for whole numbers from -127 to 127."""
    return _scaled(matrix, block, 127.0, torch.round)


def _scaled(
    matrix: Tensor, block: tuple[int, int], largest: float, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """[R, C] rounded after each `block` of rows and columns is scaled to at most `largest`."""
    rows, columns = matrix.shape
    high, wide = (min(size, length) for size, length in zip(block, matrix.shape, strict=True))
    padded = torch.nn.functional.pad(matrix.float(), (0, -columns % wide, 0, -rows % high))
    tiles = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    scale = tiles.abs().amax((1, 3), keepdim=True) / largest
    scale = scale.where(scale > 0, 1.0)
    return (rounded(tiles / scale) * scale).view_as(padded)[:rows, :columns]


def _exactly_scaled_fp16(matrix: Tensor) -> Tensor:
    """The same for fp16, with one power of two for the matrix so that little underflows."""
    scale = torch.exp2(torch.floor(torch.log2(matrix.abs().max().float()))) / 2.0**14
    return (matrix.float() / scale).half().float() * scale


ROW = (1, 1 << 30)
OPERANDS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda matrix: matrix.bfloat16().float(),
    "fp16": _exactly_scaled_fp16,
    "e4m3, row": lambda matrix: e4m3(matrix, ROW),
    "e4m3, 128": lambda matrix: e4m3(matrix, (1, BLOCK)),
    "int8, row": lambda matrix: int8(matrix, ROW),
    "int8, 128": lambda matrix: int8(matrix, (1, BLOCK)),
}
"""What is left of both operands of delta, in fp32."""


def nearer(states: States, scale: float) -> States:
    """With the student moved towards the teacher."""
    teacher = states.teacher.float()
    student = teacher + scale * (states.student.float() - teacher)
    return states._replace(student=student.bfloat16())


def e4m3_products(grad: Tensor, states: States) -> tuple[Tensor, Tensor]:
    """dX and dW in fp32 from rounded operands; blocks lie along the dimension that is summed."""
    weight = e4m3(states.weight, (BLOCK, BLOCK))
    hidden = e4m3(states.student, (BLOCK, BLOCK))
    return e4m3(grad, (1, BLOCK)) @ weight, e4m3(grad, (BLOCK, 1)).t() @ hidden


def measure(
    name: str, states: States, scales: tuple[float, ...] = SCALES
) -> Iterator[dict[str, Any]]:
    """One row for each scale, divergence and kind of operand."""
    for scale in scales:
        near = nearer(states, scale)
        teacher, exact_delta, absolute = logits(near)
        difference = near.student.float() - near.teacher.float()
        truths = {divergence: fp64_truth(near, divergence) for divergence in DIVERGENCES}
        for operands in ("library", *OPERANDS):
            if rounded := OPERANDS.get(operands):
                delta, apart = rounded(difference) @ rounded(near.weight).t(), None
            else:
                delta, apart = exact_delta, absolute
            for divergence, truth in truths.items():
                grad, loss = logit_gradient(teacher, delta, divergence, apart)
                d_weight = torch.empty(near.weight.shape)
                gemm.weight_gradient_into(d_weight, grad, near.student, accumulate=False)
                results = {operands: (gemm.hidden_gradient(grad, near.weight), d_weight)}
                if operands == "library":
                    results["products"] = e4m3_products(grad, near)
                for kind, (d_hidden, d_weight) in results.items():
                    yield {
                        "states": name,
                        "divergence": divergence,
                        "value": truth.loss,
                        "operands": kind,
                        "loss": abs(loss - truth.loss) / truth.loss,
                        "dX": relative_error(d_hidden, truth.hidden),
                        "dW": relative_error(d_weight, truth.weight),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, make in CASES.items():
        whole = make()
        states = States(whole.student[::STRIDE], whole.teacher[::STRIDE], whole.weight)
        for row in measure(name, states):
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {"machine": describe("cpu"), "tokens": TOKENS // STRIDE, "rows": rows}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
