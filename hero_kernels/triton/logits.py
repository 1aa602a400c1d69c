"""Reads a block of stored logits: bias, scale, soft-cap and temperature; shared by all sweeps."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import triton
import triton.language as tl

from hero_kernels.triton.device import soft_cap, soft_cap_gap

MASKED = tl.constexpr(-1e30)
"""A logit of -inf, or padding: finite, so that the difference of two is 0."""


@triton.jit
def load_logits(
    source,
    offs_v,
    DELTA: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """z_t, z_s, delta and d z_s / d raw student logit at columns `offs_v` of a row.

    `source` is the tuple (student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr, columns,
    vocab_size, logit_scale, softcap, inv_temperature, absolute); the first two point at the row,
    `absolute` is 1 where a row's student holds its logits in spite of DELTA, else 0.
    """
    (
        student_ptr,
        teacher_ptr,
        student_bias_ptr,
        teacher_bias_ptr,
        columns,
        vocab_size,
        logit_scale,
        softcap,
        inv_temperature,
        absolute,
    ) = source
    # Loads are masked by the padded width: a vocabulary of odd size would make them scalar.
    inside = offs_v < columns
    z_t = tl.load(teacher_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    stored = tl.load(student_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    if DELTA:
        stored -= absolute * z_t
    shared_bias = 0.0
    if HAS_TEACHER_BIAS:
        teacher_bias = tl.load(teacher_bias_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
        z_t += teacher_bias
        if DELTA:
            shared_bias = teacher_bias
    if HAS_STUDENT_BIAS:
        student_bias = tl.load(student_bias_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
        stored += student_bias - shared_bias  # a bias of both sides cancels exactly
    elif DELTA:
        stored -= shared_bias
    if DELTA:  # a masked column is masked for both, whatever the GEMM made of its delta
        stored = tl.where(z_t < MASKED, 0.0, stored)
    z_t *= logit_scale
    stored *= logit_scale
    slope = tl.full(z_t.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        if DELTA:
            _, slope = soft_cap(z_t + stored, softcap)
            stored = soft_cap_gap(stored, z_t, softcap)
        else:
            stored, slope = soft_cap(stored, softcap)
        z_t, _ = soft_cap(z_t, softcap)
    z_t *= inv_temperature
    stored *= inv_temperature
    z_t = tl.where(z_t < MASKED, MASKED, z_t)
    z_s = z_t + stored if DELTA else stored
    z_s = tl.where(z_s < MASKED, MASKED, z_s)
    gap = stored if DELTA else z_s - z_t
    real = offs_v < vocab_size
    return tl.where(real, z_t, MASKED), tl.where(real, z_s, MASKED), tl.where(real, gap, 0.0), slope
