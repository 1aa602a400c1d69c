"""What the phase kernels share: columns, the reference of the log ratio, and the merge of parts.

See `hero_kernels.phases` for the columns. Parts are pieces of a row's columns: slices, or the tiles
of a GEMM. They are merged in a fixed order, so the result depends on shapes alone.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hero_kernels import phases
from hero_kernels.triton.device import exp, log_1_plus, quadratic_remainder
from hero_kernels.triton.logits import MASKED

MAX_T = tl.constexpr(phases.MAX_T)
SUM_T = tl.constexpr(phases.SUM_T)
MAX_S = tl.constexpr(phases.MAX_S)
SUM_S = tl.constexpr(phases.SUM_S)
SHIFT = tl.constexpr(phases.SHIFT)
GROWTH = tl.constexpr(phases.GROWTH)
MEAN = tl.constexpr(phases.MEAN)
TARGET_T = tl.constexpr(phases.TARGET_T)
TARGET_GAP = tl.constexpr(phases.TARGET_GAP)
TOP_T = tl.constexpr(phases.TOP_T)
TOP_S = tl.constexpr(phases.TOP_S)
ENERGY = tl.constexpr(11)
"""sum exp(z_s - MAX_S) (z_s - MAX_S) where one side alone is seen, for its entropy; else 0."""
NUM_STATISTICS = tl.constexpr(12)

_ALIGNED = tl.constexpr(0.25)
"""Maxima this close need no shift: |exp(0.25) - 1| < 0.5, so the growth of a row whose log ratio is
nearly constant stays where log1p serves."""
_MERGE_ROWS, _MERGE_PARTS = 8, 64


@triton.jit
def choose_shift(max_t, max_s):
    """Reference of the log ratio; 0 for nearby distributions, and where one side is masked."""
    apart = (tl.abs(max_s - max_t) > _ALIGNED) & (max_t > MASKED) & (max_s > MASKED)
    return tl.where(apart, max_s - max_t, 0.0)


@triton.jit
def growth_term(e_t, grown, x):
    """e_t expm1(x), given e_t = exp(z_t - a) and `grown` = exp(z_t - a + x).

    Where the teacher is masked but not the student, `grown` is infinite: then the parts' sum is
    infinite or NaN, and `log_ratio_offset` takes the normalisers instead.
    """
    near = e_t * (x + x * x * quadratic_remainder(x))
    return tl.where(tl.abs(x) <= 1.0, near, grown - e_t)


@triton.jit
def log_ratio_offset(max_t, sum_t, max_s, sum_s, shift, growth):
    """c of x = log p_s - log p_t = gap - shift - c, without cancellation for nearby p_s and p_t."""
    growth = growth / sum_t
    # Where the growth is large or overflowed, so is the divergence, and the normalisers serve.
    is_near = tl.abs(growth) < 0.5
    near = log_1_plus(tl.where(is_near, growth, 0.0))
    return tl.where(is_near, near, (max_s - max_t - shift) + tl.log(sum_s / sum_t))


@triton.jit
def regrowth(growth, sum_t, weight_t, fall_t, change):
    """sum exp(z_t - a) expm1(x + change) from a part's GROWTH and SUM_T; weight_t = exp(fall_t).

    expm1(x + b) = exp(b) expm1(x) + expm1(b). The exponents are added first, as a part of no mass
    may be far from the rest.
    """
    grown = exp(fall_t + change)
    return grown * growth + sum_t * growth_term(weight_t, grown, change)


@triton.jit
def merge_two(a, b, ONE_SIDE: tl.constexpr):
    """Statistics of two parts, the columns of `a` before those of `b`; tuples of twelve."""
    max_t = tl.maximum(a[0], b[0])
    max_s = tl.maximum(a[2], b[2])
    shift = choose_shift(max_t, max_s)
    fall_at, fall_bt = a[0] - max_t, b[0] - max_t
    fall_as, fall_bs = a[2] - max_s, b[2] - max_s
    at, bt, as_, bs = exp(fall_at), exp(fall_bt), exp(fall_as), exp(fall_bs)
    growth_a = regrowth(a[5], a[1], at, fall_at, a[4] - shift)
    growth_b = regrowth(b[5], b[1], bt, fall_bt, b[4] - shift)
    mean_a = as_ * (a[6] + (a[4] - shift) * a[3])
    mean_b = bs * (b[6] + (b[4] - shift) * b[3])
    energy = a[11]  # 0
    if ONE_SIDE:
        energy = as_ * (a[11] + fall_as * a[3]) + bs * (b[11] + fall_bs * b[3])
    return (
        max_t,
        at * a[1] + bt * b[1],
        max_s,
        as_ * a[3] + bs * b[3],
        shift,
        growth_a + growth_b,
        mean_a + mean_b,
        a[7] + b[7],
        a[8] + b[8],
        tl.where(b[0] > a[0], b[9], a[9]),
        tl.where(b[2] > a[2], b[10], a[10]),
        energy,
    )


@triton.jit
def _merge_kernel(
    # tensors
    parts_ptr,
    statistics_ptr,
    # shapes
    parts,
    rows,
    # strides
    stride_pp,
    stride_pr,
    stride_pc,
    # constexpr
    ONE_SIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_p = tl.arange(0, BLOCK_P)
    row_mask = offs_r < rows
    block_ptr = parts_ptr + (
        offs_p[:, None].to(tl.int64) * stride_pp + offs_r[None, :].to(tl.int64) * stride_pr
    )

    max_t = tl.full((BLOCK_P, BLOCK_R), float("-inf"), tl.float32)
    max_s = tl.full((BLOCK_P, BLOCK_R), float("-inf"), tl.float32)
    ptr = block_ptr
    for first in range(0, parts, BLOCK_P):
        mask = (first + offs_p < parts)[:, None] & row_mask[None, :]
        max_t = tl.maximum(max_t, tl.load(ptr + MAX_T * stride_pc, mask, other=float("-inf")))
        max_s = tl.maximum(max_s, tl.load(ptr + MAX_S * stride_pc, mask, other=float("-inf")))
        ptr += BLOCK_P * stride_pp
    row_max_t = tl.max(max_t, 0)
    row_max_s = tl.max(max_s, 0)
    shift = choose_shift(row_max_t, row_max_s)

    sum_t = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    sum_s = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    growth = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    energy = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    target_t = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    target_gap = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    top_t = tl.full((BLOCK_P, BLOCK_R), float("inf"), tl.float32)
    top_s = tl.full((BLOCK_P, BLOCK_R), float("inf"), tl.float32)
    ptr = block_ptr
    for first in range(0, parts, BLOCK_P):
        mask = (first + offs_p < parts)[:, None] & row_mask[None, :]
        part_max_t = tl.load(ptr + MAX_T * stride_pc, mask, other=float("-inf"))
        part_max_s = tl.load(ptr + MAX_S * stride_pc, mask, other=float("-inf"))
        part_t = tl.load(ptr + SUM_T * stride_pc, mask, other=0.0)
        part_s = tl.load(ptr + SUM_S * stride_pc, mask, other=0.0)
        fall_t = tl.where(mask, part_max_t - row_max_t[None, :], 0.0)
        fall_s = tl.where(mask, part_max_s - row_max_s[None, :], 0.0)
        weight_t = exp(fall_t)
        weight_s = exp(fall_s)
        sum_t += weight_t * part_t
        sum_s += weight_s * part_s
        change = tl.load(ptr + SHIFT * stride_pc, mask, other=0.0) - shift[None, :]
        change = tl.where(mask, change, 0.0)
        part_growth = tl.load(ptr + GROWTH * stride_pc, mask, other=0.0)
        growth += regrowth(part_growth, part_t, weight_t, fall_t, change)
        mean += weight_s * (tl.load(ptr + MEAN * stride_pc, mask, other=0.0) + change * part_s)
        if ONE_SIDE:
            part_energy = tl.load(ptr + ENERGY * stride_pc, mask, other=0.0)
            energy += weight_s * (part_energy + fall_s * part_s)
        target_t += tl.load(ptr + TARGET_T * stride_pc, mask, other=0.0)
        target_gap += tl.load(ptr + TARGET_GAP * stride_pc, mask, other=0.0)
        part_top_t = tl.load(ptr + TOP_T * stride_pc, mask, other=float("inf"))
        part_top_s = tl.load(ptr + TOP_S * stride_pc, mask, other=float("inf"))
        is_top_t = part_max_t == row_max_t[None, :]
        is_top_s = part_max_s == row_max_s[None, :]
        top_t = tl.minimum(top_t, tl.where(is_top_t, part_top_t, float("inf")))
        top_s = tl.minimum(top_s, tl.where(is_top_s, part_top_s, float("inf")))
        ptr += BLOCK_P * stride_pp

    out_ptr = statistics_ptr + offs_r.to(tl.int64) * NUM_STATISTICS
    tl.store(out_ptr + MAX_T, row_max_t, row_mask)
    tl.store(out_ptr + SUM_T, tl.sum(sum_t, 0), row_mask)
    tl.store(out_ptr + MAX_S, row_max_s, row_mask)
    tl.store(out_ptr + SUM_S, tl.sum(sum_s, 0), row_mask)
    tl.store(out_ptr + SHIFT, shift, row_mask)
    tl.store(out_ptr + GROWTH, tl.sum(growth, 0), row_mask)
    tl.store(out_ptr + MEAN, tl.sum(mean, 0), row_mask)
    tl.store(out_ptr + TARGET_T, tl.sum(target_t, 0), row_mask)
    tl.store(out_ptr + TARGET_GAP, tl.sum(target_gap, 0), row_mask)
    tl.store(out_ptr + TOP_T, tl.min(top_t, 0), row_mask)
    tl.store(out_ptr + TOP_S, tl.min(top_s, 0), row_mask)
    tl.store(out_ptr + ENERGY, tl.sum(energy, 0), row_mask)


def merge_statistics(parts: Tensor, *, one_side: bool = False) -> Tensor:
    """Statistics of whole rows from those of their parts.

    Args:
        parts: [P, R, 12] fp32, any strides; parts in the order of their columns.
        one_side: whether they are those of one side alone, and hold `ENERGY`.

    Returns:
        [R, 12] fp32.

    Raises:
        ValueError: another shape or type.
    """
    if parts.ndim != 3 or parts.shape[2] != NUM_STATISTICS.value or parts.dtype != torch.float32:
        raise ValueError(
            f"parts must be [P, R, {NUM_STATISTICS.value}] of torch.float32, "
            f"got {list(parts.shape)} of {parts.dtype}."
        )
    count, rows, _ = parts.shape
    if count == 0:
        raise ValueError("parts must hold at least one part, got 0.")
    statistics = parts.new_empty((rows, NUM_STATISTICS.value))
    if rows == 0:
        return statistics
    with torch.cuda.device_of(parts):
        _merge_kernel[(triton.cdiv(rows, _MERGE_ROWS),)](
            parts,
            statistics,
            count,
            rows,
            *parts.stride(),
            ONE_SIDE=one_side,
            BLOCK_P=min(_MERGE_PARTS, triton.next_power_of_2(count)),
            BLOCK_R=_MERGE_ROWS,
            num_warps=4,
        )
    return statistics
