"""The low-memory design: all rows at once, the vocabulary in slices whose logits are recomputed.

    statistics   two GEMMs: the logits of each slice, merged over the slices
    values       two: the same logits again, and the divergence of every row
    gradient     four (three for a frozen head), in the backward pass: the logits once more, dX
                 summed in fp32 over the slices, dW of each slice written once, in its final type,
                 by one product over all rows

Eight GEMMs for forward and backward where the chunk loop has four, four for evaluation. In exchange
nothing of the head's size exists beside dW itself, which appears in the backward pass only: no fp32
sum over chunks, and no copy for an upstream gradient, which multiplies the rows' weights instead.
Statistics and values, 64 bytes a row, are kept from forward to backward.

A value could be had from the statistics pass alone, but only as a difference that loses relative
precision where teacher and student are close; so could the gradients of both KLs in the forward
pass with six GEMMs, at the price of holding dW from there on.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hero_kernels import gemm, phases
from hero_kernels.chunked import Gradients, Head, cleared, delta_operand
from hero_kernels.layout import Plan, buffer, buffer_types, gradient_dtype
from hero_kernels.options import Objective
from hero_kernels.vocab_parallel import (
    Shards,
    finished,
    for_columns,
    phase_arguments,
    row_scales,
    subtract_teacher,
)
from hero_kernels.workspace import slice_width, workspace

if TYPE_CHECKING:
    from hero_kernels.divergence_loop import RowTensors

_OPERAND_ROWS = 1024
"""Rows of h_s - h_t worked on at once, for its temporaries."""


class LogitSlice(NamedTuple):
    """Columns `columns` of the head, C of them, for all N rows."""

    columns: slice
    student: Tensor  # [N, C] raw logits, or raw_s - raw_t for a shared head
    teacher: Tensor  # [N, C] raw logits
    grad: Tensor  # [N, C] to be filled; may be `student` itself
    arguments: dict[str, Any]  # of the phases


def run_slices(
    slices: HeadSlices,
    row_tensors: RowTensors,
    saved: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Gradients, Tensor]:
    """Statistics of every row and the gradients of the sum of weight · ratio · divergence.

    Args:
        slices: of N rows.
        row_tensors: of the same rows; weights times `scale`.
        saved: [N, 16] what an earlier call returned for these rows; None to compute it.
        weight_grad: [V, H] that the head's gradient, divided by `scale`, is added to; None to
            return it as it is.
        scale: [] `power_of_two_scale`, None where it is 1.

    Returns:
        Statistics [N, 8] as of a row kernel, gradients, [N, 16] sums over all columns.
    """
    plan, shards = slices.plan, slices.shards
    if saved is None:
        statistics = shards.merged(_statistics(slices, row_tensors.target_ids), slices.kernels)
        values = shards.total(_values(slices, statistics))
    else:
        statistics = saved[:, : phases.NUM_STATISTICS].contiguous()
        values = saved[:, phases.NUM_STATISTICS :].contiguous()
    stats = finished(statistics, values, row_tensors, slices.objective, plan.with_stats)
    grads = Gradients(None, None, None)
    if plan.need_grad:
        sums = (statistics, values, row_scales(row_tensors.weights, stats))
        grads = _gradients(slices, sums, weight_grad, scale)
    return stats, grads, torch.cat([statistics, values], 1)


class HeadSlices:
    """The logits of student and teacher, slice after slice; each iteration computes them again.

    Args:
        student: N rows, and the head or this rank's shard of it.
        teacher: the same rows; with the student's own weight tensor the head counts as shared.
        active: [N] bool; other rows get no gradient, whatever they hold.
        objective: what to compute.
        plan: how.
        kernels: the three phases.
        compacted: whether the hidden states are copies made for this call.
    """

    def __init__(
        self,
        student: Head,
        teacher: Head,
        active: Tensor,
        objective: Objective,
        plan: Plan,
        kernels: ModuleType,
        compacted: bool,
    ) -> None:
        hidden = student.hidden
        self.student, self.teacher = student, teacher
        self.objective, self.plan, self.kernels = objective, plan, kernels
        self.kind = {"divergence": objective.divergence, "beta": objective.beta}
        self.shards = Shards.named(plan.group)
        self.shared = teacher.weight is student.weight
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.types = buffer_types(hidden.dtype, hidden.device, plan.storage, self.shared)
        place = self.shards.place(len(student.weight), objective.vocab_size)
        self.first_column, self.columns = place
        space = workspace(
            len(hidden),
            max(hidden.shape[1], teacher.hidden.shape[1]),
            dtype=hidden.dtype,
            device=hidden.device,
            storage=plan.storage,
            shared_head=self.shared,
            in_torch=kernels is phases,
            compacted=compacted,
        )
        self.width = slice_width(self.columns, len(hidden), space, plan.memory_budget)
        # Operands in the type that the products take, so that no product converts them again.
        direct = gemm.takes_16_bit(hidden.device, hidden.dtype)
        self.h_s = cleared(hidden, active).to(self.types.gradient)
        self.h_t = teacher.hidden if direct else teacher.hidden.to(self.wide)
        self.operand, self.absolute_rows = self.h_s, None
        if self.shared:
            self.operand, self.absolute_rows = self._difference()

    def __iter__(self) -> Iterator[LogitSlice]:
        num_rows, types = len(self.h_s), self.types
        student_buffer = buffer(self.h_s, num_rows, self.width, types.student)
        teacher_buffer = buffer(self.h_s, num_rows, self.width, self.wide)
        grad_buffer = student_buffer
        if types.gradient != types.student:
            grad_buffer = buffer(self.h_s, num_rows, self.width, types.gradient)
        for start in range(0, max(self.columns, 1), max(self.width, 1)):
            columns = slice(start, min(start + self.width, self.columns))
            used = slice(0, columns.stop - start)
            logits, teacher_logits = student_buffer[:, used], teacher_buffer[:, used]
            self._fill(logits, teacher_logits, columns)
            yield LogitSlice(
                columns, logits, teacher_logits, grad_buffer[:, used], self._arguments(columns)
            )

    def _fill(self, logits: Tensor, teacher_logits: Tensor, columns: slice) -> None:
        if logits.numel() == 0:
            return
        head = self.student.weight[columns]
        if not self.shared:
            gemm.logits_into(self.teacher.weight[columns], (teacher_logits, self.h_t))
            gemm.logits_into(head, (logits, self.operand))
            return
        gemm.logits_into(head, (teacher_logits, self.h_t), (logits, self.operand))
        if self.absolute_rows is not None:
            subtract_teacher(logits, teacher_logits, self.absolute_rows)

    def _arguments(self, columns: slice) -> dict[str, Any]:
        student_bias, teacher_bias = (
            None if side.bias is None else side.bias[columns].to(self.wide)
            for side in (self.student, self.teacher)
        )
        first = self.first_column + columns.start
        return phase_arguments(self.objective, student_bias, teacher_bias, self.shared, first)

    def _difference(self) -> tuple[Tensor, Tensor | None]:
        """`delta_operand` of all rows, part by part: its temporaries are several times its size."""
        h_s, h_t = self.student.hidden, self.teacher.hidden
        operand: Tensor | None = None
        absolute: Tensor | None = None
        for start in range(0, max(len(h_s), 1), _OPERAND_ROWS):
            part = slice(start, start + _OPERAND_ROWS)
            ours, rest = delta_operand(h_s[part], h_t[part], self.types)
            if operand is None:
                dtype = h_s.dtype if self.types.student == h_s.dtype else ours.dtype
                operand = ours.new_empty(h_s.shape, dtype=dtype)
                absolute = None if rest is None else rest.new_empty(len(h_s))
            operand[part] = ours
            if absolute is not None and rest is not None:
                absolute[part] = rest
        assert operand is not None
        return operand, absolute


def _statistics(slices: HeadSlices, target_ids: Tensor | None) -> Tensor:
    """[N, 12] of this rank's columns."""
    joined: Tensor | None = None
    kernels = for_columns(slices.columns, slices.kernels)
    for piece in slices:
        part = kernels.row_statistics(
            piece.student, piece.teacher, target_ids=target_ids, **piece.arguments
        )
        if joined is not None:
            part = slices.kernels.merge_statistics(torch.stack([joined, part]))
        joined = part
    assert joined is not None  # a shard of padding is one empty slice
    return joined


