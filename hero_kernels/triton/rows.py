"""The row kernel in Triton: one program for each row, two or three sweeps over its logits.

    sweep 1   maxima, normalisers, log sum p_t exp(delta), and for reverse KL its mean log ratio
    sweep 2   the divergence, entropies; for both KLs the gradient too
    sweep 3   the gradient of the JSD, which needs sweep 2's KL(p_s || m)

Formulas as in csrc/row_kernel.cpp, with x = log p_s - log p_t: every value is a sum of terms
F(p, q, x) = q - p - p x >= 0, so nothing large cancels when teacher and student are close. Sums are
kept for each lane and combined once at the end of a sweep: no synchronisation within a sweep, and a
result that depends on the shape and the launch settings alone.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hero_kernels.row_arguments import check_matrices, check_vectors
from hero_kernels.triton.configs import RowConfig, row_config
from hero_kernels.triton.device import (
    LOG_RATIO_LIMIT,
    clamp,
    exp,
    exp_minus_1,
    kl_term,
    log_1_plus,
    log_mixture,
    probabilities,
)
from hero_kernels.triton.logits import MASKED, load_logits

NUM_STATS = tl.constexpr(8)
JSD = tl.constexpr(0)
FORWARD_KL = tl.constexpr(1)


def available() -> str | None:
    """None if the kernel can run, else the reason why not."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the Triton row kernel needs compute capability 8.0 or newer"
    return None


