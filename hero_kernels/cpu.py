"""The row kernel in C++ (csrc/cpu/): loads the library, passes it pointers.

The library is plain C: it was compiled without torch or Python headers, so one build serves every
version of both. `pip install` builds it where a C++ compiler exists (see setup.py).
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hero_kernels.constants import DIVERGENCE_CODES, NUM_STATS
from hero_kernels.objective import Objective
from hero_kernels.types import RowTensors, Tile

ABI_VERSION = 4
"""Version of the C interface; csrc/rows.h holds the same number."""

OUT_OF_MEMORY = 1
"""A result of `hero_divergence_rows`; 0 is success."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


class RowsProblem(ctypes.Structure):
    """`RowsProblem` of csrc/rows.h, field for field."""

    _fields_ = tuple(
        (name, kind)
        for kind, names in (
            (ctypes.c_void_p, "student teacher grad student_bias teacher_bias target_ids"),
            (ctypes.c_void_p, "row_weights old_logprobs temperatures absolute_rows stats"),
            (ctypes.c_int64, "rows columns vocab_size student_stride teacher_stride grad_stride"),
            (ctypes.c_int32, "student_dtype teacher_dtype grad_dtype"),
            (ctypes.c_int32, "divergence delta with_stats num_threads"),
            (ctypes.c_float, "beta one_minus_beta inv_temperature softcap logit_scale is_clip"),
        )
        for name in names.split()
    )


def load_library(
    stem: str, kernel: str, version_function: str, remedy: str
) -> tuple[ctypes.CDLL | None, str]:
    """The library `stem`*.so beside this file, or None and the reason why there is none."""
    path = next(iter(sorted(Path(__file__).parent.glob(f"{stem}*.so"))), None)
    if path is None:
        if (sources := Path(__file__).parents[1]).joinpath("setup.py").is_file():
            remedy += f"; these are the sources in {sources}, not what was installed elsewhere"
        return None, f"the {kernel} is not built: {remedy}"
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, version_function)()
    except (OSError, AttributeError) as error:
        return None, f"the {kernel} {path.name} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return None, (
            f"the {kernel} {path.name} has interface version {version}, expected {ABI_VERSION}: "
            "it was built from other sources, `pip install` again"
        )
    return library, ""


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    remedy = "install a C++ compiler, then `pip install` again"
    return load_library("_C", "C++ row kernel", "hero_abi_version", remedy)


def available() -> str | None:
    """None if the kernel can run, else the reason why not."""
    return _load()[1] or None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is not available.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


@lru_cache(maxsize=1)
def instruction_set() -> str:
    """What the kernel runs on here: "baseline", "avx2" or "avx512".

    Raises:
        RuntimeError: the library is not available.
    """
    return INSTRUCTION_SETS[library().hero_instruction_set()]


HUGE = 1 << 20
"""Elements of a gradient, or bytes of a call's tiles, below which any memory will do."""


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a fresh tensor, if it is large, on a CPU, and the library is there.

    Returns the tensor.

    A fresh buffer costs a page fault for each page that is touched first; the values are the same.
    """
    if tensor.numel() < HUGE or not tensor.is_cpu:
        return tensor
    library, _ = _load()
    if library is not None:
        library.hero_advise_huge_pages(
            ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.untyped_storage().nbytes())
        )
    return tensor


KEPT_BYTES = 512 << 20
"""Most memory that stays with the process from one call to the next. More is wanted where the head
is large, and there the products take so long that fresh memory costs little."""

_kept: list[Tensor] = []


def take_memory(num_bytes: int) -> Tensor:
    """[at least num_bytes] of uint8 and any values, for one call: an earlier one's if there is any.

    The system clears every page of fresh memory when it is touched first, which takes up to a
    tenth of a call in bf16 (docs/benchmarks.md).
    """
    with suppress(IndexError):
        kept = _kept.pop()
        if kept.numel() >= num_bytes:
            return kept
        del kept  # before there is another
    with torch.inference_mode(False):  # else calls outside of that mode could not write to it
        return advise_huge_pages(torch.empty(num_bytes, dtype=torch.uint8, device="cpu"))


def keep_memory(memory: Tensor) -> None:
    """For the next call; only one is kept. Of two threads at once the second finds none."""
    if memory.numel() <= KEPT_BYTES:
        _kept[:] = [memory]


def release_memory() -> None:
    """Give back what is kept on the CPU for the next call, at most 512 MiB (docs/memory.md)."""
    _kept.clear()


def divergence_rows(
    tile: Tile,
    rows: RowTensors,
    objective: Objective,
    with_stats: bool,
    instruction_set: str | None = None,
) -> Tensor:
    """Divergence, statistics and gradient of whole rows: `RowKernels.divergence_rows`.

    Logits are fp32, bf16 or fp16; the vectors of `rows` and the biases are contiguous, in fp32.
    Target ids lie within the real columns or are -1: the kernel reads memory by them. Bitwise the
    same for any number of threads. `instruction_set` forces one that this machine has.

    Raises:
        RuntimeError: the library is not available, or out of memory.
    """
    kernels = library()
    stats = torch.empty((tile.student.shape[0], NUM_STATS), dtype=torch.float32)
    problem = rows_problem(tile, rows, objective, with_stats, stats)
    level = (
        kernels.hero_instruction_set()
        if instruction_set is None
        else INSTRUCTION_SETS.index(instruction_set)
    )
    status = kernels.hero_divergence_rows(ctypes.byref(problem), level)
    if status == OUT_OF_MEMORY:
        raise RuntimeError(
            f"The C++ row kernel found no memory for rows of {tile.student.shape[1]} logits."
        )
    if status:
        raise RuntimeError(f"The C++ row kernel was built without {instruction_set}.")
    return stats


def rows_problem(
    tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool, stats: Tensor
) -> RowsProblem:
    """The C struct of a call whose result goes to `stats` [R, 8]; all tensors must outlive it."""
    student, teacher, grad = tile.student, tile.teacher, tile.grad
    targets, old, temperatures = rows.target_ids, rows.old_logprobs, rows.temperatures
    absolute = tile.absolute_rows
    assert teacher is not None and teacher.shape == student.shape
    assert grad is None or grad.shape == student.shape
    assert tile.num_real <= student.shape[1] and len(rows.weights) == student.shape[0]
    return RowsProblem(
        student.data_ptr(),
        teacher.data_ptr(),
        None if grad is None else grad.data_ptr(),
        None if tile.student_bias is None else tile.student_bias.data_ptr(),
        None if tile.teacher_bias is None else tile.teacher_bias.data_ptr(),
        None if targets is None else targets.data_ptr(),
        rows.weights.data_ptr(),
        None if old is None else old.data_ptr(),
        None if temperatures is None else temperatures.data_ptr(),
        None if absolute is None else absolute.data_ptr(),
        stats.data_ptr(),
        student.shape[0],
        student.shape[1],
        tile.num_real,
        student.stride(0),
        teacher.stride(0),
        0 if grad is None else grad.stride(0),
        DTYPES[student.dtype],
        DTYPES[teacher.dtype],
        0 if grad is None else DTYPES[grad.dtype],
        DIVERGENCE_CODES[objective.divergence],
        tile.is_delta,
        with_stats,
        torch.get_num_threads(),
        objective.beta,
        1.0 - objective.beta,
        1.0 / objective.temperature,
        objective.softcap or 0.0,
        objective.logit_scale,
        objective.is_clip or 0.0,
    )