def _values(slices: HeadSlices, statistics: Tensor) -> Tensor:
    """[N, 4] sums over this rank's columns."""
    kernels = for_columns(slices.columns, slices.kernels)
    total = statistics.new_zeros(len(statistics), phases.NUM_VALUES)
    for piece in slices:
        total += kernels.row_values(
            piece.student,
            piece.teacher,
            statistics,
            with_stats=slices.plan.with_stats,
            **slices.kind,
            **piece.arguments,
        )
    return total


def _gradients(
    slices: HeadSlices,
    sums: tuple[Tensor, Tensor, Tensor],
    weight_grad: Tensor | None,
    scale: Tensor | None,
) -> Gradients:
    """The gradient pass; `sums` are statistics, values and row scale."""
    plan = slices.plan
    hidden, weight, bias = slices.student
    d_hidden = d_weight = d_bias = None
    if plan.need_hidden:
        d_hidden = hidden.new_zeros(hidden.shape, dtype=slices.wide)
    if plan.need_weight and weight_grad is None:
        d_weight = weight.new_empty(weight.shape, dtype=gradient_dtype(weight.dtype))
        d_weight[slices.columns if len(hidden) else 0 :] = 0
    if plan.need_bias and bias is not None:
        d_bias = torch.zeros_like(bias, dtype=gradient_dtype(bias.dtype))
    for columns, student, teacher, grad, arguments in slices:
        if grad.numel() == 0:
            continue
        slices.kernels.row_gradient(student, teacher, grad, *sums, **slices.kind, **arguments)
        if d_hidden is not None:
            gemm.add_hidden_gradient(d_hidden, grad, weight[columns])
        if d_weight is not None:
            gemm.weight_gradient_into(d_weight[columns], grad, slices.h_s, accumulate=False)
        elif plan.need_weight and weight_grad is not None:
            _accumulate(weight_grad[columns], grad, slices.h_s, scale)
        if d_bias is not None:
            d_bias[columns] = grad.sum(0, dtype=slices.wide)
    if d_hidden is not None:
        d_hidden = slices.shards.add_up(d_hidden).to(gradient_dtype(hidden.dtype))
    return Gradients(d_hidden, d_weight, d_bias)


def _accumulate(total: Tensor, grad: Tensor, hidden: Tensor, scale: Tensor | None) -> None:
    """total [C, H] += gradᵀ · hidden / scale."""
    # What a product can add to without rounding its sum on the way, and is laid out for it.
    if total.dtype == grad.dtype:
        one_sum = total.is_cuda or total.dtype.itemsize >= 4
    else:
        one_sum = total.dtype == torch.float32 and grad.dtype.itemsize == 2
    if one_sum and total.stride(-1) == 1 and scale is None:
        gemm.weight_gradient_into(total, grad, hidden, accumulate=True)
        return
    product = total.new_empty(total.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
    gemm.weight_gradient_into(product, grad, hidden, accumulate=False)
    total += product if scale is None else product.div_(scale)
