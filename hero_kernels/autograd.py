"""The custom op around the whole chunk loop, its fake and its autograd.

To autograd and to `torch.compile` the loop is one opaque operation. For a scalar loss the gradients
are formed in the forward pass, and the backward pass multiplies them, out of place, by the one
upstream number. For a loss per row (`per_row=True`) the backward pass runs the loop again with the
row weights multiplied by the upstream gradient, so any upstream gradient is right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hero_kernels import rows
from hero_kernels.chunked import Head, Plan, gradient_dtype
from hero_kernels.divergence_loop import RowTensors, run
from hero_kernels.options import Objective

# Places among the arguments of the op.
_STUDENT = slice(0, 3)
_ROW_WEIGHTS = 6
_TENSORS = slice(0, 11)
_NEEDS = slice(27, 30)
_WITH_STATS = 30
_PER_ROW = 31


@torch.library.custom_op("hero_kernels::linear_divergence", mutates_args=())
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_weights: Tensor,
    target_ids: Tensor | None,
    old_logprobs: Tensor | None,
    teacher_ids: Tensor | None,
    teacher_logprobs: Tensor | None,
    divergence: int,
    beta: float,
    temperature: float,
    softcap: float,
    logit_scale: float,
    is_clip: float,
    pointwise_clip: float,
    vocab_size: int,
    support: str,
    top_k: int,
    top_k_source: str,
    top_k_tail: bool,
    impl: str,
    chunk_size: int,
    storage: str,
    max_active_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    with_stats: bool,
    per_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics and gradients; arguments as in `Head`, `RowTensors`, `Objective` and `Plan`.

    Returns:
        loss ([N] if `per_row`, else []), stats [N, 8], and the gradients of the student's hidden
        states, weight and bias, of type `gradient_dtype`: empty where not asked for.
    """
    student = Head(student_hidden, student_weight, student_bias)
    teacher = None
    if teacher_hidden is not None:
        teacher = student._replace(hidden=teacher_hidden)
        if teacher_weight is not None:
            teacher = Head(teacher_hidden, teacher_weight, teacher_bias)
    losses, stats, grads = run(
        student,
        teacher,
        RowTensors(row_weights, target_ids, old_logprobs, teacher_ids, teacher_logprobs),
        Objective(
            divergence,
            beta,
            temperature,
            softcap,
            logit_scale,
            is_clip,
            pointwise_clip,
            vocab_size,
            support,
            top_k,
            top_k_source,
            top_k_tail,
        ),
        Plan(
            impl,
            chunk_size,
            storage,
            max_active_rows,
            need_hidden,
            need_weight,
            need_bias,
            with_stats,
        ),
    )
    empty = [student_hidden.new_empty(0) if grad is None else grad for grad in grads]
    return losses if per_row else losses.sum(), stats, empty[0], empty[1], empty[2]


@linear_divergence.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student_hidden, row_weights = args[0], args[_ROW_WEIGHTS]
    num_rows = student_hidden.shape[0]
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    loss = row_weights.new_empty(num_rows if args[_PER_ROW] else ())
    stats = student_hidden.new_empty(num_rows, rows.STATS, dtype=wide)
    hidden, weight, bias = (
        tensor.new_empty(tensor.shape, dtype=gradient_dtype(tensor.dtype))
        if needed
        else student_hidden.new_empty(0)
        for tensor, needed in zip(args[_STUDENT], args[_NEEDS], strict=True)
    )
    return loss, stats, hidden, weight, bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.per_row = inputs[_PER_ROW]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[_STUDENT]]
    ctx.settings = inputs[_TENSORS.stop :]
    ctx.save_for_backward(*(inputs[_TENSORS] if ctx.per_row else output[2:]))


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[_STUDENT]
    constants = (None,) * (_TENSORS.stop - _STUDENT.stop + len(ctx.settings))
    if upstream is None:
        return (None, None, None, *constants)
    if ctx.per_row:
        arguments = [*ctx.saved_tensors, *ctx.settings]
        arguments[_ROW_WEIGHTS] = arguments[_ROW_WEIGHTS] * upstream
        arguments[_NEEDS] = needed
        arguments[_WITH_STATS] = arguments[_PER_ROW] = False
        grads = linear_divergence(*arguments)[2:]
    else:
        grads = [grad * upstream for grad in ctx.saved_tensors]
    wanted = (
        grad.to(dtype) if need else None
        for grad, dtype, need in zip(grads, ctx.dtypes, needed, strict=True)
    )
    return (*wanted, *constants)


linear_divergence.register_autograd(_backward, setup_context=_setup_context)
