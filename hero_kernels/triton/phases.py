"""The row kernel in phases, in Triton: statistics, values and gradient of columns seen in pieces.

    row_statistics            one sweep: maxima, normalisers, sum p_t expm1(x), mean log ratio
    row_values                one sweep: the divergence, its centre, entropies
    row_gradient              one sweep: the gradient
    row_values_and_gradient   both in one sweep for the KLs; the JSD's gradient needs K first

A program walks through one row, or through a piece of it where there are few rows. Statistics of
pieces are merged by `merge_statistics`, values by addition; nothing depends on timing. Formulas as
in rows.py; columns of the results in `hero_kernels.phases`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hero_kernels.phases import Scaling
from hero_kernels.row_arguments import check_matrices
from hero_kernels.triton.configs import ROWS, STATISTICS, RowConfig, row_config
from hero_kernels.triton.phase_kernels import (
    JSD,
    NUM_VALUES,
    divergence_kernel,
    statistics_kernel,
)
from hero_kernels.triton.statistics import NUM_STATISTICS, merge_statistics

_PROGRAMS = 1024
"""Rows are split into pieces until there are about this many programs, enough for any device; a
constant, so that the order of summation depends on shapes alone."""
_PIECE = 8192
"""Least number of columns of a piece."""


def row_statistics(
    student: Tensor,
    teacher: Tensor,
    *,
    delta: bool,
    scaling: Scaling,
    target_ids: Tensor | None = None,
    first_column: int = 0,
    vocab_size: int,
    config: RowConfig | None = None,
) -> Tensor:
    """Statistics of the columns first_column .. first_column + C - 1 of each row.

    Args:
        student: [R, C] raw logits, or raw_s - raw_t if `delta`; fp32, bf16 or fp16.
        teacher: [R, C] raw logits.
        delta: what `student` holds.
        scaling: of the logits; the biases are those of these columns.
        target_ids: [R] int64 in the whole vocabulary, -1 for none.
        first_column: place of these columns in the whole vocabulary.
        vocab_size: of the whole vocabulary; columns from there on are padding.
        config: launch settings; None for those of the device.

    Returns:
        [R, 12] fp32.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
    """
    launch = _Launch(student, teacher, None, scaling, first_column, vocab_size, config, STATISTICS)
    if target_ids is not None:
        _check_rows("target_ids", target_ids, torch.int64, student)
    parts = student.new_empty(
        (launch.parts, len(student), NUM_STATISTICS.value), dtype=torch.float32
    )
    if len(student) == 0:
        return parts[0]
    with torch.cuda.device_of(student):
        statistics_kernel[launch.grid](
            student,
            teacher,
            _pointer(scaling.student_bias, parts),
            _pointer(scaling.teacher_bias, parts),
            _pointer(target_ids, parts),
            parts,
            len(student),
            student.shape[1],
            launch.real,
            launch.piece,
            first_column,
            student.stride(0),
            teacher.stride(0),
            scaling.inv_temperature,
            scaling.softcap,
            scaling.logit_scale,
            DELTA=delta,
            HAS_TARGETS=target_ids is not None,
            **launch.options,
        )
    # Also a single part: its shift comes from the first block, not from the maxima.
    return merge_statistics(parts)


def row_values(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    *,
    delta: bool,
    scaling: Scaling,
    divergence: int,
    beta: float,
    with_stats: bool,
    first_column: int = 0,
    vocab_size: int,
    config: RowConfig | None = None,
) -> Tensor:
    """What these columns add to the divergence, its centre and the entropies.

    Args:
        statistics: [R, 12] of whole rows.
        divergence: `Divergence.code`.
        beta: weight of the teacher in the JSD's mixture.
        with_stats: compute the entropies.

    The others are those of `row_statistics`.

    Returns:
        [R, 4] fp32.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
    """
    launch = _Launch(student, teacher, None, scaling, first_column, vocab_size, config)
    options = {"DELTA": delta, "DIVERGENCE": divergence, "WITH_STATS": with_stats}
    values = launch.new_values()
    launch.divergence(statistics, values, None, beta, WITH_VALUES=True, **options)
    return _sum_parts(values)


def row_gradient(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor,
    statistics: Tensor,
    values: Tensor,
    row_scale: Tensor,
    *,
    delta: bool,
    scaling: Scaling,
    divergence: int,
    beta: float,
    first_column: int = 0,
    vocab_size: int,
    config: RowConfig | None = None,
) -> None:
    """Write row_scale · d(divergence)/d(raw student logit) of these columns.

    Args:
        grad: [R, C] to be overwritten, `student` or `teacher` itself if need be; 0 for padding and
            for rows of scale 0.
        statistics: [R, 12] of whole rows.
        values: [R, 4] of whole rows; read for the JSD only.
        row_scale: [R] fp32, weight and importance ratio.

    The others are those of `row_values`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
    """
    launch = _Launch(student, teacher, grad, scaling, first_column, vocab_size, config)
    _check_rows("values", values, torch.float32, student, NUM_VALUES.value)
    options = {"DELTA": delta, "DIVERGENCE": divergence, "WITH_STATS": False}
    launch.divergence(statistics, values, row_scale, beta, WITH_VALUES=False, **options)


def row_values_and_gradient(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor,
    statistics: Tensor,
    row_scale: Tensor,
    *,
    delta: bool,
    scaling: Scaling,
    divergence: int,
    with_stats: bool,
    first_column: int = 0,
    vocab_size: int,
    config: RowConfig | None = None,
) -> Tensor:
    """`row_values` and `row_gradient` of a KL in one sweep.

    The gradients of the KLs need no values: the reverse KL's centre is in the statistics.

    Returns:
        [R, 4] fp32.

    Raises:
        ValueError: the JSD; shapes, dtypes, devices or strides that the kernel cannot read.
    """
    if divergence == JSD.value:
        raise ValueError(
            "row_values_and_gradient takes forward or reverse KL, got the JSD, whose gradient "
            "needs its values first: call row_values, then row_gradient."
        )
    launch = _Launch(student, teacher, grad, scaling, first_column, vocab_size, config)
    options = {"DELTA": delta, "DIVERGENCE": divergence, "WITH_STATS": with_stats}
    values = launch.new_values()
    launch.divergence(statistics, values, row_scale, 0.0, WITH_VALUES=True, **options)
    return _sum_parts(values)


class _Launch:
    """What the launches have in common: checked matrices, pieces, settings."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        grad: Tensor | None,
        scaling: Scaling,
        first_column: int,
        vocab_size: int,
        config: RowConfig | None,
        table: dict[int, RowConfig] = ROWS,
    ) -> None:
        rows, columns = student.shape
        if first_column < 0 or vocab_size < 1:
            raise ValueError(
                "first_column must be at least 0 and vocab_size at least 1, "
                f"got {first_column} and {vocab_size}."
            )
        self.real = max(0, min(columns, vocab_size - first_column))
        check_matrices(student, teacher, grad, max(1, self.real))
        for name, bias in (("student", scaling.student_bias), ("teacher", scaling.teacher_bias)):
            if bias is not None and (bias.shape != (columns,) or not bias.is_contiguous()):
                raise ValueError(
                    f"scaling.{name}_bias must be a contiguous [{columns}] tensor, the part of "
                    f"these columns; got {list(bias.shape)} with strides {bias.stride()}."
                )
        self.student, self.teacher, self.grad, self.scaling = student, teacher, grad, scaling
        if config is None:
            config = row_config(torch.cuda.get_device_capability(student.device), table)
        self.parts, self.piece = pieces(rows, columns, config.block_v)
        self.grid = (rows, self.parts)
        self.options = {
            "HAS_STUDENT_BIAS": scaling.student_bias is not None,
            "HAS_TEACHER_BIAS": scaling.teacher_bias is not None,
            "HAS_SOFTCAP": scaling.softcap > 0,
            "BLOCK_V": config.block_v,
            "num_warps": config.num_warps,
        }

    def new_values(self) -> Tensor:
        """[P, R, 4]."""
        shape = (self.parts, len(self.student), NUM_VALUES.value)
        return self.student.new_empty(shape, dtype=torch.float32)

    def divergence(
        self,
        statistics: Tensor,
        values: Tensor,
        row_scale: Tensor | None,
        beta: float,
        **options: object,
    ) -> None:
        """Run the sweep after the statistics; with a gradient if there is a `row_scale`."""
        _check_rows("statistics", statistics, torch.float32, self.student, NUM_STATISTICS.value)
        if row_scale is not None:
            _check_rows("row_scale", row_scale, torch.float32, self.student)
        if len(self.student) == 0:
            return
        with torch.cuda.device_of(self.student):
            divergence_kernel[self.grid](
                self.student,
                self.teacher,
                _pointer(self.grad, values),
                _pointer(self.scaling.student_bias, values),
                _pointer(self.scaling.teacher_bias, values),
                statistics,
                values,
                _pointer(row_scale, values),
                len(self.student),
                self.student.shape[1],
                self.real,
                self.piece,
                self.student.stride(0),
                self.teacher.stride(0),
                0 if self.grad is None else self.grad.stride(0),
                beta,
                self.scaling.inv_temperature,
                self.scaling.softcap,
                self.scaling.logit_scale,
                WITH_GRAD=row_scale is not None,
                **self.options,
                **options,
            )


def pieces(rows: int, columns: int, block_v: int) -> tuple[int, int]:
    """Into how many pieces a row is cut, and their columns: a multiple of `block_v`."""
    wanted = max(1, min(_PROGRAMS // max(1, rows), columns // _PIECE))
    blocks = triton.cdiv(triton.cdiv(columns, block_v), wanted)
    return triton.cdiv(columns, blocks * block_v), blocks * block_v


def _sum_parts(values: Tensor) -> Tensor:
    return values[0] if len(values) == 1 else values.sum(0)


def _pointer(tensor: Tensor | None, present: Tensor) -> Tensor:
    return present if tensor is None else tensor  # what is absent is never read


def _check_rows(
    name: str, tensor: Tensor, dtype: torch.dtype, student: Tensor, *width: int
) -> None:
    shape = (len(student), *width)
    if (tensor.shape, tensor.dtype) != (shape, dtype) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {list(shape)} tensor of {dtype}, "
            f"got {list(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}."
        )
    if tensor.device != student.device:
        raise ValueError(f"{name} must be on {student.device}, got {tensor.device}.")
