"""The call order of Liger-Kernel's `LigerFusedLinearJSD`.

What differs from it: per-token values are exact for nearby distributions when both heads are one
tensor, frozen heads cost no GEMM, a second backward pass gives the same gradient, and a teacher
with another vocabulary is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hero_kernels.functional import fused_linear_divergence
from hero_kernels.integrations import named_divergence


def fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """Mean divergence over the tokens that are not ignored.

    Args:
        student_input: [N, H].
        student_weight: [V, H].
        teacher_input: [N, H_t].
        teacher_weight: [V, H_t]; the student's own tensor takes the path for shared heads.
        shift_labels: [N], already shifted; tokens equal to `ignore_index` are masked.
        jsd_beta: weight of the teacher in the mixture; 0 is KL(teacher | student), 1 KL(student |
            teacher).
        ignore_index: label of masked tokens.
        temperature: divides the logits.

    Returns:
        [] the loss, differentiable in the student's two tensors.
    """
    loss = fused_linear_divergence(
        student_input,
        student_weight,
        teacher_input.detach(),
        student_weight if teacher_weight is student_weight else teacher_weight.detach(),
        temperature=temperature,
        token_weights=None if shift_labels is None else shift_labels != ignore_index,
        **named_divergence(jsd_beta),  # type: ignore[arg-type]
    )
    assert isinstance(loss, torch.Tensor)
    return loss


class FusedLinearJSD(nn.Module):
    """Takes the place of `LigerFusedLinearJSD`."""

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0
    ) -> None:
        super().__init__()
        named_divergence(jsd_beta)
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        return fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            self.jsd_beta,
            self.ignore_index,
            self.temperature,
        )