@triton.jit
def _divergence_rows_kernel(
    # tensors
    student_ptr,
    teacher_ptr,
    grad_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    target_ids_ptr,
    row_weights_ptr,
    old_logprobs_ptr,
    absolute_rows_ptr,
    stats_ptr,
    # shapes
    columns,
    vocab_size,
    # strides
    stride_sr,
    stride_tr,
    stride_gr,
    # scalars
    beta,
    inv_temperature,
    softcap,
    logit_scale,
    is_clip,
    # constexpr
    DIVERGENCE: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_ABSOLUTE: tl.constexpr,
    WITH_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a chunk may hold more than 2^31 logits
    student_ptr += row * stride_sr
    teacher_ptr += row * stride_tr
    grad_ptr += row * stride_gr
    stats_ptr += row * NUM_STATS
    absolute = 0.0
    if HAS_ABSOLUTE:
        absolute = tl.load(absolute_rows_ptr + row).to(tl.float32)
    source = (
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
    )
    lanes = tl.arange(0, BLOCK_V)

    # The target's logits come first: the gradient may overwrite them.
    if HAS_TARGETS:
        target = tl.load(target_ids_ptr + row)
        target_t, target_s, target_gap, _ = load_logits(
            source, tl.maximum(target, 0), DELTA, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, HAS_SOFTCAP
        )

    # x is invariant under a constant; one that aligns the maxima of the first block keeps it small.
    z_t, z_s, _, _ = load_logits(
        source, lanes, DELTA, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, HAS_SOFTCAP
    )
    first_t, first_s = tl.max(z_t, 0), tl.max(z_s, 0)
    shift = tl.where((first_t > MASKED) & (first_s > MASKED), first_s - first_t, 0.0)

    # Sweep 1, each lane with its own running maximum: of exp(z - max) and exp(max - z) one is 1.
    max_t = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    max_s = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    sum_t = tl.zeros((BLOCK_V,), tl.float32)
    sum_s = tl.zeros((BLOCK_V,), tl.float32)
    sum_growth = tl.zeros((BLOCK_V,), tl.float32)
    sum_ratio = tl.zeros((BLOCK_V,), tl.float32)
    top_t = tl.zeros((BLOCK_V,), tl.int32)
    top_s = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(0, columns, BLOCK_V):
        offs_v = start + lanes
        z_t, z_s, gap, _ = load_logits(
            source, offs_v, DELTA, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, HAS_SOFTCAP
        )
        x = clamp(gap - shift, LOG_RATIO_LIMIT)
        higher_t = z_t > max_t
        higher_s = z_s > max_s
        fall_t = exp(-tl.abs(z_t - max_t))
        fall_s = exp(-tl.abs(z_s - max_s))
        keep_t = tl.where(higher_t, fall_t, 1.0)
        add_t = tl.where(higher_t, 1.0, fall_t)
        keep_s = tl.where(higher_s, fall_s, 1.0)
        add_s = tl.where(higher_s, 1.0, fall_s)
        sum_t = sum_t * keep_t + add_t
        sum_growth = sum_growth * keep_t + add_t * exp_minus_1(x)
        sum_s = sum_s * keep_s + add_s
        sum_ratio = sum_ratio * keep_s + add_s * x
        max_t = tl.where(higher_t, z_t, max_t)
        max_s = tl.where(higher_s, z_s, max_s)
        if WITH_STATS:
            top_t = tl.where(higher_t, offs_v, top_t)
            top_s = tl.where(higher_s, offs_v, top_s)

    row_max_t = tl.max(max_t, 0)
    row_max_s = tl.max(max_s, 0)
    weight_t = exp(max_t - row_max_t)
    weight_s = exp(max_s - row_max_s)
    mass_t = tl.sum(sum_t * weight_t, 0)
    mass_s = tl.sum(sum_s * weight_s, 0)
    growth = tl.sum(sum_growth * weight_t, 0) / mass_t
    # Where the growth is large or overflowed, so is the divergence, and the normalisers serve.
    is_near = tl.abs(growth) < 0.5
    offset = log_1_plus(tl.where(is_near, growth, 0.0))
    far_offset = (row_max_s - row_max_t - shift) + tl.log(mass_s / mass_t)
    offset = tl.where(is_near, offset, far_offset)
    log_mass_t = tl.log(mass_t)
    log_mass_s = tl.log(mass_s)
    mean = tl.sum(sum_ratio * weight_s, 0) / mass_s - offset

    weight = tl.load(row_weights_ptr + row)
    ratio = 1.0
    target_logprob_s = 0.0
    target_logprob_t = 0.0
    if HAS_TARGETS:
        logprob_t = target_t - row_max_t - log_mass_t
        target_x = target_gap - shift - offset
        # The difference of the two keeps delta's accuracy, unless one side is masked.
        is_close = tl.abs(target_x) < 30.0
        logprob_s = tl.where(is_close, logprob_t + target_x, target_s - row_max_s - log_mass_s)
        target_logprob_s = tl.where(target >= 0, logprob_s, 0.0)
        target_logprob_t = tl.where(target >= 0, logprob_t, 0.0)
        if HAS_RATIO:
            ratio = exp(logprob_s - tl.load(old_logprobs_ptr + row))
            if HAS_CLIP:
                ratio = tl.where(ratio > is_clip, is_clip, ratio)
            ratio = tl.where(target >= 0, ratio, 1.0)
    scale = weight * ratio * logit_scale * inv_temperature

    # Sweep 2.
    divergence = tl.zeros((BLOCK_V,), tl.float32)
    student_part = tl.zeros((BLOCK_V,), tl.float32)
    entropy_s = tl.zeros((BLOCK_V,), tl.float32)
    entropy_t = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, columns, BLOCK_V):
        offs_v = start + lanes
        z_t, z_s, gap, slope = load_logits(
            source, offs_v, DELTA, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, HAS_SOFTCAP
        )
        log_p = z_t - row_max_t - log_mass_t
        log_q = z_s - row_max_s - log_mass_s
        p, q, difference, x = probabilities(log_p, log_q, gap - shift, offset)
        if WITH_STATS:
            entropy_t -= p * log_p
            entropy_s -= q * (log_p + x)
        if DIVERGENCE == JSD:
            m = beta * p + (1.0 - beta) * q
            from_teacher, from_student = log_mixture(x, beta)
            term = kl_term(q, m, from_student)
            student_part += term
            divergence += beta * kl_term(p, m, from_teacher) + (1.0 - beta) * term
        else:
            if DIVERGENCE == FORWARD_KL:
                divergence += kl_term(p, q, x)
                gradient = difference
            else:
                divergence += kl_term(q, p, -x)
                gradient = q * (x - mean)
            if HAS_GRAD:
                _store_gradient(grad_ptr, offs_v, columns, gradient * slope * scale, weight)

    value = tl.sum(divergence, 0)
    if DIVERGENCE == JSD and HAS_GRAD:  # sweep 3
        part = tl.sum(student_part, 0)
        for start in range(0, columns, BLOCK_V):
            offs_v = start + lanes
            z_t, z_s, gap, slope = load_logits(
                source, offs_v, DELTA, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, HAS_SOFTCAP
            )
            log_p = z_t - row_max_t - log_mass_t
            log_q = z_s - row_max_s - log_mass_s
            _, q, _, x = probabilities(log_p, log_q, gap - shift, offset)
            _, from_student = log_mixture(x, beta)
            gradient = (1.0 - beta) * q * (-from_student - part)
            _store_gradient(grad_ptr, offs_v, columns, gradient * slope * scale, weight)

    # Garbage behind a mask must not poison the weighted sum.
    hidden = (weight == 0.0) & ((value != value) | (tl.abs(value) == float("inf")))
    tl.store(stats_ptr + 0, tl.where(hidden, 0.0, value))
    tl.store(stats_ptr + 1, tl.where(hidden, 0.0, ratio))
    tl.store(stats_ptr + 2, tl.where(hidden, 0.0, target_logprob_s))
    tl.store(stats_ptr + 3, tl.where(hidden, 0.0, target_logprob_t))
    tl.store(stats_ptr + 4, tl.where(hidden, 0.0, tl.sum(entropy_s, 0)))
    tl.store(stats_ptr + 5, tl.where(hidden, 0.0, tl.sum(entropy_t, 0)))
    agreement = 0.0
    if WITH_STATS:
        first_t = tl.min(tl.where(max_t == row_max_t, top_t, columns), 0)
        first_s = tl.min(tl.where(max_s == row_max_s, top_s, columns), 0)
        agrees = (first_t == first_s) & (first_t < columns)
        agreement = tl.where(agrees & (hidden == 0), 1.0, 0.0)
    tl.store(stats_ptr + 6, agreement)
    tl.store(stats_ptr + 7, 0.0)


