"""The divergence for callers who already hold logits: one pass of the row kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hero_kernels import backends, checks
from hero_kernels.chunked import LogitChunk
from hero_kernels.divergence_loop import RowTensors, divergence_of_chunk, row_losses
from hero_kernels.options import DivergenceOutput, Objective, Reduction
from hero_kernels.rows import STATS
from hero_kernels.aggregation import Weighting


def divergence_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    turn_ids: Tensor | None = None,
    turn_weights: Tensor | None = None,
    trajectory_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    is_clip: float | None = None,
    pointwise_clip: float | None = None,
    support: str = "full",
    top_k: int | None = None,
    top_k_source: str = "student",
    top_k_tail: bool = True,
    reduction: str = "mean",
    loss_aggregation: str = "token",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool = False,
    inplace_gradient: bool = False,
    impl: str = "auto",
) -> Tensor | DivergenceOutput:
    """`fused_linear_divergence` from logits [..., V]; arguments of the same name mean the same.

    Logits in 16 bits have lost much of what distinguishes student and teacher: prefer fp32 logits,
    or `fused_linear_divergence`. Rows of weight 0 are computed but count nothing: they may hold
    anything, NaN included, and get a gradient of exactly 0.

    Args:
        student_logits: [..., V] raw logits of any floating-point type.
        teacher_logits: [..., V] raw logits; no gradient.
        inplace_gradient: write the gradient over `student_logits`, whose values are then lost: no
            second [..., V] tensor is made. Not for leaves or logits that another operation needs
            for its backward pass (autograd raises then).
        return_stats: as there.

    Returns:
        The loss, or a `DivergenceOutput`.

    Raises:
        ValueError: arguments that do not match or cannot be served.
    """
    checks.is_tensor("student_logits", student_logits, "[..., V]")
    checks.is_tensor("teacher_logits", teacher_logits, "[..., V]")
    checks.no_grad_wanted("teacher_logits", teacher_logits, "the teacher")
    checks.same_device("teacher_logits", teacher_logits, student_logits)
    shape = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != shape:
        raise ValueError(
            f"student_logits {list(student_logits.shape)} and teacher_logits "
            f"{list(teacher_logits.shape)} must "
            "have the same leading shape."
        )
    objective = checks.objective(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        is_clip=is_clip,
        pointwise_clip=pointwise_clip,
        vocab_size=checks.vocabulary(
            student_logits.shape[-1], teacher_logits.shape[-1], vocab_size
        ),
        support=support,
        top_k=top_k,
        top_k_source=top_k_source,
        top_k_tail=top_k_tail,
        has_teacher_topk=False,
        has_old_logprobs=old_logprobs is not None,
        has_targets=target_ids is not None,
    )
    weighting = Weighting.checked(
        student_logits,
        token_weights,
        turn_ids,
        turn_weights,
        trajectory_ids,
        loss_aggregation,
        reduction,
        num_items,
        validate=False,
    )
    checks.per_token("target_ids", target_ids, student_logits, integer=True)
    checks.per_token("old_logprobs", old_logprobs, student_logits)
    student, teacher = _matrix(student_logits), _matrix(teacher_logits.detach())
    row_tensors = RowTensors.flat(
        weighting.coefficients(len(student), student), target_ids, old_logprobs, None
    )
    if checks.values_readable(student, validate=False):
        row_tensors.check(objective.vocab_size)
    need_grad = torch.is_grad_enabled() and student_logits.requires_grad
    constants = (teacher, *row_tensors[:3], *objective, impl, return_stats)
    if inplace_gradient and need_grad:
        _check_overwritable(student_logits, student)
        losses, stats = _InPlace.apply(student, *constants)
    else:
        losses, stats, _ = _logits_divergence(student, *constants, need_grad)
    loss = losses.reshape(shape) if weighting.reduction == Reduction.NONE else losses.sum()
    if not return_stats:
        return loss
    return weighting.output(
        loss, stats, row_tensors.weights, shape, target_ids is not None, teacher_known=True
    )


def _matrix(logits: Tensor) -> Tensor:
    """[N, V] with adjacent columns."""
    logits = logits.reshape(-1, logits.shape[-1])
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _check_overwritable(logits: Tensor, matrix: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(
            "inplace_gradient=True would overwrite student_logits, which is a leaf that requires "
            "grad: pass the "
            "output of an operation, or leave inplace_gradient=False."
        )
    base = logits._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace_gradient=True would overwrite student_logits, which is a view of a leaf that "
            "requires grad: pass the output of an operation, or leave inplace_gradient=False."
        )
    if len(matrix) > 1 and matrix.stride(0) < matrix.shape[1]:
        raise ValueError(
            "inplace_gradient=True needs student_logits whose rows lie apart in memory; got shape "
            f"{list(logits.shape)} with strides {logits.stride()}: call .contiguous(), or leave "
            "inplace_gradient=False."
        )
    if matrix.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"inplace_gradient=True needs student_logits that can be viewed as [N, V]; got strides "
            f"{logits.stride()}: call .contiguous(), or leave inplace_gradient=False."
        )


def _fill(
    grad: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    row_weights: Tensor,
    target_ids: Tensor | None,
    old_logprobs: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """Losses [N] and stats [N, 8]; `grad` [N, V] receives the gradient of each row's loss."""
    *objective, impl, with_stats = settings
    target = Objective(*objective)
    impl = backends.resolve(impl, student, target)
    row_tensors = RowTensors(row_weights, target_ids, old_logprobs, None, None)
    chunk = LogitChunk(slice(0, len(student)), student, teacher, None, grad, None, None)
    stats = divergence_of_chunk(chunk, row_tensors, target, impl, False, with_stats)
    stats = stats.masked_fill((row_weights == 0)[:, None], 0.0)
    return row_losses(row_tensors, stats), stats


class _InPlace(torch.autograd.Function):
    """The gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
        grad = student.detach()
        losses, stats = _fill(grad, grad, *constants)
        torch.autograd.graph.increment_version(student)  # row kernels may write by pointer
        ctx.mark_non_differentiable(stats)
        ctx.grad = grad
        ctx.num_constants = len(constants)
        return losses, stats

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_order("divergence_from_logits")
        grad = (ctx.grad * upstream[0][:, None]).to(ctx.grad.dtype)
        return (grad, *(None,) * ctx.num_constants)


@torch.library.custom_op("hero_kernels::logits_divergence", mutates_args=())
def _logits_divergence(
    student: Tensor,
    teacher: Tensor,
    row_weights: Tensor,
    target_ids: Tensor | None,
    old_logprobs: Tensor | None,
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
    with_stats: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], stats [N, 8], gradient of each row's loss [N, V] (empty if not needed)."""
    grad = torch.empty_like(student) if need_grad else None
    losses, stats = _fill(
        grad,
        student,
        teacher,
        row_weights,
        target_ids,
        old_logprobs,
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
        with_stats,
    )
    return losses, stats, student.new_empty(0) if grad is None else grad


@_logits_divergence.register_fake
def _(student: Tensor, *constants: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    losses = student.new_empty(len(student), dtype=wide)
    stats = student.new_empty(len(student), STATS, dtype=wide)
    return losses, stats, torch.empty_like(student) if constants[-1] else student.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])
    ctx.num_constants = len(inputs) - 1


def _backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    checks.first_order("divergence_from_logits")
    (grad,) = ctx.saved_tensors
    return ((grad * upstream[0][:, None]).to(grad.dtype), *(None,) * ctx.num_constants)


_logits_divergence.register_autograd(_backward, setup_context=_setup_context)
