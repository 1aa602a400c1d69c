"""The row kernel in C++ (csrc/): loads the library, passes it pointers.

The library is plain C: it was compiled without torch or Python headers, so one build serves every
version of both. `pip install` builds it where a C++ compiler exists (see setup.py).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hero_kernels.row_arguments import check_matrices, check_vectors

ABI_VERSION = 3
"""Version of the C interface; csrc/rows_problem.h holds the same number."""

NUM_STATS = 8
OUT_OF_MEMORY = 1
"""A result of `hero_divergence_rows`; 0 is success."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


class RowsProblem(ctypes.Structure):
    """`RowsProblem` of csrc/rows_problem.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "grad")),
        *((name, ctypes.c_void_p) for name in ("student_bias", "teacher_bias", "target_ids")),
        *(
            (name, ctypes.c_void_p)
            for name in ("row_weights", "old_logprobs", "absolute_rows", "stats")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "vocab_size")),
        *((name, ctypes.c_int64) for name in ("student_stride", "teacher_stride", "grad_stride")),
        *((name, ctypes.c_int32) for name in ("student_dtype", "teacher_dtype", "grad_dtype")),
        *((name, ctypes.c_int32) for name in ("divergence", "delta", "with_stats", "num_threads")),
        *((name, ctypes.c_float) for name in ("beta", "inv_temperature", "softcap")),
        *((name, ctypes.c_float) for name in ("logit_scale", "is_clip")),
    )


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    folder = Path(__file__).parent
    path = next(iter(sorted(folder.glob("_C*.so"))), None)
    if path is None:
        return (
            None,
            "the C++ row kernel is not built: install a C++ compiler, then `pip install` again",
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.hero_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the C++ row kernel {path.name} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return None, (
            f"the C++ row kernel {path.name} has interface version {version}, expected "
            f"{ABI_VERSION}: it was built from other sources, `pip install` again"
        )
    library.hero_divergence_rows.argtypes = (ctypes.POINTER(RowsProblem), ctypes.c_int)
    return library, ""


def available() -> str | None:
    """None if the kernel can run, else the reason why not."""
    return _load()[1] or None


def instruction_set() -> str:
    """What the kernel runs on here: "baseline", "avx2" or "avx512".

    Raises:
        RuntimeError: the library is not available.
    """
    return INSTRUCTION_SETS[library().hero_instruction_set()]


def has_threads() -> bool:
    """Whether the library was compiled with OpenMP; without it rows run one after another.

    Raises:
        RuntimeError: the library is not available.
    """
    return bool(library().hero_has_threads())


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a fresh CPU tensor, if the library is there; returns the tensor.

    A fresh buffer costs a page fault for each page that is touched first; the values are the same.
    """
    library, _ = _load()
    if library is not None and tensor.device.type == "cpu":
        library.hero_advise_huge_pages(
            ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.untyped_storage().nbytes())
        )
    return tensor


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is not available.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


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
    """Divergence, statistics and gradient of every row, in one parallel sweep.

    A logit is `cap((raw + bias) * logit_scale) * inv_temperature`, `cap(z) = c * tanh(z / c)`. The
    gradient includes `row_weights` and the importance ratio `min(exp(log p_s(y) - old_logprobs),
    is_clip)`. Columns from `vocab_size` on are padding: ignored, with zero gradient. Logits of -inf
    mask a column; where one side alone is masked, the log ratio counts as +-1e4. Rows of weight 0
    get zero gradients, and zero statistics if these would not be finite. Bitwise equal for any
    number of threads.

    Args:
        student: raw student logits z_s [R, V], or z_s - z_t with `delta`; fp32, bf16 or fp16.
        teacher: raw teacher logits z_t [R, V]; fp32, bf16 or fp16.
        grad: None, or [R, V] to overwrite with d(weighted loss) / d(raw student logit); may be
            `student` or `teacher` itself.
        delta: whether `student` holds the difference of the raw logits.
        divergence: 0 generalised JSD, 1 forward KL, 2 reverse KL.
        beta: share of the teacher in the JSD mixture, in (0, 1).
        inv_temperature: 1 / T.
        softcap: c of c * tanh(z / c); 0 for none.
        logit_scale: factor before the soft-cap.
        student_bias: [V] or None.
        teacher_bias: [V] or None.
        target_ids: sampled tokens [R] int64, -1 for none; or None.
        row_weights: [R] fp32.
        old_logprobs: log-probabilities at sampling time [R] fp32; None for no importance ratio.
        is_clip: upper limit of the importance ratio; 0 for none.
        vocab_size: number of real columns.
        with_stats: fill columns 4 to 6.
        absolute_rows: [R] bool; with `delta`, rows whose `student` holds z_s all the same.

    Returns:
        [R, 8] fp32: divergence (unweighted), importance ratio, log p_s(y), log p_t(y), student
        entropy, teacher entropy, top-1 agreement, 0.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
        RuntimeError: the library is not available, or out of memory.
    """
    return _divergence_rows(
        student,
        teacher,
        grad,
        delta,
        divergence,
        beta,
        inv_temperature,
        softcap,
        logit_scale,
        student_bias,
        teacher_bias,
        target_ids,
        row_weights,
        old_logprobs,
        is_clip,
        vocab_size,
        with_stats,
        absolute_rows,
        instruction_set=-1,
    )


