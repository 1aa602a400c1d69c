"""The row kernel in CUDA C++ (csrc/cuda/): loads the library, passes it pointers and a stream.

It reads each logit from global memory once: a cluster of thread blocks holds a row in its shared
memory (compute capability 9.0 and newer), or a single block does. Rows that do not fit are read
again in every sweep. `pip install` builds the library where nvcc is found (see setup.py); it links
no torch, so one build serves every version.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from hero_kernels.constants import NUM_STATS
from hero_kernels.cpu import load_library, rows_problem
from hero_kernels.objective import Objective
from hero_kernels.types import RowTensors, Tile

MIN_CAPABILITY = (8, 0)
MAX_SIZE = 1 << 30
"""Rows, and logits in a row: the kernel counts both in 32 bits (their product in 64)."""


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    remedy = "install nvcc, then `pip install` again with HERO_BUILD_CUDA=1"
    library, reason = load_library("_cuda", "CUDA row kernel", "hero_cuda_abi_version", remedy)
    if library is not None:
        library.hero_cuda_error.restype = ctypes.c_char_p
    return library, reason


def available() -> str | None:
    """None if the kernel can run, else the reason why not."""
    if reason := _load()[1]:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return "the CUDA row kernel needs compute capability 8.0 or newer"
    return None


def divergence_rows(tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool) -> Tensor:
    """Divergence, statistics and gradient of whole rows, as `hero_kernels.cpu.divergence_rows`.

    Runs on the current stream of the tensors' device and waits for nothing. Bitwise the same in
    every run. Target ids beyond the real columns count as -1.

    Raises:
        ValueError: more rows or columns than the kernel can count.
        RuntimeError: the library is not available, or CUDA refuses the launch.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    student = tile.student
    check_size(student)
    stats = student.new_empty((student.shape[0], NUM_STATS), dtype=torch.float32)
    if student.shape[0] == 0:
        return stats
    problem = rows_problem(tile, rows, objective, with_stats, stats)
    with torch.cuda.device_of(student):  # the library makes the device current
        stream = torch.cuda.current_stream(student.device).cuda_stream
        status = library.hero_cuda_divergence_rows(
            ctypes.byref(problem), student.device.index, ctypes.c_void_p(stream)
        )
    if status:
        raise RuntimeError(
            f"CUDA refused the row kernel for {student.shape[0]} rows of {student.shape[1]} "
            f"logits: {library.hero_cuda_error(status).decode()} (error {status})."
        )
    return stats


def check_size(student: Tensor) -> None:
    """Raise ValueError for more rows or columns than the kernel can count."""
    if max(student.shape) > MAX_SIZE:
        raise ValueError(
            f"The CUDA row kernel takes up to {MAX_SIZE} rows and columns, got "
            f"{list(student.shape)}: split the rows, or use impl='torch'."
        )
