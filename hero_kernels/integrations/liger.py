"""The call order of Liger-Kernel's `LigerFusedLinearJSD`.

What differs from it: values are exact for nearby distributions when both heads are one tensor,
frozen heads cost no GEMM, a second backward pass gives the same gradient, and a teacher with
another vocabulary is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hero_kernels.functional import fused_linear_divergence
from hero_kernels.integrations import constant, named_divergence


def fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean divergence over the tokens [N] that are not ignored, differentiable in the student's two
    tensors: inputs [N, H] and [N, H_t], weights [V, H] and [V, H_t], labels [N] already shifted.

    The student's own weight as `teacher_weight` takes the path for shared heads. `jsd_beta` is the
    weight of the teacher in the mixture; 0 is KL(teacher | student), 1 KL(student | teacher).

    Raises:
        ValueError: `accum_dtype` other than None and float32, in which sums are always kept.
    """
    if accum_dtype not in (None, torch.float32):
        raise ValueError(
            f"accum_dtype is {accum_dtype}; sums over tokens are always kept in float32: pass "
            "None or torch.float32."
        )
    loss = fused_linear_divergence(
        student_input,
        student_weight,
        teacher_input.detach(),
        constant(teacher_weight, student_weight),
        temperature=temperature,
        token_weights=None if shift_labels is None else shift_labels != ignore_index,
        **named_divergence(jsd_beta),
    )
    assert isinstance(loss, torch.Tensor)
    return loss


class FusedLinearJSD(nn.Module):
    """Takes the place of `LigerFusedLinearJSD`."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        named_divergence(jsd_beta)
        self.settings = (jsd_beta, ignore_index, temperature, accum_dtype)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        return fused_linear_jsd(
            student_input, student_weight, teacher_input, teacher_weight, shift_labels,
            *self.settings,
        )  # fmt: skip