@torch.library.custom_op(
    "hero_kernels::divergence_rows_", mutates_args=("grad",), device_types="cpu"
)
def _divergence_rows(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
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
    absolute_rows: Tensor | None,
    instruction_set: int,
) -> Tensor:
    """The op behind `divergence_rows`; `instruction_set` forces one (-1: the machine's best)."""
    kernels = library()
    check_matrices(student, teacher, grad, vocab_size)
    check_vectors(student, target_ids, row_weights, old_logprobs, absolute_rows, vocab_size)
    rows, columns = student.shape
    stats = torch.empty((rows, NUM_STATS), dtype=torch.float32)
    # Biases are [V]: the copies cost nothing beside [R, V], and must outlive the call.
    biases = [fp32_bias(student_bias, columns), fp32_bias(teacher_bias, columns)]
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
    problem.num_threads = torch.get_num_threads()
    if instruction_set < 0:
        instruction_set = kernels.hero_instruction_set()
    status = kernels.hero_divergence_rows(ctypes.byref(problem), instruction_set)
    if status == OUT_OF_MEMORY:
        raise RuntimeError(f"The C++ row kernel found no memory for rows of {columns} logits.")
    if status:
        raise RuntimeError(
            f"The C++ row kernel has no instruction set {instruction_set} on this platform."
        )
    return stats


@_divergence_rows.register_fake
def _(student: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return student.new_empty((student.shape[0], NUM_STATS), dtype=torch.float32)


def rows_problem(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    stats: Tensor,
    *,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    row_weights: Tensor,
    old_logprobs: Tensor | None,
    absolute_rows: Tensor | None,
    **scalars: float,
) -> RowsProblem:
    """The arguments of `divergence_rows` and where its result goes [R, 8], as the C struct.

    The tensors must outlive it; the biases are fp32 and contiguous (`fp32_bias`).
    """
    return RowsProblem(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        grad=pointer(grad),
        student_bias=pointer(student_bias),
        teacher_bias=pointer(teacher_bias),
        target_ids=pointer(target_ids),
        row_weights=row_weights.data_ptr(),
        old_logprobs=pointer(old_logprobs),
        absolute_rows=pointer(absolute_rows),
        stats=stats.data_ptr(),
        rows=student.shape[0],
        columns=student.shape[1],
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        grad_stride=0 if grad is None else grad.stride(0),
        student_dtype=DTYPES[student.dtype],
        teacher_dtype=DTYPES[teacher.dtype],
        grad_dtype=0 if grad is None else DTYPES[grad.dtype],
        **scalars,
    )


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the first element; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def fp32_bias(bias: Tensor | None, columns: int) -> Tensor | None:
    """[columns] in fp32, contiguous; raises ValueError for another shape."""
    if bias is None:
        return None
    if bias.shape != (columns,):
        raise ValueError(
            f"A bias must have shape [{columns}] like a row of logits, got {list(bias.shape)}."
        )
    return bias.to(torch.float32).contiguous()
