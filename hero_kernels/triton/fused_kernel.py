"""One GEMM kernel for teacher and student logits, with the row statistics in its epilogue.

A program computes a tile of rows and vocabulary entries. For a shared head two accumulators share
every tile of W that is loaded:

    z_t += h_t Wᵀ        delta += (h_s - h_t) Wᵀ

For heads of their own the two products follow each other, for one side there is one. The epilogue
stores raw logits, if wanted, and the tile's statistics of each row as one part for
`merge_statistics`. Statistics describe the logits as stored, rounded to their type, so that the
sweeps that read them back agree with them.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import triton
import triton.language as tl

from hero_kernels.triton.device import bounded, exp
from hero_kernels.triton.logits import MASKED, scale_logits
from hero_kernels.triton.statistics import (
    NUM_STATISTICS,
    choose_shift,
    growth_term,
    merge_two,
)

SHARED_HEAD = tl.constexpr(0)
OWN_HEADS = tl.constexpr(1)
ONE_SIDE = tl.constexpr(2)
GROUP_T = tl.constexpr(8)
"""Tiles of rows that share tiles of W: modelled, the 8 · 2 hidden tiles and 132 / 8 head tiles of a
wave are about as many bytes."""
SLICES = tl.constexpr(4)
"""Into how many parts of its columns the epilogue cuts a tile: its intermediate results would not
fit into registers else."""


@triton.jit
def fused_kernel(
    # tensors; the first four are tensor descriptors if DESCRIPTORS, all but they and the last may
    # be None
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    student_out_ptr,
    teacher_out_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    target_ids_ptr,
    absolute_rows_ptr,
    temperatures_ptr,
    parts_ptr,
    # shapes
    rows,
    columns,
    student_size,
    teacher_size,
    # strides
    stride_sh,
    stride_sw,
    stride_th,
    stride_tw,
    stride_so,
    stride_to,
    stride_pp,
    stride_pc,
    # scalars
    inv_temperature,
    softcap,  # or None
    logit_scale,
    # constexpr
    MODE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that run together form a block of tiles, so that h and W are read from the L2 cache.
    tiles_t = tl.cdiv(rows, BLOCK_T)
    tiles_v = tl.cdiv(columns, BLOCK_V)
    program = tl.program_id(0)
    group = program // (GROUP_T * tiles_v)
    group_rows = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
    within = program - group * GROUP_T * tiles_v
    first_t = (group * GROUP_T + within % group_rows) * BLOCK_T
    tile_v = within // group_rows
    first_v = tile_v * BLOCK_V
    offs_t = first_t + tl.arange(0, BLOCK_T)

    acc_t = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    acc_s = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for k in range(0, teacher_size, BLOCK_K):
        w = _load_tile(
            teacher_weight, stride_tw, first_v, k, columns, teacher_size,
            DESCRIPTORS, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        h_t = _load_tile(
            teacher_hidden, stride_th, first_t, k, rows, teacher_size,
            DESCRIPTORS, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        acc_t = tl.dot(h_t, tl.trans(w), acc_t)
        if MODE == SHARED_HEAD:
            h_d = _load_tile(
                student_hidden, stride_sh, first_t, k, rows, teacher_size,
                DESCRIPTORS, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            acc_s = tl.dot(h_d, tl.trans(w), acc_s)
    if MODE == OWN_HEADS:
        for k in range(0, student_size, BLOCK_K):
            w = _load_tile(
                student_weight, stride_sw, first_v, k, columns, student_size,
                DESCRIPTORS, BLOCK_V, BLOCK_K,
            )  # fmt: skip
            h_s = _load_tile(
                student_hidden, stride_sh, first_t, k, rows, student_size,
                DESCRIPTORS, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            acc_s = tl.dot(h_s, tl.trans(w), acc_s)

    WIDTH: tl.constexpr = BLOCK_V // SLICES
    none = tl.zeros((BLOCK_T,), tl.float32)
    masked = tl.full((BLOCK_T,), MASKED, tl.float32)
    top = none + first_v
    part = (masked, none, masked, none, none, none, none, none, none, top, top, none)
    targets = tl.full((BLOCK_T,), -1, tl.int32)
    if target_ids_ptr is not None:
        targets = tl.load(target_ids_ptr + offs_t, offs_t < rows, other=-1).to(tl.int32)
    if temperatures_ptr is not None:
        temperatures = tl.load(temperatures_ptr + offs_t, offs_t < rows, other=1.0)
        inv_temperature = (1.0 / temperatures.to(tl.float32))[:, None]
    scaling = (logit_scale, softcap, inv_temperature)
    if absolute_rows_ptr is not None:  # rows of the second operand that hold h_s
        absolute = tl.load(absolute_rows_ptr + offs_t, offs_t < rows, other=0).to(tl.float32)
    local_t = tl.arange(0, BLOCK_T)[:, None]
    if teacher_out_ptr is not None:
        teacher_out_ptr += first_t.to(tl.int64) * stride_to  # may hold more than 2^31 logits
        student_out_ptr += first_t.to(tl.int64) * stride_so
    for index in tl.static_range(SLICES):
        if first_v + index * WIDTH < columns:
            raw_t = _column_slice(acc_t, index, SLICES)
            raw_s = _column_slice(acc_s, index, SLICES)
            if absolute_rows_ptr is not None:
                raw_s -= absolute[:, None] * raw_t
            offs_v = first_v + index * WIDTH + tl.arange(0, WIDTH)
            if teacher_out_ptr is not None:
                inside = (offs_t < rows)[:, None] & (offs_v < columns)[None, :]
                stored_t = raw_t.to(teacher_out_ptr.dtype.element_ty)
                tl.store(teacher_out_ptr + local_t * stride_to + offs_v[None, :], stored_t, inside)
                raw_t = stored_t.to(tl.float32)
                stored_s = raw_s.to(student_out_ptr.dtype.element_ty)
                tl.store(student_out_ptr + local_t * stride_so + offs_v[None, :], stored_s, inside)
                raw_s = stored_s.to(tl.float32)
            bias_s, bias_t = student_bias_ptr, teacher_bias_ptr
            if student_bias_ptr is not None:
                bias_s = tl.load(student_bias_ptr + offs_v, offs_v < columns, other=0.0)[None, :]
            if teacher_bias_ptr is not None:
                bias_t = tl.load(teacher_bias_ptr + offs_v, offs_v < columns, other=0.0)[None, :]
            real = (offs_v < columns)[None, :]
            z_t, z_s, gap, _ = scale_logits(
                raw_s, raw_t, bias_s, bias_t, real, scaling, MODE == SHARED_HEAD
            )
            part = merge_two(
                part,
                _statistics(z_t, z_s, gap, offs_v, targets, MODE),
                MODE == ONE_SIDE,
            )
    part_ptr = parts_ptr + tile_v.to(tl.int64) * stride_pp + offs_t
    for column in tl.static_range(NUM_STATISTICS):
        tl.store(part_ptr + column * stride_pc, part[column], offs_t < rows)


@triton.jit
def _column_slice(tile, index: tl.constexpr, SLICES: tl.constexpr):
    """Columns index · V / SLICES and on of [T, V]; moves nothing between threads."""
    if SLICES == 1:
        return tile
    else:
        halves = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1)
        left, right = halves.split()
        if index < SLICES // 2:
            return _column_slice(left, index, SLICES // 2)
        else:
            return _column_slice(right, index - SLICES // 2, SLICES // 2)


@triton.jit
def _load_tile(
    source,
    stride,
    first_row,
    first_k,
    rows,
    size,
    DESCRIPTORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_R, BLOCK_K] of a matrix [rows, size], 0 outside of it."""
    if DESCRIPTORS:
        return source.load([first_row, first_k])
    else:
        offs_r = first_row + tl.arange(0, BLOCK_R)
        offs_k = first_k + tl.arange(0, BLOCK_K)
        ptr = source + offs_r.to(tl.int64)[:, None] * stride + offs_k[None, :]
        return tl.load(ptr, (offs_r < rows)[:, None] & (offs_k < size)[None, :], other=0.0)


