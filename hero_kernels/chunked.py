"""The chunk loop: library GEMMs around one row kernel, on any device.

For each chunk of rows: teacher logits, student logits (or, for a shared head, delta = (h_s -
h_t)·Wᵀ), the row kernel, which overwrites the student's chunk by the gradient, then the products
with the head and the hidden states. Two chunks of logits exist at any time, and in 16 bits the
gradient of as many chunks as share a product for dW (`layout`). Rows of zero weight are dropped
first.

Four GEMMs for a trainable head, three for a frozen one, two for evaluation; one less without a
teacher's head.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels import gemm
from hero_kernels.layout import BufferTypes, Plan, buffer, gradient_dtype, layout
from hero_kernels.rows import STATS


class Head(NamedTuple):
    """Hidden states and the head that turns them into logits."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


LogitKernel = Callable[["LogitChunk", Head, Head], Tensor]
"""Fills a chunk's logits from student and teacher of the same rows; returns statistics [R, 12]."""


class Gradients(NamedTuple):
    """With respect to the student's tensors, of type `gradient_dtype`; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def unscaled(self, scale: Tensor) -> Gradients:
        """Divided by `scale` []."""
        return Gradients(*(None if grad is None else grad.div_(scale) for grad in self))


class LogitChunk(NamedTuple):
    """What a row kernel is given: rows `rows` of the call, R of them. V may exceed the vocabulary:
    what is beyond is padding."""

    rows: slice
    student: Tensor  # [R, V] raw logits, or raw_s - raw_t for a shared head
    teacher: Tensor | None  # [R, V] raw logits
    absolute_rows: Tensor | None  # [R] bool: where `student` holds raw_s for a shared head too
    grad: Tensor | None  # [R, V] to be filled; may be `student` itself
    student_bias: Tensor | None  # [V] fp32
    teacher_bias: Tensor | None  # [V] fp32
    statistics: Tensor | None = None  # [R, 12] of the fused design, see phases.py


def active_rows(row_weights: Tensor, bound: int) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the rows to compute (None for all), and whether there are more than `bound` (None
    if known).

    On CUDA the number of active rows is not known to the host: there a bound gives the size of the
    result, and the count is compared on the device.

    Args:
        row_weights: [N]; 0 masks a row.
        bound: 0 for none.

    Raises:
        ValueError: more rows are active than `bound`, on CPU.
    """
    active = row_weights != 0
    if not row_weights.is_cuda:
        kept = active.nonzero()[:, 0]
        if bound and len(kept) > bound:
            raise ValueError(
                f"{len(kept)} rows have a non-zero weight, more than max_active_rows={bound}: "
                "raise the bound "
                "or leave it None."
            )
        return (None if len(kept) == len(active) else kept), None
    if not bound or bound >= len(active):
        return None, None
    first = torch.argsort(active, descending=True, stable=True)[:bound]
    return first.sort().values, active.sum() > bound


def spread(values: Tensor, kept: Tensor | None, num_rows: int) -> Tensor:
    """[num_rows, ...] with `values` at the rows `kept` and 0 elsewhere."""
    if kept is None:
        return values
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, kept, values)


