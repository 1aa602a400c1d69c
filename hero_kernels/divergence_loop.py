"""The divergence of every row: the chunk loop with a divergence row kernel, or the slices."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hero_kernels import backends, checks, fused, gemm, rows
from hero_kernels.chunked import (
    Gradients,
    Head,
    LogitChunk,
    active_rows,
    power_of_two_scale,
    run_chunks,
    spread,
)
from hero_kernels.layout import Plan, gradient_dtype
from hero_kernels.options import Design, Objective, Support
from hero_kernels.rows_sparse import sparse_rows
from hero_kernels.sliced import HeadSlices, run_slices
from hero_kernels.vocab_parallel import Shards, divergence_of_shard


class RowTensors(NamedTuple):
    """What a row kernel is told of each of N rows."""

    weights: Tensor  # [N] fp32, or fp64; 0 masks the row
    target_ids: Tensor | None  # [N] int64, -1 for none
    old_logprobs: Tensor | None  # [N] like `weights`
    teacher_ids: Tensor | None  # [N, k] int64; of a teacher given by its top-k
    teacher_logprobs: Tensor | None  # [N, k]

    @classmethod
    def flat(
        cls,
        weights: Tensor,
        target_ids: Tensor | None,
        old_logprobs: Tensor | None,
        teacher_topk: tuple[Tensor, Tensor] | None,
    ) -> RowTensors:
        """From tensors in the leading shape of the hidden states, and `weights` [N].

        Masked rows may hold anything: here it becomes something that no row kernel trips over.
        """
        active = weights != 0
        if target_ids is not None:
            target_ids = target_ids.reshape(-1).long().clamp(min=-1).where(active, -1)
        if old_logprobs is not None:
            old_logprobs = old_logprobs.detach().reshape(-1).to(weights.dtype).where(active, 0.0)
        ids, logprobs = teacher_topk or (None, None)
        if ids is not None and logprobs is not None:
            shape, is_active = (len(weights), ids.shape[-1]), active[:, None]
            ids = ids.reshape(shape).long().where(is_active, 0)
            logprobs = logprobs.detach().reshape(shape).where(is_active, -100.0)
        return cls(weights, target_ids, old_logprobs, ids, logprobs)

    def check(self, vocab_size: int) -> None:
        """Raise ValueError if a row of non-zero weight holds values that cannot be."""
        active = self.weights != 0
        if self.target_ids is not None:
            checks.targets("target_ids", self.target_ids, vocab_size, active)
        if self.old_logprobs is not None:
            checks.finite("old_logprobs", self.old_logprobs[active])
        if self.teacher_ids is not None and self.teacher_logprobs is not None:
            checks.targets("teacher_topk[0]", self.teacher_ids, vocab_size, active)
            checks.finite("teacher_topk[1]", self.teacher_logprobs[active])

    def take(self, index: Tensor | slice) -> RowTensors:
        """The same for some of the rows."""
        return RowTensors(
            self.weights[index],
            *(None if tensor is None else tensor[index] for tensor in self[1:]),
        )


class Result(NamedTuple):
    """What `run` returns for N rows."""

    losses: Tensor  # [N] row weight · importance ratio · divergence
    stats: Tensor  # [N, 8] as the row kernel writes them; 0 for rows of zero weight
    gradients: Gradients
    saved: Tensor | None  # [N, 16] what the sliced design wants back in the backward pass


def run(
    student: Head,
    teacher: Head | None,
    row_tensors: RowTensors,
    objective: Objective,
    plan: Plan,
    *,
    saved: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> Result:
    """The loss of every row, its statistics, and the gradients of the sum of the losses.

    Args:
        student: N rows.
        teacher: the same rows; with the student's weight tensor itself if the head is shared; None
            for a teacher given by its top-k.
        row_tensors: of the same rows.
        objective: what to compute.
        plan: how.
        saved: `Result.saved` of an earlier call for the same rows, whatever their weights were.
        weight_grad: [V, H] that the sliced design adds the head's gradient to.
    """
    num_rows = len(student.hidden)
    student, teacher = _with_rows(student, teacher, plan)
    delta = teacher is not None and teacher.weight is student.weight
    kept, overflow = active_rows(row_tensors.weights, plan.max_active_rows)
    if kept is not None:
        row_tensors = row_tensors.take(kept)
        student = student._replace(hidden=student.hidden[kept])
        teacher = None if teacher is None else teacher._replace(hidden=teacher.hidden[kept])
        saved = None if saved is None else saved[kept]
    active = row_tensors.weights != 0
    # Unclipped importance ratios have no bound; fp16 leaves them a factor of 255.
    slope = max(objective.is_clip, 1.0) * objective.logit_scale / objective.temperature
    scale = power_of_two_scale(row_tensors.weights, student.hidden.dtype, slope)
    scaled = row_tensors._replace(weights=row_tensors.weights * scale)

    is_half = student.hidden.dtype == torch.float16
    with torch.autocast(student.hidden.device.type, enabled=False):
        if plan.design == Design.SLICED:
            assert teacher is not None  # support="full" has a teacher with logits
            kernels = _phases(student, objective, plan)
            slices = HeadSlices(
                student, teacher, active, objective, plan, kernels, compacted=kept is not None
            )
            stats, grads, saved = run_slices(
                slices, scaled, saved, weight_grad, scale if is_half else None
            )
            saved = spread(saved.masked_fill(~active[:, None], 0.0), kept, num_rows)
        else:
            stats, grads = _run_chunks(student, teacher, active, scaled, objective, plan, delta)
    stats = stats.masked_fill(~active[:, None], 0.0)
    losses = row_losses(row_tensors, stats)
    if overflow is not None:
        losses = losses.masked_fill(overflow, torch.nan)
    if is_half:
        grads = grads.unscaled(scale)
    if grads.hidden is not None:
        grads = grads._replace(hidden=spread(grads.hidden, kept, num_rows))
    return Result(spread(losses, kept, num_rows), spread(stats, kept, num_rows), grads, saved)


def _with_rows(student: Head, teacher: Head | None, plan: Plan) -> tuple[Head, Head | None]:
    """Heads with adjacent columns where the kernels need them, copied once for all chunks; a shared
    head stays shared."""
    weight = student.weight
    own_products = weight.device.type == "cpu" and gemm.takes_16_bit(weight.device, weight.dtype)
    if not own_products and plan.design != Design.FUSED:
        return student, teacher
    shared = teacher is not None and teacher.weight is weight
    student = student._replace(weight=gemm.rows_of(weight))
    if teacher is not None:
        weight = student.weight if shared else gemm.rows_of(teacher.weight)
        teacher = teacher._replace(weight=weight)
    return student, teacher


def _run_chunks(
    student: Head,
    teacher: Head | None,
    active: Tensor,
    row_tensors: RowTensors,
    objective: Objective,
    plan: Plan,
    delta: bool,
) -> tuple[Tensor, Gradients]:
    """The chunk loop over whole rows, or over this rank's columns of them."""
    vocab_size = objective.vocab_size
    if plan.design == Design.FUSED:

        def fused_rows(chunk: LogitChunk) -> Tensor:
            part = row_tensors.take(chunk.rows)
            return fused.divergence_from_statistics(chunk, part, objective, delta, plan.with_stats)

        def logit_kernel(chunk: LogitChunk, student: Head, teacher: Head) -> Tensor:
            assert chunk.teacher is not None
            ids = row_tensors.target_ids
            ids = None if ids is None else ids[chunk.rows]
            return fused.logits_into(student, teacher, chunk.student, chunk.teacher, objective, ids)

        return run_chunks(
            student, teacher, active, vocab_size, fused_rows, plan, logit_kernel=logit_kernel
        )
    if not plan.group:
        impl = backends.resolve(plan.impl, student.hidden, objective)

        def row_kernel(chunk: LogitChunk) -> Tensor:
            part = row_tensors.take(chunk.rows)
            return divergence_of_chunk(chunk, part, objective, impl, delta, plan.with_stats)

        return run_chunks(student, teacher, active, objective.vocab_size, row_kernel, plan)
    kernels, shards = _phases(student, objective, plan), Shards.named(plan.group)
    first_column, columns = shards.place(len(student.weight), objective.vocab_size)

    def shard_kernel(chunk: LogitChunk) -> Tensor:
        part = row_tensors.take(chunk.rows)
        return divergence_of_shard(
            chunk, part, objective, kernels, shards, first_column, delta, plan.with_stats
        )

    stats, grads = run_chunks(student, teacher, active, columns, shard_kernel, plan)
    if grads.hidden is not None:
        d_hidden = shards.add_up(grads.hidden).to(gradient_dtype(student.hidden.dtype))
        grads = grads._replace(hidden=d_hidden)
    return stats, grads


