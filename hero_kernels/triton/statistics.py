"""What the sweeps share: columns, the reference of the log ratio, and the merge of parts.

Parts are tiles of a row's columns, or pieces of them. They are merged in a fixed order, so the
result depends on shapes alone.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hero_kernels import constants
from hero_kernels.triton.device import CLOSE, exp, log_1_plus, quadratic_remainder
from hero_kernels.triton.logits import MASKED

MAX_T = tl.constexpr(constants.MAX_T)
SUM_T = tl.constexpr(constants.SUM_T)
MAX_S = tl.constexpr(constants.MAX_S)
SUM_S = tl.constexpr(constants.SUM_S)
SHIFT = tl.constexpr(constants.SHIFT)
GROWTH = tl.constexpr(constants.GROWTH)
MEAN = tl.constexpr(constants.MEAN)
TARGET_T = tl.constexpr(constants.TARGET_T)
TARGET_GAP = tl.constexpr(constants.TARGET_GAP)
TOP_T = tl.constexpr(constants.TOP_T)
TOP_S = tl.constexpr(constants.TOP_S)
NUM_STATISTICS = tl.constexpr(constants.NUM_STATISTICS)

_NEARBY_MAXIMA = tl.constexpr(constants.NEARBY_MAXIMA)
_NEAR_GROWTH = tl.constexpr(constants.NEAR_GROWTH)
_MERGE_ROWS, _MERGE_PARTS = 8, 32


@triton.jit
def choose_shift(max_t, max_s):
    """Reference of the log ratio; 0 for nearby distributions, and where one side is masked."""
    apart = (tl.abs(max_s - max_t) > _NEARBY_MAXIMA) & (max_t > MASKED) & (max_s > MASKED)
    return tl.where(apart, max_s - max_t, 0.0)


@triton.jit
def growth_term(e_t, grown, x):
    """e_t expm1(x), given e_t = exp(z_t - a) and `grown` = exp(z_t - a + x).

    Where the teacher is masked but not the student, `grown` is infinite: then the parts' sum is
    infinite or NaN, and `log_ratio_offset` takes the normalisers instead.
    """
    near = e_t * (x + x * x * quadratic_remainder(x))
    return tl.where(tl.abs(x) <= CLOSE, near, grown - e_t)


@triton.jit
def log_ratio_offset(max_t, sum_t, max_s, sum_s, shift, growth):
    """c of x = log p_s - log p_t = gap - shift - c, without cancellation for nearby p_s and p_t."""
    growth = growth / sum_t
    # Where the growth is large or overflowed, so is the divergence, and the normalisers serve.
    is_near = tl.abs(growth) < _NEAR_GROWTH
    growth = tl.where(is_near, growth, 0.0)
    near = log_1_plus(growth, 1.0 + growth)
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


def merge_statistics(parts: Tensor) -> Tensor:
    """[R, 11] of all columns from [P, R, 11] fp32: disjoint columns, in their order."""
    count, rows, width = parts.shape
    statistics = parts.new_empty(rows, width)
    if rows == 0:
        return statistics
    with torch.cuda.device_of(parts):
        _merge_kernel[(triton.cdiv(rows, _MERGE_ROWS),)](
            parts,
            statistics,
            count,
            rows,
            *parts.stride(),
            BLOCK_P=min(_MERGE_PARTS, triton.next_power_of_2(count)),
            BLOCK_R=_MERGE_ROWS,
            num_warps=4,
        )
    return statistics