def run_chunks(
    student: Head,
    teacher: Head | None,
    active: Tensor,
    vocab_size: int,
    row_kernel: Callable[[LogitChunk], Tensor],
    plan: Plan,
    num_stats: int = STATS,
    logit_kernel: LogitKernel | None = None,
) -> tuple[Tensor, Gradients]:
    """Statistics of every row and the gradients of what the row kernel differentiates.

    Args:
        student: N rows.
        teacher: the same rows; with the student's own weight tensor the head counts as shared.
        active: [N] bool; other rows are computed from zeros, whatever they hold.
        vocab_size: columns that are real.
        row_kernel: fills `LogitChunk.grad` and returns statistics [R, num_stats].
        plan: how.
        num_stats: columns of the statistics.
        logit_kernel: of the fused design; None for products of the library.

    Returns:
        Statistics [N, num_stats] and gradients; of a shard of the vocabulary (`plan.group`) that of
        the hidden states is one summand, in fp32 (fp64).
    """
    hidden, weight = student.hidden, student.weight
    head = weight[:vocab_size]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shared = teacher is not None and teacher.weight is weight
    sizes, types, groups, held, sum_type, in_place = layout(
        len(hidden), hidden.shape[1], hidden.dtype, hidden.device, shared, plan
    )
    longest = max(sizes, default=0)
    # Kernels on CUDA want rows of multiples of 16 columns for wide loads and stores. What is beyond
    # the vocabulary is padding to them; a shard's next columns are another rank's.
    pads = hidden.is_cuda and not plan.group
    width = -(-vocab_size // 16) * 16 if pads or logit_kernel is not None else vocab_size
    teacher_logits = None if teacher is None else buffer(hidden, longest, width, wide)
    # The gradient takes the student's place, chunk by chunk; or it is held for several chunks; or
    # both: then logits of 16 bits stand in the buffer of the held gradient.
    grads = buffer(hidden, held, width, types.gradient) if held else None
    if in_place and grads is not None:
        logits = grads.view(types.student)
    else:
        logits = buffer(hidden, longest, width, types.student)
        grads = logits if in_place and plan.need_grad else grads
    narrow = gradient_dtype(hidden.dtype)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=wide if plan.group else narrow)
    d_weight = weight.new_empty(weight.shape if plan.need_weight else 0, dtype=sum_type)
    d_weight[vocab_size if sizes else 0 :] = 0
    d_bias = weight.new_zeros(len(weight), dtype=wide)
    stats = hidden.new_empty(hidden.shape[0], num_stats, dtype=wide)
    student_bias, teacher_bias = (
        None if side is None or side.bias is None else _padded(side.bias[:vocab_size], width, wide)
        for side in (student, teacher)
    )

    start = 0
    chunks = iter(sizes)
    for group in groups:
        first = start
        for size in islice(chunks, group):
            rows = slice(start, start + size)
            place = slice(start - first, start - first + size)  # in what is held
            chunk = LogitChunk(
                rows,
                logits[place if in_place and held else slice(0, size)],
                None if teacher_logits is None else teacher_logits[:size],
                None,
                None if grads is None else grads[place],
                student_bias,
                teacher_bias,
            )
            h_s = cleared(hidden[rows], active[rows])
            h_t = None if teacher is None else cleared(teacher.hidden[rows], active[rows])
            grad = None if chunk.grad is None else chunk.grad[:, :vocab_size]
            chunk = _with_logits(chunk, student, teacher, h_s, h_t, head, types, logit_kernel)
            stats[rows] = row_kernel(chunk)
            if grad is not None and plan.need_hidden:
                if plan.group:  # one summand of many: not rounded
                    gemm.add_hidden_gradient(d_hidden[rows], grad, head)
                else:
                    d_hidden[rows] = gemm.hidden_gradient(grad, head)
            if grad is not None and plan.need_bias:
                d_bias[:vocab_size] += grad.sum(0, dtype=wide)
            start += size
        if grads is not None and plan.need_weight:
            rows = slice(first, start)
            gemm.weight_gradient_into(
                d_weight[:vocab_size],
                grads[: start - first, :vocab_size],
                cleared(hidden[rows], active[rows]),
                accumulate=first > 0,
            )
    return stats, Gradients(
        d_hidden if plan.need_hidden else None,
        d_weight.to(gradient_dtype(weight.dtype)) if plan.need_weight else None,
        d_bias.to(gradient_dtype(student.bias.dtype))
        if plan.need_bias and student.bias is not None
        else None,
    )