@triton.jit
def _statistics(z_t, z_s, gap, offs_v, targets, MODE: tl.constexpr):
    """Statistics of a block [T, V], a tuple of [T] in the order of `constants`."""
    max_t = tl.max(z_t, 1)
    fall_t = z_t - max_t[:, None]
    e_t = exp(fall_t)
    sum_t = tl.sum(e_t, 1)
    top_t = _first(z_t == max_t[:, None], offs_v)
    none = tl.zeros_like(max_t)
    is_target = offs_v[None, :] == targets[:, None]
    target_t = tl.sum(tl.where(is_target, z_t, 0.0), 1)
    if MODE == ONE_SIDE:  # a student equal to the teacher
        energy = tl.sum(e_t * fall_t, 1)
        return (
            max_t, sum_t, max_t, sum_t, none, none, none,
            target_t, none, top_t, top_t, energy,
        )  # fmt: skip
    else:
        max_s = tl.max(z_s, 1)
        e_s = exp(z_s - max_s[:, None])
        top_s = _first(z_s == max_s[:, None], offs_v)
        shift = choose_shift(max_t, max_s)
        x = bounded(gap - shift[:, None])
        target_gap = tl.sum(tl.where(is_target, bounded(gap), 0.0), 1)
        rise = exp(max_s - max_t - shift)[:, None]  # e_s rise = exp(z_t - max_t + x)
        growth = tl.sum(growth_term(e_t, e_s * rise, x), 1)
        return (
            max_t, sum_t, max_s, tl.sum(e_s, 1), shift, growth, tl.sum(e_s * x, 1),
            target_t, target_gap, top_t, top_s, none,
        )  # fmt: skip


@triton.jit
def _first(is_top, offs_v):
    """[T] the first column of [T, V] that is marked, as a float; exact below 2^24."""
    return tl.min(tl.where(is_top, offs_v[None, :], 0x7FFFFFFF), 1).to(tl.float32)
