"""From raw logits to z: bias, scale, soft-cap and temperature; shared by all kernels."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import triton
import triton.language as tl

from hero_kernels import constants
from hero_kernels.triton.device import soft_cap, soft_cap_gap

MASKED = tl.constexpr(constants.MASKED)


@triton.jit
def inverse_temperature(temperatures_ptr, row, inv_temperature):
    """The row's own, or the objective's."""
    if temperatures_ptr is None:
        return inv_temperature
    else:
        return 1.0 / tl.load(temperatures_ptr + row).to(tl.float32)


@triton.jit
def load_logits(source, offs_v, DELTA: tl.constexpr):
    """z_t, z_s, their gap and d z_s / d raw student logit at columns `offs_v` of a row.

    `source` is the tuple (student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr,
    absolute_rows_ptr, absolute, columns, num_real, logit_scale, softcap, inv_temperature); the
    first two point at the row, `absolute` is 1 where a row's student holds its logits in spite of
    DELTA, else 0. Pointers and the soft cap may be None.
    """
    (
        student_ptr,
        teacher_ptr,
        student_bias_ptr,
        teacher_bias_ptr,
        absolute_rows_ptr,
        absolute,
        columns,
        num_real,
        logit_scale,
        softcap,
        inv_temperature,
    ) = source
    # Loads are masked by the padded width: a vocabulary of odd size would make them scalar.
    inside = offs_v < columns
    raw_t = tl.load(teacher_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    raw_s = tl.load(student_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    if absolute_rows_ptr is not None:
        raw_s -= absolute * raw_t
    bias_s, bias_t = student_bias_ptr, teacher_bias_ptr
    if student_bias_ptr is not None:
        bias_s = tl.load(student_bias_ptr + offs_v, mask=inside, other=0.0)
    if teacher_bias_ptr is not None:
        bias_t = tl.load(teacher_bias_ptr + offs_v, mask=inside, other=0.0)
    real = offs_v < num_real
    z_t, stored = raw_t, raw_s
    if bias_t is not None:
        z_t += bias_t
    z_t = tl.where(real, z_t, float("-inf"))  # padding may hold NaN
    if DELTA:  # a masked column is masked for both, whatever the GEMM made of its delta
        stored = tl.where(z_t < MASKED, 0.0, stored)
    else:
        if bias_s is not None:
            stored += bias_s
        stored = tl.where(real, stored, float("-inf"))
    slope = tl.full(z_t.shape, 1.0, tl.float32)
    if softcap is not None:
        z_t *= logit_scale
        stored *= logit_scale
        if DELTA:
            _, slope = soft_cap(z_t + stored, softcap)
            stored = soft_cap_gap(stored, z_t, softcap)
        else:
            stored, slope = soft_cap(stored, softcap)
            stored = tl.where(real, stored, MASKED)
        z_t, _ = soft_cap(z_t, softcap)
        z_t = tl.where(real, z_t, MASKED)
        z_t *= inv_temperature
        stored *= inv_temperature
    else:
        z_t *= logit_scale * inv_temperature
        stored *= logit_scale * inv_temperature
    z_t = tl.maximum(z_t, MASKED, propagate_nan=tl.PropagateNan.ALL)
    z_s = z_t + stored if DELTA else stored
    z_s = tl.maximum(z_s, MASKED, propagate_nan=tl.PropagateNan.ALL)
    return z_t, z_s, stored if DELTA else z_s - z_t, slope