def _with_logits(
    chunk: LogitChunk,
    student: Head,
    teacher: Head | None,
    h_s: Tensor,
    h_t: Tensor | None,
    head: Tensor,
    types: BufferTypes,
    logit_kernel: LogitKernel | None,
) -> LogitChunk:
    """The chunk with its logits computed."""
    student_logits = chunk.student[:, : len(head)]
    if teacher is None or h_t is None or chunk.teacher is None:
        gemm.logits_into(head, (student_logits, h_s))
        return chunk
    teacher_logits = chunk.teacher[:, : len(head)]
    shared = teacher.weight is student.weight
    teacher_head = head if shared else teacher.weight[: len(head)]
    if logit_kernel is not None:
        sides = (
            Head(h, weight, None if bias is None else bias[: len(head)])
            for h, weight, bias in (
                (h_s, head, chunk.student_bias),
                (h_t, teacher_head, chunk.teacher_bias),
            )
        )
        real = chunk._replace(student=student_logits, teacher=teacher_logits)
        return chunk._replace(statistics=logit_kernel(real, *sides))
    if shared:
        absolute = _delta_into(student_logits, teacher_logits, h_s, h_t, head, types)
        return chunk._replace(absolute_rows=absolute)
    gemm.logits_into(teacher_head, (teacher_logits, h_t))
    gemm.logits_into(head, (student_logits, h_s))
    return chunk


def _padded(bias: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.pad(bias.to(dtype), (0, width - len(bias)))


def power_of_two_scale(row_scales: Tensor, dtype: torch.dtype, slope: float = 1.0) -> Tensor:
    """[] factor for the rows of an fp16 gradient tile, so that small probabilities do not vanish;
    else 1.

    Args:
        row_scales: [N, ...] what the rows of the tile are multiplied by.
        dtype: of the hidden states.
        slope: bound of what else multiplies the tile.
    """
    one = row_scales.new_ones(())
    if dtype != torch.float16 or row_scales.numel() == 0:
        return one
    peak = row_scales.abs().max() * max(slope, 1.0)
    factor = torch.exp2(8.0 - torch.ceil(torch.log2(peak)))
    return torch.where(torch.isfinite(factor), factor, one)


def _delta_into(
    delta: Tensor, teacher: Tensor, h_s: Tensor, h_t: Tensor, head: Tensor, types: BufferTypes
) -> Tensor | None:
    """delta [R, V] = (h_s - h_t)·headᵀ and teacher [R, V] = h_t·headᵀ, for a shared head.

    Returns:
        [R] bool: rows in which `delta` holds the student's logits after all; None for no row.
    """
    operand, absolute = delta_operand(h_s, h_t, types)
    gemm.logits_into(head, (teacher, h_t), (delta, operand))
    return absolute


def delta_operand(h_s: Tensor, h_t: Tensor, types: BufferTypes) -> tuple[Tensor, Tensor | None]:
    """What the head is multiplied by for a delta of type `types.student`: as `difference_operand`,
    or the difference in fp32 (fp64) where the product takes it.
    """
    if types.student == types.gradient:  # one rounding at most, to what the GEMM takes
        wide = torch.promote_types(h_s.dtype, torch.float32)
        return h_s.to(wide) - h_t.to(wide), None
    return difference_operand(h_s, h_t)


def difference_operand(h_s: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor]:
    """What to multiply by the head, in 16 bits, to get delta [R, V] without the error of rounding
    h_s - h_t.

    The difference of nearby 16-bit numbers is itself a 16-bit number, so there it is taken. Where
    it is not, h_s and h_t lie so far apart that the fp32 logits of both can be subtracted.

    Returns:
        The operand [R, H], h_s - h_t or h_s; and [R] bool, whether it is h_s.
    """
    exact = h_s.float() - h_t.float()
    rounded = exact.to(h_s.dtype)
    error = (exact - rounded.float()).norm(dim=1)
    absolute = error > 2.0**-12 * exact.norm(dim=1)
    return torch.where(absolute[:, None], h_s, rounded), absolute


def cleared(hidden: Tensor, active: Tensor) -> Tensor:
    """Masked rows as zeros: 0·NaN would spoil the sums. On CPU they are gone already."""
    return hidden.masked_fill(~active[:, None], 0) if hidden.is_cuda else hidden
