"""The divergence for callers who already hold logits: one call of the row kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Unpack

from hero_kernels import backends, checks, gradients
from hero_kernels import constants as c
from hero_kernels.aggregation import Weighting
from hero_kernels.autograd import first_order
from hero_kernels.call import Call, decoded_call, decoded_objective, encoded, numbers_of
from hero_kernels.functional import weighted_rows
from hero_kernels.objective import DivergenceOutput, ObjectiveKwargs
from hero_kernels.types import GRADIENT_DTYPE, RowTensors, Tile


def divergence_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    token_weights: Tensor | None = None,
    turn_ids: Tensor | None = None,
    turn_weights: Tensor | None = None,
    trajectory_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    reduction: str = "mean",
    loss_aggregation: str = "token",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool = False,
    impl: str = "auto",
    **objective: Unpack[ObjectiveKwargs],
) -> Tensor | DivergenceOutput:
    """`fused_linear_divergence` from logits [..., V]; arguments of the same name mean the same.

    Logits in 16 bits have lost much of what distinguishes student and teacher: prefer fp32 logits,
    or `fused_linear_divergence`. Rows of weight 0 are computed but count nothing: they may hold
    anything, NaN included, and get a gradient of exactly 0.

    Args:
        student_logits: [..., V] raw logits; fp64, fp32, bf16 or fp16.
        teacher_logits: [..., V] raw logits; no gradient.
        return_stats: as there.

    Returns:
        The loss, or a `DivergenceOutput`.

    Raises:
        ValueError: arguments that do not match or cannot be served.
        TypeError: something that is not a tensor where one is needed, an unknown keyword.
    """
    what, temperatures = checks.objective("divergence_from_logits", objective)
    _check_logits(student_logits, teacher_logits)
    vocab = checks.vocabulary(student_logits.shape[-1], teacher_logits.shape[-1], vocab_size)
    checks.objective_with(what, vocab, target_ids, old_logprobs)
    weighting, rows = weighted_rows(
        ("student_logits", student_logits),
        Weighting(
            token_weights, turn_ids, turn_weights, trajectory_ids, loss_aggregation, reduction,
            num_items,
        ),
        RowTensors(student_logits, target_ids, old_logprobs, temperatures),
        vocab,
        validate=False,
    )  # fmt: skip
    student, teacher = _matrix(student_logits), _matrix(teacher_logits.detach())
    need_grad = torch.is_grad_enabled() and student_logits.requires_grad
    name = backends.chosen(
        impl, str(student.device), student.dtype, str(what.divergence), str(what.support)
    )
    call = Call(name, 0, 0, vocab, need_hidden=need_grad, with_stats=return_stats)
    losses, stats, _ = _logits_divergence(
        student, teacher, *rows[:4], numbers_of(what), encoded(what, call.text)
    )
    shape = student_logits.shape[:-1]
    loss = losses.reshape(shape) if reduction == "none" else losses.sum()
    if not return_stats:
        return loss
    return weighting.output(
        loss, stats, rows.weights, shape, target_ids is not None, teacher_known=True
    )


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    checks.is_tensor("student_logits", student, "[..., V]")
    checks.is_tensor("teacher_logits", teacher, "[..., V]")
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        gradients.no_tangent({"student_logits": student})
    checks.no_grad_wanted("teacher_logits", teacher, "the teacher")
    checks.same_device("teacher_logits", teacher, "student_logits", student)
    if teacher.shape[:-1] != student.shape[:-1] or not student.dim() or not student.shape[-1]:
        raise ValueError(
            f"student_logits {list(student.shape)} and teacher_logits {list(teacher.shape)} must "
            "have the same leading shape, and V must not be 0."
        )
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dtype not in checks.DTYPES:
            raise ValueError(
                f"{name} is {logits.dtype}; expected float32, bfloat16, float16 or float64."
            )
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        raise ValueError(
            f"student_logits is {student.dtype} and teacher_logits {teacher.dtype}: float64 goes "
            "with float64 only. Cast one of them."
        )


def _matrix(logits: Tensor) -> Tensor:
    """[N, V] with adjacent columns."""
    logits = logits.reshape(-1, logits.shape[-1])
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@torch.library.custom_op("hero_kernels::logits_divergence", mutates_args=())
def _logits_divergence(
    student: Tensor,
    teacher: Tensor,
    row_weights: Tensor,
    target_ids: Tensor | None,
    old_logprobs: Tensor | None,
    temperatures: Tensor | None,
    numbers: Sequence[float],
    call: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], stats [N, 8], gradient of each row's loss [N, V] (empty if not needed)."""
    how = decoded_call(call)
    what = decoded_objective(call, *numbers)
    rows = RowTensors(row_weights, target_ids, old_logprobs, temperatures)
    grad = None
    if how.need_hidden:
        grad = torch.empty_like(student, dtype=GRADIENT_DTYPE[student.dtype])
    width = min(student.shape[1], teacher.shape[1])  # padded to different lengths
    tile = Tile(student[:, :width], teacher[:, :width], num_real=how.vocab_size)
    if grad is not None:
        grad[:, width:] = 0
        tile = tile._replace(grad=grad[:, :width])
    stats = backends.row_kernels(how.impl).divergence_rows(tile, rows, what, how.with_stats)
    stats = stats.masked_fill((row_weights == 0)[:, None], 0.0)
    losses = row_weights * stats[:, c.RATIO] * stats[:, c.DIVERGENCE]
    return losses, stats, student.new_empty(0) if grad is None else grad


@_logits_divergence.register_fake
def _(student: Tensor, *constants: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    losses = student.new_empty(len(student), dtype=wide)
    stats = student.new_empty(len(student), c.NUM_STATS, dtype=wide)
    if not decoded_call(constants[-1]).need_hidden:
        return losses, stats, student.new_empty(0)
    return losses, stats, torch.empty_like(student, dtype=GRADIENT_DTYPE[student.dtype])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], inputs[2])
    ctx.dtype, ctx.num_constants = inputs[0].dtype, len(inputs) - 1


def _backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    first_order("divergence_from_logits")
    grad, row_weights = ctx.saved_tensors
    # A masked row stays masked, whatever gradient arrives for it.
    of_rows = upstream[0].where(row_weights != 0, 0.0)[:, None]
    return ((grad * of_rows).to(ctx.dtype), *(None,) * ctx.num_constants)


_logits_divergence.register_autograd(_backward, setup_context=_setup_context)