@triton.jit
def _store_gradient(grad_ptr, offs_v, columns, gradient, weight):
    gradient = tl.where(weight == 0.0, 0.0, gradient)  # also where the row holds NaN
    tl.store(grad_ptr + offs_v, gradient.to(grad_ptr.dtype.element_ty), mask=offs_v < columns)


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    *,
    delta: bool,
    divergence: int,
    beta: float,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    row_weights: Tensor,
    old_logprobs: Tensor | None,
    is_clip: float,
    vocab_size: int,
    with_stats: bool,
    absolute_rows: Tensor | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """Divergence, statistics and gradient of every row; as `hero_kernels.cpu.divergence_rows`.

    Args:
        config: launch settings; None for those of the device.

    Returns:
        [R, 8] fp32.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
    """
    check_matrices(student, teacher, grad, vocab_size)
    check_vectors(student, target_ids, row_weights, old_logprobs, absolute_rows, vocab_size)
    rows, columns = student.shape
    stats = student.new_empty((rows, NUM_STATS.value), dtype=torch.float32)
    if rows == 0:
        return stats
    config = config or row_config(torch.cuda.get_device_capability(student.device))

    def pointer(tensor: Tensor | None) -> Tensor:
        return stats if tensor is None else tensor  # what is absent is never read

    with torch.cuda.device_of(student):
        _divergence_rows_kernel[(rows,)](
            student,
            teacher,
            pointer(grad),
            pointer(student_bias),
            pointer(teacher_bias),
            pointer(target_ids),
            row_weights,
            pointer(old_logprobs),
            pointer(absolute_rows),
            stats,
            columns,
            vocab_size,
            student.stride(0),
            teacher.stride(0),
            0 if grad is None else grad.stride(0),
            beta,
            inv_temperature,
            softcap,
            logit_scale,
            is_clip,
            DIVERGENCE=divergence,
            DELTA=delta,
            HAS_GRAD=grad is not None,
            HAS_STUDENT_BIAS=student_bias is not None,
            HAS_TEACHER_BIAS=teacher_bias is not None,
            HAS_SOFTCAP=softcap > 0,
            HAS_TARGETS=target_ids is not None,
            HAS_RATIO=target_ids is not None and old_logprobs is not None,
            HAS_CLIP=is_clip > 0,
            HAS_ABSOLUTE=absolute_rows is not None,
            WITH_STATS=with_stats,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
    return stats
