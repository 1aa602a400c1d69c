"""From stored logits of some columns to z = cap((raw + bias) · logit_scale) / temperature.

Unlike `rows.log_probs`, which sees whole rows, it leaves normalising to its callers and gives a
logit of -inf a finite stand-in, so that a piece of the vocabulary may be masked as a whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels.rows import capped_gap, sech2

MASKED = -1e30
"""A logit of -inf: finite, so that the difference of two is 0."""


class Scaling(NamedTuple):
    """From raw logits to z = cap((raw + bias) · logit_scale) · inv_temperature."""

    inv_temperature: float
    softcap: float
    """0 for none."""
    logit_scale: float
    student_bias: Tensor | None  # [C] fp32, of the columns at hand
    teacher_bias: Tensor | None  # [C]; the student's if the head is shared


class ScaledLogits(NamedTuple):
    """Of a block of rows and C columns."""

    teacher: Tensor  # [R, C] z_t
    student: Tensor  # [R, C] z_s
    gap: Tensor  # [R, C] z_s - z_t, exact for a delta
    slope: Tensor | float  # d z_s / d raw_s


def scaled_logits(
    student: Tensor,
    teacher: Tensor,
    block: slice,
    columns: int,
    delta: bool,
    scaling: Scaling,
) -> ScaledLogits:
    """Rows `block` of the first `columns` columns; see `phases.row_statistics`."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    b_s, b_t = (
        None if bias is None else bias[:columns].to(dtype)
        for bias in (scaling.student_bias, scaling.teacher_bias)
    )

    def scaled(raw: Tensor, bias: Tensor | None) -> Tensor:
        raw = raw[block, :columns].to(dtype)
        return (raw if bias is None else raw + bias) * scaling.logit_scale

    slope: Tensor | float = scaling.inv_temperature * scaling.logit_scale
    z_t = scaled(teacher, b_t)
    if delta:  # a masked column is masked for both, whatever the product made of its delta
        gap = scaled(student, None).where(z_t >= MASKED, 0.0)
        if scaling.softcap:
            slope = slope * sech2((z_t + gap) / scaling.softcap)
            gap = capped_gap(gap, z_t, scaling.softcap)
            z_t = _capped(z_t, scaling.softcap)
        gap = gap * scaling.inv_temperature
        z_t = (z_t * scaling.inv_temperature).clamp(min=MASKED)
        return ScaledLogits(z_t, (z_t + gap).clamp(min=MASKED), gap, slope)
    z_s = scaled(student, b_s)
    if scaling.softcap:
        slope = slope * sech2(z_s / scaling.softcap)
        z_s, z_t = _capped(z_s, scaling.softcap), _capped(z_t, scaling.softcap)
    z_s = (z_s * scaling.inv_temperature).clamp(min=MASKED)
    z_t = (z_t * scaling.inv_temperature).clamp(min=MASKED)
    return ScaledLogits(z_t, z_s, z_s - z_t, slope)


def _capped(z: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(z / softcap)
