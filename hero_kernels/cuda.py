"""The row kernel in CUDA C++ (csrc/cuda/): loads the library, passes it pointers and a stream.

It reads each logit from global memory once: a cluster of thread blocks holds a row in its shared
memory (compute capability 9.0 and newer), or a single block does. Rows that do not fit are read
again in every sweep. `pip install` builds the library where nvcc is found (see setup.py); it links
no torch, so one build serves every version.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels.cpu import ABI_VERSION, NUM_STATS, RowsProblem, fp32_bias, rows_problem
from hero_kernels.row_arguments import check_matrices, check_vectors

MIN_CAPABILITY = (8, 0)
MAX_SIZE = 1 << 30
"""Rows, and logits in a row: the kernel counts both in 32 bits (their product in 64)."""


class Layout(ctypes.Structure):
    """`Plan` of csrc/cuda/plan.h, field for field."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            *("cluster_size", "warps", "slice_columns", "tiles", "stages", "resident", "vectors"),
            *("teacher_stage", "student_stage", "student_offset", "shared_bytes"),
        )
    )


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    reason: str
    """Why there is no library."""


@lru_cache(maxsize=1)
def _load() -> _Loaded:
    path = next(iter(sorted(Path(__file__).parent.glob("_cuda*.so"))), None)
    if path is None:
        return _Loaded(
            None,
            "the CUDA row kernel is not built: install nvcc, then `pip install` again with "
            "HERO_BUILD_CUDA=1",
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.hero_cuda_abi_version()
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"the CUDA row kernel {path.name} cannot be loaded: {error}")
    if version != ABI_VERSION:
        return _Loaded(
            None,
            f"the CUDA row kernel {path.name} has interface version {version}, expected "
            f"{ABI_VERSION}: it was built from other sources, `pip install` again",
        )
    problem = ctypes.POINTER(RowsProblem)
    library.hero_cuda_divergence_rows.argtypes = (problem, ctypes.c_int, ctypes.c_void_p)
    library.hero_cuda_plan.argtypes = (problem, ctypes.c_int, ctypes.POINTER(Layout))
    library.hero_cuda_error.argtypes = (ctypes.c_int,)
    library.hero_cuda_error.restype = ctypes.c_char_p
    return _Loaded(library, "")


def available() -> str | None:
    """None if the kernel can run, else the reason why not."""
    if reason := _load().reason:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return "the CUDA row kernel needs compute capability 8.0 or newer"
    return None


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    *,
    delta: bool,
    divergence: int,
    beta: float,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    row_weights: Tensor,
    old_logprobs: Tensor | None,
    is_clip: float,
    vocab_size: int,
    with_stats: bool,
    absolute_rows: Tensor | None = None,
) -> Tensor:
    """Divergence, statistics and gradient of every row; as `hero_kernels.cpu.divergence_rows`.

    Runs on the current stream of the tensors' device and waits for nothing. Bitwise the same in
    every run on the same kind of GPU. Fastest where the rows of all three matrices begin at
    multiples of 16 bytes.

    Returns:
        [R, 8] fp32.

    Raises:
        ValueError: shapes, dtypes, devices, strides or sizes that the kernel cannot read.
        RuntimeError: the library is not available, or CUDA refuses the launch.
    """
    if student.device.type != "cuda":
        raise ValueError(
            f"The CUDA row kernel takes tensors on a CUDA device, got {student.device}: "
            "use impl='cpu' or move them."
        )
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    check_matrices(student, teacher, grad, vocab_size)
    check_vectors(student, target_ids, row_weights, old_logprobs, absolute_rows, vocab_size)
    check_size(student)
    stats = student.new_empty((student.shape[0], NUM_STATS), dtype=torch.float32)
    if student.shape[0] == 0:
        return stats
    # Copies of the biases, if any, are freed in the order of the stream.
    biases = [fp32_bias(bias, student.shape[1]) for bias in (student_bias, teacher_bias)]
    with torch.cuda.device_of(student):
        problem = rows_problem(
            student,
            teacher,
            grad,
            stats,
            delta=delta,
            divergence=divergence,
            beta=beta,
            inv_temperature=inv_temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            student_bias=biases[0],
            teacher_bias=biases[1],
            target_ids=target_ids,
            row_weights=row_weights,
            old_logprobs=old_logprobs,
            is_clip=is_clip,
            vocab_size=vocab_size,
            with_stats=with_stats,
            absolute_rows=absolute_rows,
        )
        stream = torch.cuda.current_stream(student.device).cuda_stream
        status = library.hero_cuda_divergence_rows(
            ctypes.byref(problem), student.device.index, stream
        )
    if status:
        message = library.hero_cuda_error(status).decode()
        raise RuntimeError(
            f"CUDA refused the row kernel for {student.shape[0]} rows of {student.shape[1]} "
            f"logits: {message} (error {status})."
        )
    return stats


def check_size(student: Tensor) -> None:
    """Raise ValueError for more rows or columns than the kernel can count."""
    if max(student.shape) > MAX_SIZE:
        raise ValueError(
            f"The CUDA row kernel takes up to {MAX_SIZE} rows and columns, got "
            f"{list(student.shape)}: split the rows, or use impl='torch'."
        )
