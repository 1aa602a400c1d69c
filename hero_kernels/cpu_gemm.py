"""Products of bf16 matrices with fp32 results on CPU (csrc/cpu/bf16_gemm.cpp), by AMX or AVX-512.

`gemm.py` takes them where the processor has the instructions; torch's own bf16 product would round
logits and sums to bf16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor

from hero_kernels import cpu

KINDS = ("none", "avx512", "amx")
"""`HeroGemmKind` of csrc/cpu/bf16_gemm.h."""
_STORE = {torch.float32: 0, torch.bfloat16: 1}
_ADD_FLOAT = 2


class _Gemm(ctypes.Structure):
    """`HeroGemm` of csrc/cpu/bf16_gemm.h, field for field."""

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

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: out of memory.
    """
    (out, hidden), *others = products
    second_out, second = others[0] if others else (None, None)
    if second is not None and second_out is not None:
        found = [(t.dtype, t.shape) for t in (hidden, out, second, second_out)]
        if found[:2] != found[2:]:
            raise ValueError(
                f"Both products must have the same types and shapes; got {list(hidden.shape)} to "
                f"{list(out.shape)} and {list(second.shape)} to {list(second_out.shape)}."
            )
        assert second_out.stride() == out.stride()
        if second.stride() != hidden.stride():  # the kernel has one stride for both
            hidden, second = hidden.contiguous(), second.contiguous()
    shape, depths = (hidden.shape[0], weight.shape[0]), (hidden.shape[1], weight.shape[1])
    problem = _problem(hidden, weight, out, shape, depths, [torch.float32])
    _call(
        "hero_gemm_logits",
        problem,
        None if second is None else second.data_ptr(),
        None if second_out is None else second_out.data_ptr(),
    )


def hidden_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [R, V] · weight [V, H], summed in fp32, rounded to bf16: [R, H].

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: out of memory.
    """
    out = grad.new_empty(grad.shape[0], weight.shape[1])
    _call("hero_gemm_hidden", _hidden_problem(grad, weight, out))
    return out


def add_hidden_gradient(total: Tensor, grad: Tensor, weight: Tensor) -> None:
    """total [R, H] fp32 += grad [R, V] · weight [V, H], of bf16; errors as `hidden_gradient`."""
    problem = _hidden_problem(grad, weight, total, [torch.float32])
    problem.store = _ADD_FLOAT
    _call("hero_gemm_hidden", problem)


def weight_gradient_into(total: Tensor, grad: Tensor, hidden: Tensor, accumulate: bool) -> None:
    """total [V, H] (+)= gradᵀ · hidden, of bf16 [R, V] and [R, H]; errors as `hidden_gradient`.

    Args:
        total: fp32, or bf16 if not `accumulate`.
        grad: of the logits.
        hidden: states.
        accumulate: add to what `total` holds.
    """
    shape, depths = (grad.shape[1], hidden.shape[1]), (grad.shape[0], hidden.shape[0])
    results = [torch.float32] if accumulate else _STORE
    problem = _problem(grad, hidden, total, shape, depths, results)
    if accumulate:
        problem.store = _ADD_FLOAT
    _call("hero_gemm_weight", problem)


def _hidden_problem(
    grad: Tensor, weight: Tensor, out: Tensor, results: Collection[torch.dtype] = _STORE
) -> _Gemm:
    shape, depths = (grad.shape[0], weight.shape[1]), (grad.shape[1], weight.shape[0])
    return _problem(grad, weight, out, shape, depths, results)


def _problem(
    left: Tensor, right: Tensor, out: Tensor, shape: tuple[int, int], depths: tuple[int, int],
    results: Collection[torch.dtype] = _STORE,
) -> _Gemm:  # fmt: skip
    """The C struct; raises ValueError unless the operands have one depth and `out` this shape, and
    TypeError unless they are bf16 and `out` one of `results`."""
    if depths[0] != depths[1] or out.shape != shape:
        raise ValueError(
            f"Operands {list(left.shape)} and {list(right.shape)} have depths {depths[0]} and "
            f"{depths[1]}, which must be equal, and give {list(shape)}; got {list(out.shape)} for "
            "the result."
        )
    if {left.dtype, right.dtype} != {torch.bfloat16} or out.dtype not in results:
        raise TypeError(
            f"Operands of {left.dtype} and {right.dtype} to {out.dtype}; expected torch.bfloat16 "
            f"twice, and for the result one of {', '.join(map(str, results))}."
        )
    for tensor in (left, right, out):
        assert tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
    return _Gemm(
        left=left.data_ptr(),
        right=right.data_ptr(),
        out=out.data_ptr(),
        rows=out.shape[0],
        columns=out.shape[1],
        depth=depths[0],
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