def _phases(student: Head, objective: Objective, plan: Plan) -> ModuleType:
    return backends.phases_of(plan.impl, backends.request_of(student.hidden, objective))


def row_losses(row_tensors: RowTensors, stats: Tensor) -> Tensor:
    """[N] weight · importance ratio · divergence, from stats [N, 8]."""
    return row_tensors.weights * stats[:, rows.RATIO] * stats[:, rows.LOSS]


def divergence_of_chunk(
    chunk: LogitChunk,
    row_tensors: RowTensors,
    objective: Objective,
    impl: str,
    delta: bool,
    with_stats: bool,
) -> Tensor:
    """Call the row kernel that `objective` and `impl` ask for.

    Args:
        chunk: R rows of logits.
        row_tensors: of the same rows.
        objective: what to compute.
        impl: key of `backends.IMPLEMENTATIONS`.
        delta: whether the student's logits are a difference.
        with_stats: compute entropies and agreement.

    Returns:
        [R, 8] statistics; `chunk.grad` is filled.
    """
    common: dict[str, Any] = {
        "delta": delta,
        "inv_temperature": 1.0 / objective.temperature,
        "softcap": objective.softcap,
        "logit_scale": objective.logit_scale,
        "student_bias": chunk.student_bias,
        "teacher_bias": chunk.teacher_bias,
        "target_ids": row_tensors.target_ids,
        "row_weights": row_tensors.weights,
        "old_logprobs": row_tensors.old_logprobs,
        "is_clip": objective.is_clip,
        "vocab_size": objective.vocab_size,
        "with_stats": with_stats,
        "absolute_rows": chunk.absolute_rows,
    }
    if objective.support != Support.FULL:
        server = None
        if row_tensors.teacher_ids is not None and row_tensors.teacher_logprobs is not None:
            server = (row_tensors.teacher_ids, row_tensors.teacher_logprobs)
        return sparse_rows(
            chunk.student,
            chunk.teacher,
            chunk.grad,
            objective=objective,
            teacher_topk=server,
            **common,
        )
    if objective.pointwise_clip:
        common["pointwise_clip"] = objective.pointwise_clip
    return backends.row_kernel(impl)(
        chunk.student,
        chunk.teacher,
        chunk.grad,
        divergence=objective.divergence,
        beta=objective.beta,
        **common,
    )
