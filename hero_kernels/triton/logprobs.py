"""The log-probability kernels in Triton: one program for each row, one sweep over its logits each.

Formulas as in `rows_logprobs.py`. The statistics are those of an online softmax, kept for each
lane and combined once at the end of the sweep; the gradient needs no sum at all, as it is given the
row's normaliser. So neither sweep synchronises, logits are read once for each, and the result
depends on the shape and the launch settings alone.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hero_kernels import constants
from hero_kernels.objective import Objective
from hero_kernels.triton.configs import LOGPROBS, row_config
from hero_kernels.triton.device import soft_cap
from hero_kernels.triton.logits import MASKED
from hero_kernels.triton.rows import available
from hero_kernels.types import Tile

__all__ = ["available", "logprob_gradient", "logprob_rows"]

NUM_STATS = tl.constexpr(constants.NUM_LOGPROB_STATS)
LOGPROB = tl.constexpr(constants.LOGPROB)
ENTROPY = tl.constexpr(constants.ENTROPY)
MAXIMUM = tl.constexpr(constants.MAXIMUM)
LOG_MASS = tl.constexpr(constants.LOG_MASS)
LOWEST = tl.constexpr(-1e4)
"""Beneath every log-probability that counts: exp is 0 there, and a product with it is 0 too, which
for the -inf of a masked column it would not be."""


@triton.jit
def _load_z(logits_ptr, bias_ptr, offs_v, inside, inv_temperature, softcap, logit_scale):
    """z and dz / d raw logit at columns `offs_v` of the row `logits_ptr` points at."""
    z = tl.load(logits_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_v, mask=inside, other=0.0)
    z *= logit_scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if softcap is not None:
        z, slope = soft_cap(z, softcap)
    return z * inv_temperature, slope * (logit_scale * inv_temperature)


@triton.jit
def logprob_rows_kernel(
    # tensors
    logits_ptr,
    bias_ptr,  # or None
    target_ids_ptr,
    stats_ptr,
    # shapes
    columns,
    num_real,
    # strides
    stride_lr,
    # scalars
    inv_temperature,
    softcap,  # or None
    logit_scale,
    # constexpr
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a tile may hold more than 2^31 logits
    logits_ptr += row * stride_lr
    stats_ptr += row * NUM_STATS
    lanes = tl.arange(0, BLOCK_V)

    # Each lane with its own running maximum: of exp(z - max) and exp(max - z) one is 1.
    lane_max = tl.full((BLOCK_V,), MASKED, tl.float32)
    lane_mass = tl.zeros((BLOCK_V,), tl.float32)
    lane_weighted = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, columns, BLOCK_V):
        offs_v = start + lanes
        # Loads are masked by the padded width: a vocabulary of odd size would make them scalar.
        z, _ = _load_z(
            logits_ptr, bias_ptr, offs_v, offs_v < columns, inv_temperature, softcap, logit_scale
        )
        z = tl.where(z < MASKED, MASKED, z)  # a NaN stays a NaN
        z = tl.where(offs_v < num_real, z, MASKED)
        higher = z > lane_max
        gap = -tl.abs(z - lane_max)
        fall = tl.exp(gap)
        keep = tl.where(higher, fall, 1.0)
        if WITH_ENTROPY:  # sum exp(z - max) (z - max), moved to the new maximum
            moved = tl.where(higher, lane_mass * gap, 0.0)
            added = tl.where(higher, 0.0, fall * gap)
            lane_weighted = (lane_weighted + moved) * keep + added
        lane_mass = lane_mass * keep + tl.where(higher, 1.0, fall)
        lane_max = tl.where(higher, z, lane_max)

    maximum = tl.max(lane_max, 0)
    below = lane_max - maximum
    share = tl.exp(below)
    mass = tl.sum(lane_mass * share, 0)
    log_mass = tl.log(mass)
    entropy = 0.0
    if WITH_ENTROPY:
        # A lane of masked columns alone has no share, but counts of them at MASKED.
        weighted = tl.where(share > 0.0, (lane_weighted + lane_mass * below) * share, 0.0)
        entropy = log_mass - tl.sum(weighted, 0) / mass
        entropy = tl.where(entropy < 0.0, 0.0, entropy)

    target = tl.load(target_ids_ptr + row)
    inside = (target >= 0) & (target < num_real)
    z_target, _ = _load_z(
        logits_ptr, bias_ptr, target, inside, inv_temperature, softcap, logit_scale
    )
    logprob = (z_target - maximum) - log_mass
    logprob = tl.where(logprob > 0.0, 0.0, logprob)
    tl.store(stats_ptr + LOGPROB, tl.where(target >= 0, logprob, 0.0))
    tl.store(stats_ptr + ENTROPY, entropy)
    tl.store(stats_ptr + MAXIMUM, maximum)
    tl.store(stats_ptr + LOG_MASS, log_mass)


@triton.jit
def logprob_gradient_kernel(
    # tensors
    logits_ptr,
    bias_ptr,  # or None
    target_ids_ptr,
    stats_ptr,
    # shapes
    columns,
    num_real,
    # strides
    stride_lr,
    # scalars
    inv_temperature,
    softcap,  # or None
    logit_scale,
    # of this kernel alone
    grad_ptr,
    upstream_ptr,
    stride_gr,
    # constexpr
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_lr
    grad_ptr += row * stride_gr
    stats_ptr += row * NUM_STATS
    target = tl.load(target_ids_ptr + row)
    entropy = tl.load(stats_ptr + ENTROPY)
    maximum = tl.load(stats_ptr + MAXIMUM)
    log_mass = tl.load(stats_ptr + LOG_MASS)
    of_logprob = tl.where(target >= 0, tl.load(upstream_ptr + 2 * row), 0.0)
    of_entropy = tl.load(upstream_ptr + 2 * row + 1)
    live = ((of_logprob == 0.0) & (of_entropy == 0.0)) == 0  # else the row is not even read
    lanes = tl.arange(0, BLOCK_V)
    for start in range(0, columns, BLOCK_V):
        offs_v = start + lanes
        inside = offs_v < columns
        z, slope = _load_z(
            logits_ptr, bias_ptr, offs_v, inside & live, inv_temperature, softcap, logit_scale
        )
        log_p = (z - maximum) - log_mass
        log_p = tl.clamp(log_p, LOWEST, 0.0, propagate_nan=tl.PropagateNan.ALL)
        gradient = -tl.exp(log_p) * (of_logprob + of_entropy * (log_p + entropy))
        gradient = (gradient + tl.where(offs_v == target, of_logprob, 0.0)) * slope
        gradient = tl.where((offs_v < num_real) & live, gradient, 0.0)
        tl.store(grad_ptr + offs_v, gradient.to(grad_ptr.dtype.element_ty), mask=inside)


def logprob_rows(
    tile: Tile, target_ids: Tensor, objective: Objective, with_entropy: bool
) -> Tensor:
    """[R, 4], as `rows_logprobs.logprob_rows`."""
    shape = len(tile.student), constants.NUM_LOGPROB_STATS
    stats = tile.student.new_empty(shape, dtype=torch.float32)
    _launch(logprob_rows_kernel, tile, target_ids, objective, stats, WITH_ENTROPY=with_entropy)
    return stats


def logprob_gradient(
    tile: Tile, target_ids: Tensor, objective: Objective, stats: Tensor, upstream: Tensor
) -> None:
    """Fills `tile.grad`, as `rows_logprobs.logprob_gradient`."""
    assert tile.grad is not None
    _launch(
        logprob_gradient_kernel,
        tile,
        target_ids,
        objective,
        stats,
        grad_ptr=tile.grad,
        upstream_ptr=upstream.contiguous(),
        stride_gr=tile.grad.stride(0),
    )


def _launch(
    kernel: Any,
    tile: Tile,
    target_ids: Tensor,
    objective: Objective,
    stats: Tensor,
    **arguments: Any,
) -> None:
    logits = tile.student
    if len(logits) == 0:
        return
    config = row_config(logits.device, LOGPROBS)
    with torch.cuda.device_of(logits):
        kernel[(len(logits),)](
            logits,
            tile.student_bias,
            target_ids,
            stats,
            logits.shape[1],
            tile.num_real,
            logits.stride(0),
            1.0 / objective.temperature,
            objective.softcap,
            objective.logit_scale,
            **arguments,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
