"""The call orders of TRL: its chunked divergence and `GKDTrainer.generalized_jsd_loss`.

For whole trainers see trl_trainers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hero_kernels.from_logits import divergence_from_logits
from hero_kernels.functional import fused_linear_divergence
from hero_kernels.integrations import constant, named_divergence
from hero_kernels.objective import DivergenceOutput


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
    """The order of arguments of TRL's `ChunkedDivergenceFunction.apply`: hidden states [N, H],
    weights [V, H] and biases [V] of both models, `beta` 0 for KL(teacher | student), 1 for
    KL(student | teacher), between them the JSD.

    Returns:
        Divergence of each token [N], differentiable in the student's tensors, and the student's
        entropy [N], detached.

    Raises:
        ValueError: logit scales or soft caps of the two models differ.
    """
    one_scaling(
        (student_logit_scale, student_final_logit_softcapping),
        (teacher_logit_scale, teacher_final_logit_softcapping),
    )
    output = fused_linear_divergence(
        student_hidden,
        student_weight,
        teacher_hidden.detach(),
        constant(teacher_weight, student_weight),
        student_bias=student_bias,
        teacher_bias=constant(teacher_bias, student_bias),
        temperature=temperature,
        logit_scale=student_logit_scale,
        softcap=student_final_logit_softcapping,
        reduction="none",
        return_stats=True,
        **named_divergence(beta),
    )
    assert isinstance(output, DivergenceOutput)
    return output.loss, output.student_entropy


def one_scaling(student: tuple[float, float | None], teacher: tuple[float, float | None]) -> None:
    """Raise ValueError unless (logit scale, soft cap) is the same for both models."""
    if student != teacher:
        raise ValueError(
            f"logit scale and soft cap must be the same for both models; got {student} for the "
            f"student and {teacher} for the teacher. Fold a scale into the head's weight, or "
            "compute the logits and call divergence_from_logits."
        )


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss`: logits [B, L, V], labels [B, L], -100 for masked tokens.

    `reduction="batchmean"` divides by the number of unmasked tokens (without labels by B); "sum"
    does not; "none" returns the divergence of each token [B, L], where TRL returns that of each
    vocabulary entry. `num_items_in_batch` overrules it: the sum is divided by that.

    Raises:
        ValueError: another reduction: a mean over vocabulary entries is not a divergence.
    """
    if reduction not in ("batchmean", "sum", "none"):
        raise ValueError(f"reduction must be 'batchmean', 'sum' or 'none'; got {reduction!r}.")
    divisor = num_items_in_batch
    if divisor is not None:
        reduction = "batchmean"
    elif labels is None:
        divisor = len(student_logits)
    loss = divergence_from_logits(
        student_logits,
        teacher_logits.detach(),
        temperature=temperature,
        token_weights=None if labels is None else labels != -100,
        reduction="mean" if reduction == "batchmean" else reduction,
        num_items=divisor if reduction == "batchmean" else None,
        **named_divergence(beta),
    )
    assert isinstance(loss, torch.Tensor)
    return loss
