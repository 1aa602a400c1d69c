"""The call orders of TRL: its chunked divergence and `GKDTrainer.generalized_jsd_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from hero_kernels.from_logits import divergence_from_logits
from hero_kernels.functional import fused_linear_divergence
from hero_kernels.integrations import named_divergence
from hero_kernels.options import DivergenceOutput

_IGNORED_LABEL = -100


def chunked_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    beta: float,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_final_logit_softcapping: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The order of arguments of TRL's `ChunkedDivergenceFunction.apply`.

    Args:
        student_hidden: [N, H].
        student_weight: [V, H].
        student_bias: [V] or None.
        teacher_hidden: [N, H_t].
        teacher_weight: [V, H_t]; the student's own tensor takes the path for shared heads.
        teacher_bias: [V] or None.
        beta: 0 is KL(teacher | student), 1 KL(student | teacher), between them the JSD.
        temperature: divides the logits.
        student_logit_scale: multiplies both models' logits.
        student_final_logit_softcapping: of both models.
        teacher_logit_scale: must equal the student's.
        teacher_final_logit_softcapping: must equal the student's.

    Returns:
        Divergence of each token [N], differentiable in the student's tensors, and the student's
        entropy [N], detached.

    Raises:
        ValueError: scales or soft caps of the two models differ.
    """
    student_scaling = (student_logit_scale, student_final_logit_softcapping)
    teacher_scaling = (teacher_logit_scale, teacher_final_logit_softcapping)
    if student_scaling != teacher_scaling:
        raise ValueError(
            f"logit scale and soft cap must be the same for both models; got {student_scaling} for "
            "the student "
            f"and {teacher_scaling} for the teacher. Fold a scale into the head's weight, or "
            "compute the "
            "logits and call divergence_from_logits."
        )
    shared = teacher_weight is student_weight and teacher_bias is student_bias
    output = fused_linear_divergence(
        student_hidden,
        student_weight,
        teacher_hidden.detach(),
        student_weight if shared else teacher_weight.detach(),
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        temperature=temperature,
        logit_scale=student_logit_scale,
        softcap=student_final_logit_softcapping,
        reduction="none",
        return_stats=True,
        **named_divergence(beta),  # type: ignore[arg-type]
    )
    assert isinstance(output, DivergenceOutput)
    return output.loss, output.student_entropy


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss`.

    Args:
        student_logits: [B, L, V].
        teacher_logits: [B, L, V].
        labels: [B, L]; tokens labelled -100 are masked.
        beta: 0 is KL(teacher | student), 1 KL(student | teacher), between them the JSD.
        temperature: divides the logits.
        reduction: "batchmean" divides by the number of unmasked tokens (without labels by B), "sum"
            does not.

    Returns:
        [] the loss.

    Raises:
        ValueError: another reduction: a mean over vocabulary entries is no divergence.
    """
    if reduction not in ("batchmean", "sum"):
        raise ValueError(f"reduction must be 'batchmean' or 'sum'; got {reduction!r}.")
    loss = divergence_from_logits(
        student_logits,
        teacher_logits.detach(),
        temperature=temperature,
        token_weights=None if labels is None else labels != _IGNORED_LABEL,
        reduction="mean" if reduction == "batchmean" else "sum",
        num_items=len(student_logits) if labels is None else None,
        **named_divergence(beta),  # type: ignore[arg-type]
    )
    assert isinstance(loss, torch.Tensor)
    return loss
