"""The sweeps over logits: one program for each row, or piece of a row."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import triton
import triton.language as tl

from hero_kernels import constants
from hero_kernels.triton.device import (
    CLOSE,
    bounded,
    exp,
    kl_term,
    log_mixture,
    probabilities,
)
from hero_kernels.triton.logits import inverse_temperature, load_logits
from hero_kernels.triton.statistics import (
    GROWTH,
    MAX_S,
    MAX_T,
    MEAN,
    NUM_STATISTICS,
    SHIFT,
    SUM_S,
    SUM_T,
    TARGET_GAP,
    TARGET_T,
    TOP_S,
    TOP_T,
    choose_shift,
    growth_term,
    log_ratio_offset,
)

NUM_VALUES = tl.constexpr(constants.NUM_VALUES)
VALUE = tl.constexpr(constants.VALUE)
CENTRE = tl.constexpr(constants.CENTRE)
ENTROPY_S = tl.constexpr(constants.VALUE_ENTROPY_S)
ENTROPY_T = tl.constexpr(constants.VALUE_ENTROPY_T)
JSD = tl.constexpr(constants.JSD)
FORWARD_KL = tl.constexpr(constants.FORWARD_KL)


@triton.jit
def statistics_kernel(
    # tensors; None where there is none, from the biases on
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    absolute_rows_ptr,
    temperatures_ptr,
    # shapes
    rows,
    columns,
    num_real,
    piece,
    # strides
    stride_sr,
    stride_tr,
    # scalars
    inv_temperature,
    softcap,  # or None
    logit_scale,
    # of this kernel alone
    target_ids_ptr,  # or None
    parts_ptr,
    first_column,
    # constexpr
    DELTA: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a tile may hold more than 2^31 logits
    part = tl.program_id(1)
    absolute = 0.0
    if absolute_rows_ptr is not None:
        absolute = tl.load(absolute_rows_ptr + row).to(tl.float32)
    source = (
        student_ptr + row * stride_sr,
        teacher_ptr + row * stride_tr,
        student_bias_ptr,
        teacher_bias_ptr,
        absolute_rows_ptr,
        absolute,
        columns,
        num_real,
        logit_scale,
        softcap,
        inverse_temperature(temperatures_ptr, row, inv_temperature),
    )
    lanes = tl.arange(0, BLOCK_V)
    begin = part * piece
    end = tl.minimum(begin + piece, columns)

    # From the first block, as x must be kept small before the maxima are known.
    z_t, z_s, _, _ = load_logits(source, begin + lanes, DELTA)
    shift = choose_shift(tl.max(z_t, 0), tl.max(z_s, 0))

    # Each lane with its own running maximum: of exp(z - max) and exp(max - z) one is 1.
    max_t = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    max_s = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    sum_t = tl.zeros((BLOCK_V,), tl.float32)
    sum_s = tl.zeros((BLOCK_V,), tl.float32)
    sum_growth = tl.zeros((BLOCK_V,), tl.float32)
    sum_ratio = tl.zeros((BLOCK_V,), tl.float32)
    top_t = tl.zeros((BLOCK_V,), tl.int32)
    top_s = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + lanes
        z_t, z_s, gap, _ = load_logits(source, offs_v, DELTA)
        x = bounded(gap - shift)
        higher_t = z_t > max_t
        higher_s = z_s > max_s
        fall_t = exp(-tl.abs(z_t - max_t))
        fall_s = exp(-tl.abs(z_s - max_s))
        keep_t = tl.where(higher_t, fall_t, 1.0)
        add_t = tl.where(higher_t, 1.0, fall_t)
        keep_s = tl.where(higher_s, fall_s, 1.0)
        add_s = tl.where(higher_s, 1.0, fall_s)
        grown = exp(tl.minimum(z_t - max_t, 0.0) + x)
        sum_t = sum_t * keep_t + add_t
        sum_growth = sum_growth * keep_t + growth_term(add_t, grown, x)
        sum_s = sum_s * keep_s + add_s
        sum_ratio = sum_ratio * keep_s + add_s * x
        max_t = tl.where(higher_t, z_t, max_t)
        max_s = tl.where(higher_s, z_s, max_s)
        top_t = tl.where(higher_t, offs_v, top_t)
        top_s = tl.where(higher_s, offs_v, top_s)

    row_max_t = tl.max(max_t, 0)
    row_max_s = tl.max(max_s, 0)
    weight_t = exp(max_t - row_max_t)
    weight_s = exp(max_s - row_max_s)
    first_t = tl.min(tl.where(max_t == row_max_t, top_t, columns), 0)
    first_s = tl.min(tl.where(max_s == row_max_s, top_s, columns), 0)
    target_t, target_gap = 0.0, 0.0
    if target_ids_ptr is not None:
        target = tl.load(target_ids_ptr + row) - first_column
        is_here = (target >= begin) & (target < tl.minimum(end, num_real))
        z_t, _, gap, _ = load_logits(source, tl.where(is_here, target, 0).to(tl.int32), DELTA)
        target_t = tl.where(is_here, z_t, 0.0)
        target_gap = tl.where(is_here, bounded(gap), 0.0)

    out_ptr = parts_ptr + (part.to(tl.int64) * rows + row) * NUM_STATISTICS
    tl.store(out_ptr + MAX_T, row_max_t)
    tl.store(out_ptr + SUM_T, tl.sum(sum_t * weight_t, 0))
    tl.store(out_ptr + MAX_S, row_max_s)
    tl.store(out_ptr + SUM_S, tl.sum(sum_s * weight_s, 0))
    tl.store(out_ptr + SHIFT, shift)
    tl.store(out_ptr + GROWTH, tl.sum(sum_growth * weight_t, 0))
    tl.store(out_ptr + MEAN, tl.sum(sum_ratio * weight_s, 0))
    tl.store(out_ptr + TARGET_T, target_t)
    tl.store(out_ptr + TARGET_GAP, target_gap)
    tl.store(out_ptr + TOP_T, (first_t + first_column).to(tl.float32))
    tl.store(out_ptr + TOP_S, (first_s + first_column).to(tl.float32))


@triton.jit
def divergence_kernel(
    # tensors; None where there is none, from the biases on
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    absolute_rows_ptr,
    temperatures_ptr,
    # shapes
    rows,
    columns,
    num_real,
    piece,
    # strides
    stride_sr,
    stride_tr,
    # scalars
    inv_temperature,
    softcap,  # or None
    logit_scale,
    # of this kernel alone
    statistics_ptr,
    values_ptr,  # written if WITH_VALUES, else read
    row_scale_ptr,
    grad_ptr,  # None for no gradient
    stride_gr,
    beta,
    other_beta,  # 1 - beta
    # constexpr
    DIVERGENCE: tl.constexpr,
    DELTA: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    WITH_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    statistics_ptr += row * NUM_STATISTICS
    absolute = 0.0
    if absolute_rows_ptr is not None:
        absolute = tl.load(absolute_rows_ptr + row).to(tl.float32)
    source = (
        student_ptr + row * stride_sr,
        teacher_ptr + row * stride_tr,
        student_bias_ptr,
        teacher_bias_ptr,
        absolute_rows_ptr,
        absolute,
        columns,
        num_real,
        logit_scale,
        softcap,
        inverse_temperature(temperatures_ptr, row, inv_temperature),
    )
    lanes = tl.arange(0, BLOCK_V)
    begin = part * piece
    end = tl.minimum(begin + piece, columns)

    max_t = tl.load(statistics_ptr + MAX_T)
    sum_t = tl.load(statistics_ptr + SUM_T)
    max_s = tl.load(statistics_ptr + MAX_S)
    sum_s = tl.load(statistics_ptr + SUM_S)
    shift = tl.load(statistics_ptr + SHIFT)
    growth = tl.load(statistics_ptr + GROWTH)
    offset = log_ratio_offset(max_t, sum_t, max_s, sum_s, shift, growth)
    log_mass_t = tl.log(sum_t)
    log_mass_s = tl.log(sum_s)
    if grad_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row)
        scale = row_scale * logit_scale * source[10]
        num_wanted = tl.where(row_scale == 0.0, 0, num_real)
        grad_ptr += row * stride_gr
        if DIVERGENCE == JSD:
            centre = tl.load(values_ptr + row * NUM_VALUES + CENTRE)
        else:  # of the reverse KL: its value, rounded as x is, so that one column alone gives 0
            centre = tl.load(statistics_ptr + MEAN) / sum_s - offset

    divergence = tl.zeros((BLOCK_V,), tl.float32)
    centre_sum = tl.zeros((BLOCK_V,), tl.float32)
    entropy_s = tl.zeros((BLOCK_V,), tl.float32)
    entropy_t = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + lanes
        z_t, z_s, gap, slope = load_logits(source, offs_v, DELTA)
        log_p = z_t - max_t - log_mass_t
        log_q = z_s - max_s - log_mass_s
        x = bounded(gap - shift) - offset
        if DIVERGENCE == JSD:
            p, q = exp(log_p), exp(log_q)
        else:
            p, q, difference = probabilities(log_p, log_q, x)
        if WITH_STATS:
            entropy_t -= p * log_p
            entropy_s -= q * tl.where(tl.abs(x) <= CLOSE, log_p + x, log_q)
        if DIVERGENCE == JSD:
            from_teacher, from_student = log_mixture(x, beta, other_beta)
            if WITH_VALUES:
                m = beta * p + other_beta * q
                divergence += beta * kl_term(p, m, from_teacher)
                divergence += other_beta * kl_term(q, m, from_student)
                # Not the sum of the kl_terms: the error of a large p_s must cancel in the bracket.
                centre_sum -= q * from_student
        elif WITH_VALUES:
            if DIVERGENCE == FORWARD_KL:
                divergence += kl_term(p, q, x)
            else:
                divergence += kl_term(q, p, -x)
        if grad_ptr is not None:
            if DIVERGENCE == JSD:
                gradient = -other_beta * q * (from_student + centre)
            elif DIVERGENCE == FORWARD_KL:
                gradient = difference
            else:
                gradient = q * (x - centre)
            # Neither a NaN of a row without weight, nor what a padding column computes.
            gradient = tl.where(offs_v < num_wanted, gradient * (slope * scale), 0.0)
            gradient = gradient.to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + offs_v, gradient, mask=offs_v < columns)

    if WITH_VALUES:
        value = tl.sum(divergence, 0)
        out_ptr = values_ptr + (part.to(tl.int64) * rows + row) * NUM_VALUES
        tl.store(out_ptr + VALUE, value)
        if DIVERGENCE == JSD:
            tl.store(out_ptr + CENTRE, tl.sum(centre_sum, 0))
        elif DIVERGENCE == FORWARD_KL:
            tl.store(out_ptr + CENTRE, 0.0)
        else:
            tl.store(out_ptr + CENTRE, value)
        tl.store(out_ptr + ENTROPY_S, tl.sum(entropy_s, 0))
        tl.store(out_ptr + ENTROPY_T, tl.sum(entropy_t, 0))
