"""Products of bf16 matrices with fp32 results on CPU (csrc/bf16_gemm.cpp), by AMX or AVX-512.

`gemm.py` takes them where the processor has the instructions; torch's own bf16 product would round
logits and sums to bf16.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from hero_kernels import cpu

KINDS = ("none", "avx512", "amx")
"""`HeroGemmKind` of csrc/bf16_gemm.h."""
_STORE = {torch.float32: 0, torch.bfloat16: 1}
_ADD_FLOAT = 2


class _Gemm(ctypes.Structure):
    """`HeroGemm` of csrc/bf16_gemm.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth")),
        *((name, ctypes.c_int64) for name in ("left_stride", "right_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("kind", "store", "num_threads", "reserved")),
    )


@lru_cache(maxsize=1)
def kind() -> str:
    """What this machine multiplies bf16 numbers with here: "none", "avx512" or "amx"."""
    if cpu.available() is not None:
        return KINDS[0]
    return KINDS[cpu.library().hero_gemm_kind()]


def logits_into(weight: Tensor, *products: tuple[Tensor, Tensor]) -> None:
    """out [R, V] fp32 = hidden [R, H] · weight [V, H]ᵀ for one or two pairs (out, hidden).

    Args:
        weight: bf16.
        products: results, of one shape and stride, and bf16 left operands, of one shape.
    """
    (out, hidden), *others = products
    second_out, second = others[0] if others else (None, None)
    if second is not None and second_out is not None:
        assert second.shape == hidden.shape and second_out.stride() == out.stride()
        if second.stride() != hidden.stride():  # the kernel has one stride for both
            hidden, second = hidden.contiguous(), second.contiguous()
    problem = _problem(hidden, weight, out, depth=weight.shape[1])
    _call("hero_gemm_logits", problem, cpu.pointer(second), cpu.pointer(second_out))


def hidden_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [R, V] · weight [V, H], summed in fp32, rounded to bf16: [R, H]."""
    out = grad.new_empty(grad.shape[0], weight.shape[1])
    _call("hero_gemm_hidden", _problem(grad, weight, out, depth=grad.shape[1]))
    return out


def add_hidden_gradient(total: Tensor, grad: Tensor, weight: Tensor) -> None:
    """total [R, H] fp32 += grad [R, V] · weight [V, H], of bf16."""
    problem = _problem(grad, weight, total, depth=grad.shape[1])
    problem.store = _ADD_FLOAT
    _call("hero_gemm_hidden", problem)


def weight_gradient_into(total: Tensor, grad: Tensor, hidden: Tensor, accumulate: bool) -> None:
    """total [V, H] (+)= gradᵀ · hidden, of bf16 [R, V] and [R, H].

    Args:
        total: fp32, or bf16 if not `accumulate`.
        grad: of the logits.
        hidden: states.
        accumulate: add to what `total` holds.
    """
    problem = _problem(grad, hidden, total, depth=grad.shape[0])
    if accumulate:
        assert total.dtype == torch.float32
        problem.store = _ADD_FLOAT
    _call("hero_gemm_weight", problem)


def _problem(left: Tensor, right: Tensor, out: Tensor, depth: int) -> _Gemm:
    for tensor in (left, right, out):
        assert tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
    return _Gemm(
        left=left.data_ptr(),
        right=right.data_ptr(),
        out=out.data_ptr(),
        rows=out.shape[0],
        columns=out.shape[1],
        depth=depth,
        left_stride=left.stride(0),
        right_stride=right.stride(0),
        out_stride=out.stride(0),
        kind=KINDS.index(kind()),
        store=_STORE[out.dtype],
        num_threads=torch.get_num_threads(),
    )


def _call(name: str, problem: _Gemm, *pointers: int | None) -> None:
    arguments = (ctypes.c_void_p(pointer) for pointer in pointers)
    status = getattr(cpu.library(), name)(ctypes.byref(problem), *arguments)
    if status:
        raise RuntimeError(f"{name} found no memory for its operands.")
