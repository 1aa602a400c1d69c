"""Logits of both sides by one GEMM kernel, with the statistics of their rows.

    dual_logits         a shared head: teacher logits and delta = (h_s - h_t)·Wᵀ
    pair_logits         heads of their own
    linear_statistics   one side; nothing of the size of the logits reaches memory

The statistics are those of `hero_kernels.phases`; with them `triton/phases.py` computes values and
gradient from the logits that were stored. What storing costs: fp32 teacher logits with a 16-bit
delta keep the gradient within about 0.3 % of fp64 for nearby distributions; a 16-bit teacher adds
the rounding of large logits to the probabilities.

Without outputs to write to (`teacher_out=None`) only statistics are computed. They give the reverse
KL (`reverse_kl`), which loses digits to cancellation where it is tiny. The other divergences need
the normalisers first: store a chunk and call `row_values`, which costs a few bytes for each logit,
where a second pass of the GEMM would cost as much as the first.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hero_kernels import phases
from hero_kernels.phases import Scaling
from hero_kernels.row_arguments import ROW_DTYPES
from hero_kernels.triton import statistics as statistics_columns
from hero_kernels.triton.configs import GemmConfig, gemm_entry
from hero_kernels.triton.dual_gemm_kernel import (
    ONE_SIDE,
    OWN_HEADS,
    SHARED_HEAD,
    dual_gemm_kernel,
)
from hero_kernels.triton.statistics import NUM_STATISTICS, merge_statistics

ENERGY = statistics_columns.ENERGY.value
"""Column of what `linear_statistics` returns: sum exp(z - max) (z - max); 0 in the others."""
OPERANDS = (torch.bfloat16, torch.float16)
PATHS = ("descriptors", "aligned", "unaligned")
_LARGEST_VOCAB = 1 << 24


def refusal(capability: tuple[int, int], dtype: torch.dtype, vocab_size: int) -> str | None:
    """Why the kernel cannot serve, or None if it can.

    Any hidden size is served; one that is no multiple of 8 is read element by element.

    Args:
        capability: compute capability of the device.
        dtype: of hidden states and head.
        vocab_size: columns.
    """
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    if dtype not in OPERANDS:
        return f"it multiplies bfloat16 or float16, got {dtype}: library GEMMs serve the others"
    if vocab_size >= _LARGEST_VOCAB:
        return f"it numbers columns by floats, which are exact below 2^24, got {vocab_size}"
    return None


def operand_path(capability: tuple[int, int], *operands: Tensor) -> str:
    """How matrices are read, one of `PATHS`.

    Args:
        capability: compute capability of the device.
        operands: [rows, size] 16-bit matrices with last stride 1.
    """

    def multiple(size: int, *, with_width: bool) -> bool:
        return all(
            (t.stride(0) % size, t.data_ptr() % 16) == (0, 0)
            and not (with_width and t.shape[1] % size)
            for t in operands
        )

    # The accelerator needs rows that start at multiples of 16 bytes, and masks any width itself.
    if gemm_entry(capability).descriptors is not None and multiple(8, with_width=False):
        return "descriptors"
    # Triton takes a number for aligned if it is a multiple of 16.
    return "aligned" if multiple(16, with_width=True) else "unaligned"


def dual_logits(
    teacher_hidden: Tensor,
    delta_hidden: Tensor,
    weight: Tensor,
    teacher_out: Tensor | None,
    delta_out: Tensor | None,
    *,
    scaling: Scaling,
    target_ids: Tensor | None = None,
    absolute_rows: Tensor | None = None,
    vocab_size: int,
    path: str | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """Raw teacher logits and their distance from the student's, for a shared head.

    Args:
        teacher_hidden: [R, H] bf16 or fp16.
        delta_hidden: [R, H] of the same type: student minus teacher, rounded once.
        weight: [V, H] of the same type.
        teacher_out: [R, V] fp32, bf16 or fp16, to be overwritten; None to store nothing.
        delta_out: [R, V] likewise; None if `teacher_out` is None.
        scaling: for the statistics; the biases are of all V columns.
        target_ids: [R] int64, -1 for none.
        absolute_rows: [R] bool: rows whose `delta_hidden` holds the student's hidden state itself;
            their teacher logits are subtracted in fp32. See `chunked.difference_operand`.
        vocab_size: columns from here on are padding.
        path: how operands are read, None to choose by `operand_path`.
        config: tile, None for the device's.

    Returns:
        [R, 12] fp32 statistics of the logits as stored.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
    """
    return _launch(
        SHARED_HEAD.value,
        (delta_hidden, weight, delta_out),
        (teacher_hidden, weight, teacher_out),
        scaling,
        target_ids,
        vocab_size,
        path,
        config,
        absolute_rows,
    )


def pair_logits(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_out: Tensor | None,
    teacher_out: Tensor | None,
    *,
    scaling: Scaling,
    target_ids: Tensor | None = None,
    vocab_size: int,
    path: str | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """Raw logits of both sides, for heads of their own.

    Args:
        student_hidden: [R, H] bf16 or fp16.
        student_weight: [V, H] of the same type.
        teacher_hidden: [R, H'] of the same type; H' may differ from H.
        teacher_weight: [V, H'] of the same type.
        student_out: [R, V] fp32, to be overwritten; None to store nothing.
        teacher_out: [R, V] likewise.

    The others, the result and what is raised are those of `dual_logits`.
    """
    for name, out in (("student_out", student_out), ("teacher_out", teacher_out)):
        if out is not None and out.dtype != torch.float32:
            raise ValueError(
                f"{name} must be torch.float32, got {out.dtype}: the difference of rounded logits "
                "is not that of the logits."
            )
    return _launch(
        OWN_HEADS.value,
        (student_hidden, student_weight, student_out),
        (teacher_hidden, teacher_weight, teacher_out),
        scaling,
        target_ids,
        vocab_size,
        path,
        config,
    )


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    scaling: Scaling,
    target_ids: Tensor | None = None,
    vocab_size: int,
    path: str | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """Statistics of one side alone, as if it were both student and teacher.

    With a row's columns: log p(target) = TARGET_T - MAX_T - log SUM_T, the entropy is log SUM_S -
    `ENERGY` / SUM_S, and TOP_T the most probable token.

    Args:
        hidden: [R, H] bf16 or fp16.
        weight: [V, H] of the same type.
        scaling: its `student_bias` is this side's.

    The others, the result and what is raised are those of `dual_logits`.
    """
    side = (hidden, weight, None)
    scaling = scaling._replace(student_bias=None, teacher_bias=scaling.student_bias)
    return _launch(ONE_SIDE.value, side, side, scaling, target_ids, vocab_size, path, config)


def reverse_kl(statistics: Tensor) -> Tensor:
    """[R] KL(p_s | p_t) from statistics [R, 12] alone.

    A difference of two means, with an error of about 1e-7 of the log ratios: in the tests 2e-6 of a
    KL of 2.5, 1e-5 of 3e-4, 7e-4 of 3e-6. It may come out negative; `row_values` does not cancel.
    """
    growth = statistics[:, phases.GROWTH] / statistics[:, phases.SUM_T]
    near = growth.abs() < 0.5
    maxima = statistics[:, phases.MAX_S] - statistics[:, phases.MAX_T]
    masses = statistics[:, phases.SUM_S] / statistics[:, phases.SUM_T]
    far_offset = maxima - statistics[:, phases.SHIFT] + masses.log()
    offset = torch.where(near, growth.where(near, 0.0).log1p(), far_offset)
    return statistics[:, phases.MEAN] / statistics[:, phases.SUM_S] - offset


_Side = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, head, and where the logits go."""


def _launch(
    mode: int,
    student: _Side,
    teacher: _Side,
    scaling: Scaling,
    target_ids: Tensor | None,
    vocab_size: int,
    path: str | None,
    config: GemmConfig | None,
    absolute_rows: Tensor | None = None,
) -> Tensor:
    _check(student, teacher, scaling, target_ids, absolute_rows, vocab_size)
    rows, columns = len(student[0]), len(student[1])
    operands = (*student[:2], *teacher[:2])
    if path is None or config is None:
        capability = torch.cuda.get_device_capability(student[0].device)
        path = path or operand_path(capability, *operands)
        configs = getattr(gemm_entry(capability), path)
        if configs is None:
            raise ValueError(
                f"path={path!r} is not for compute capability {capability}: pass 'aligned'."
            )
        config = config or configs[mode]
    tiles_v = triton.cdiv(columns, config.block_v)
    # Rows last: then the kernel's stores, and the merge's loads, are of neighbours.
    parts = student[0].new_empty((tiles_v, NUM_STATISTICS.value, rows), dtype=torch.float32)
    if rows == 0:
        return parts.new_empty((0, NUM_STATISTICS.value))

    def source(tensor: Tensor, block_rows: int) -> Tensor | TensorDescriptor:
        if path != "descriptors":
            return tensor
        return TensorDescriptor.from_tensor(tensor, [block_rows, config.block_k])

    def pointer(tensor: Tensor | None) -> Tensor:
        return parts if tensor is None else tensor  # what is absent is never read

    out_s, out_t = student[2], teacher[2]
    with torch.cuda.device_of(student[0]):
        dual_gemm_kernel[(triton.cdiv(rows, config.block_t) * tiles_v,)](
            source(student[0], config.block_t),
            source(student[1], config.block_v),
            source(teacher[0], config.block_t),
            source(teacher[1], config.block_v),
            pointer(out_s),
            pointer(out_t),
            pointer(scaling.student_bias),
            pointer(scaling.teacher_bias),
            pointer(target_ids),
            pointer(absolute_rows),
            parts,
            rows,
            columns,
            vocab_size,
            student[0].shape[1],
            teacher[0].shape[1],
            *(tensor.stride(0) for tensor in operands),
            0 if out_s is None else out_s.stride(0),
            0 if out_t is None else out_t.stride(0),
            parts.stride(0),
            parts.stride(1),
            scaling.inv_temperature,
            scaling.softcap,
            scaling.logit_scale,
            MODE=mode,
            DESCRIPTORS=path == "descriptors",
            WRITE_LOGITS=out_t is not None,
            HAS_STUDENT_BIAS=scaling.student_bias is not None,
            HAS_TEACHER_BIAS=scaling.teacher_bias is not None,
            HAS_SOFTCAP=scaling.softcap > 0,
            HAS_TARGETS=target_ids is not None,
            HAS_ABSOLUTE=absolute_rows is not None,
            BLOCK_T=config.block_t,
            BLOCK_V=config.block_v,
            BLOCK_K=config.block_k,
            GROUP_T=config.group_t,
            SLICES=config.slices,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return merge_statistics(parts.transpose(1, 2), one_side=mode == ONE_SIDE.value)


def _check(
    student: _Side,
    teacher: _Side,
    scaling: Scaling,
    target_ids: Tensor | None,
    absolute_rows: Tensor | None,
    vocab_size: int,
) -> None:
    rows, columns = len(student[0]), len(student[1])
    dtype, device = student[0].dtype, student[0].device
    if dtype not in OPERANDS:
        raise ValueError(
            f"Hidden states must be torch.bfloat16 or torch.float16, got {dtype}: use a library "
            "GEMM."
        )
    if (student[2] is None) != (teacher[2] is None):
        raise ValueError("Both outputs must be given, or none; got one.")
    for hidden, weight, out in (student, teacher):
        size = hidden.shape[-1]
        for name, tensor, shape, dtypes in (
            ("hidden states", hidden, (rows, size), (dtype,)),
            ("head", weight, (columns, size), (dtype,)),
            ("output", out, (rows, columns), ROW_DTYPES),
        ):
            if tensor is None:
                continue
            if tensor.shape != shape or tensor.dtype not in dtypes or tensor.stride(1) != 1:
                expected = " or ".join(str(kind) for kind in dtypes)
                raise ValueError(
                    f"{name} must be {list(shape)} of {expected} with last stride 1, got "
                    f"{list(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}."
                )
    vectors: tuple[tuple[str, Tensor | None, tuple[int, ...], torch.dtype], ...] = (
        ("each bias", scaling.student_bias, (columns,), torch.float32),
        ("each bias", scaling.teacher_bias, (columns,), torch.float32),
        ("target_ids", target_ids, (rows,), torch.int64),
        ("absolute_rows", absolute_rows, (rows,), torch.bool),
    )
    for name, vector, expected_shape, kind in vectors:
        if vector is not None and (
            (vector.shape, vector.dtype) != (expected_shape, kind) or not vector.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be a contiguous {list(expected_shape)} tensor of {kind}, got "
                f"{list(vector.shape)} of {vector.dtype} with strides {vector.stride()}."
            )
    for tensor in (*student, *teacher, *scaling[3:], target_ids, absolute_rows):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"All tensors must be on {device}, got one on {tensor.device}.")
    largest = min(columns, _LARGEST_VOCAB - 1)
    if not 1 <= vocab_size <= largest:
        raise ValueError(f"vocab_size must be in [1, {largest}], got {vocab_size}.")
