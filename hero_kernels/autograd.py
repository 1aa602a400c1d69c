"""The custom op around the whole chunk loop, its fake and its autograd.

To autograd and to `torch.compile` the loop is one opaque operation. For a scalar loss the gradients
are formed in the forward pass, and the backward pass multiplies them, out of place, by the one
upstream number. For a loss per row (`per_row=True`) the backward pass runs the loop again with the
row weights multiplied by the upstream gradient, so any upstream gradient is right. The sliced
design does so for a scalar loss too, with its sums over the vocabulary kept from the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hero_kernels import checks, rows
from hero_kernels.chunked import Head
from hero_kernels.divergence_loop import Result, RowTensors, run
from hero_kernels.layout import Plan, gradient_dtype
from hero_kernels.options import Design, Objective
from hero_kernels.workspace import SAVED

# Places among the arguments of the op.
_STUDENT = slice(0, 3)
_TEACHER = slice(3, 6)
_ROWS = slice(6, 11)
_ROW_WEIGHTS = 6
_TENSORS = slice(0, 11)
_OBJECTIVE = slice(11, 23)
_PLAN = slice(23, 35)
_NEEDS = slice(27, 30)
_WITH_STATS = 30
_DESIGN = 31
_ACCUMULATE = 34
_PER_ROW = 35
_SAVED = 36


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
    design: str,
    memory_budget: int,
    group: str,
    accumulate_weight_grad: bool,
    per_row: bool,
    saved: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics and gradients; arguments as in `Head`, `RowTensors`, `Objective` and `Plan`.

    Returns:
        loss ([N] if `per_row`, else []), stats [N, 8], the gradients of the student's hidden
        states, weight and bias, of type `gradient_dtype`: empty where not asked for; and what
        the sliced design wants back as `saved`, [N, 16], else empty.
    """
    result = _run(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        row_weights,
        target_ids,
        old_logprobs,
        teacher_ids,
        teacher_logprobs,
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
        impl,
        chunk_size,
        storage,
        max_active_rows,
        need_hidden,
        need_weight,
        need_bias,
        with_stats,
        design,
        memory_budget,
        group,
        accumulate_weight_grad,
        saved=saved,
    )
    empty = [student_hidden.new_empty(0) if grad is None else grad for grad in result.gradients]
    kept = student_hidden.new_empty(0) if result.saved is None else result.saved
    loss = result.losses if per_row else result.losses.sum()
    return loss, result.stats, empty[0], empty[1], empty[2], kept


def _run(*arguments: Any, saved: Tensor | None, weight_grad: Tensor | None = None) -> Result:
    """`divergence_loop.run` from the arguments of the op up to `per_row`."""
    student = Head(*arguments[_STUDENT])
    teacher_hidden, teacher_weight, teacher_bias = arguments[_TEACHER]
    teacher = None
    if teacher_hidden is not None:
        teacher = student._replace(hidden=teacher_hidden)
        if teacher_weight is not None:
            teacher = Head(teacher_hidden, teacher_weight, teacher_bias)
    return run(
        student,
        teacher,
        RowTensors(*arguments[_ROWS]),
        Objective(*arguments[_OBJECTIVE]),
        Plan(*arguments[_PLAN]),
        saved=saved,
        weight_grad=weight_grad,
    )


@linear_divergence.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
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
    is_sliced = args[_DESIGN] == Design.SLICED
    saved = stats.new_empty(num_rows, SAVED) if is_sliced else student_hidden.new_empty(0)
    return loss, stats, hidden, weight, bias, saved


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.is_sliced = inputs[_DESIGN] == Design.SLICED
    ctx.recomputes = inputs[_PER_ROW] or ctx.is_sliced
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[_STUDENT]]
    ctx.settings = inputs[_TENSORS.stop : _SAVED]
    # The parameter itself: hooks on saved tensors (checkpointing, offloading) give back a copy.
    ctx.parameter = inputs[1] if ctx.recomputes and inputs[_ACCUMULATE] else None
    *grads, saved = output[2:]
    ctx.save_for_backward(*((*inputs[_TENSORS], saved) if ctx.recomputes else grads))


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[_STUDENT]
    constants = (None,) * (_SAVED + 1 - _STUDENT.stop)
    if upstream is None:
        return (None, None, None, *constants)
    checks.first_order("fused_linear_divergence")
    grads: Sequence[Tensor | None]
    if ctx.recomputes:
        *tensors, saved = ctx.saved_tensors
        arguments = [*tensors, *ctx.settings]
        arguments[_ROW_WEIGHTS] = arguments[_ROW_WEIGHTS] * upstream
        arguments[_NEEDS] = needed
        arguments[_WITH_STATS] = arguments[_PER_ROW] = False
        saved = saved if ctx.is_sliced else None
        if arguments[_ACCUMULATE] and needed[1]:
            # Outside of the op, which must not write to what it is given.
            into = weight_gradient(ctx.parameter)
            grads = _run(*arguments[: _PLAN.stop], saved=saved, weight_grad=into).gradients
        else:
            grads = linear_divergence(*arguments, saved)[2:5]
    else:
        grads = [grad * upstream for grad in ctx.saved_tensors]
    wanted = (
        grad.to(dtype) if need and grad is not None else None
        for grad, dtype, need in zip(grads, ctx.dtypes, needed, strict=True)
    )
    return (*wanted, *constants)


def weight_gradient(weight: Tensor) -> Tensor:
    """Where `accumulate_weight_grad` adds: `main_grad` if there is one, else `grad`."""
    main: Tensor | None = getattr(weight, "main_grad", None)
    if main is not None:
        return main
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


linear_divergence.register_autograd(_backward, setup_context=_setup_context)
