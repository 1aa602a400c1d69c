"""The log-probability kernels in Triton: one program for each row, one sweep over its logits each.

Formulas as in hero_kernels/logprob_rows.py. The statistics are those of an online softmax, kept for
each lane and combined once at the end of the sweep; the gradient needs no sum at all, as it is
given the row's normaliser. So neither sweep synchronises, logits are read once for the statistics
and once for the gradient, and the result depends on the shape and the launch settings alone.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hero_kernels import logprob_rows as definition
from hero_kernels.row_arguments import check_logits, check_of_rows, check_targets
from hero_kernels.triton import rows
from hero_kernels.triton.configs import LOGPROBS, RowConfig, row_config
from hero_kernels.triton.device import soft_cap
from hero_kernels.triton.logits import MASKED

NUM_STATS = tl.constexpr(definition.LOGPROB_STATS)
LOWEST = tl.constexpr(definition.LOWEST)


def available() -> str | None:
    """None if the kernels can run, else the reason why not."""
    return rows.available()


@triton.jit
def _load_z(
    logits_ptr,
    bias_ptr,
    offs_v,
    inside,
    inv_temperature,
    softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """z and dz / d raw logit at columns `offs_v` of the row `logits_ptr` points at."""
    z = tl.load(logits_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    z *= logit_scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        z, slope = soft_cap(z, softcap)
    return z * inv_temperature, slope * (logit_scale * inv_temperature)


@triton.jit
def _logprob_rows_kernel(
    # tensors
    logits_ptr,
    bias_ptr,
    target_ids_ptr,
    stats_ptr,
    # shapes
    columns,
    vocab_size,
    # strides
    stride_lr,
    # scalars
    inv_temperature,
    softcap,
    logit_scale,
    # constexpr
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a chunk may hold more than 2^31 logits
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
            logits_ptr,
            bias_ptr,
            offs_v,
            offs_v < columns,
            inv_temperature,
            softcap,
            logit_scale,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        z = tl.where(z < MASKED, MASKED, z)  # a NaN stays a NaN
        z = tl.where(offs_v < vocab_size, z, MASKED)
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

    target = tl.load(target_ids_ptr + row)
    z_target, _ = _load_z(
        logits_ptr,
        bias_ptr,
        target,
        (target >= 0) & (target < vocab_size),
        inv_temperature,
        softcap,
        logit_scale,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    logprob = (z_target - maximum) - log_mass
    tl.store(stats_ptr + 0, tl.where(target >= 0, logprob, 0.0))
    tl.store(stats_ptr + 1, entropy)
    tl.store(stats_ptr + 2, maximum)
    tl.store(stats_ptr + 3, log_mass)


@triton.jit
def _logprob_gradient_kernel(
    # tensors
    logits_ptr,
    grad_ptr,
    bias_ptr,
    target_ids_ptr,
    stats_ptr,
    upstream_ptr,
    # shapes
    columns,
    vocab_size,
    # strides
    stride_lr,
    stride_gr,
    # scalars
    inv_temperature,
    softcap,
    logit_scale,
    # constexpr
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_lr
    grad_ptr += row * stride_gr
    stats_ptr += row * NUM_STATS
    target = tl.load(target_ids_ptr + row)
    entropy = tl.load(stats_ptr + 1)
    maximum = tl.load(stats_ptr + 2)
    log_mass = tl.load(stats_ptr + 3)
    of_logprob = tl.where(target >= 0, tl.load(upstream_ptr + 2 * row), 0.0)
    of_entropy = tl.load(upstream_ptr + 2 * row + 1)
    live = ((of_logprob == 0.0) & (of_entropy == 0.0)) == 0  # else the row is not even read
    lanes = tl.arange(0, BLOCK_V)
    for start in range(0, columns, BLOCK_V):
        offs_v = start + lanes
        inside = offs_v < columns
        z, slope = _load_z(
            logits_ptr,
            bias_ptr,
            offs_v,
            inside & live,
            inv_temperature,
            softcap,
            logit_scale,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        log_p = (z - maximum) - log_mass
        log_p = tl.clamp(log_p, LOWEST, 0.0, propagate_nan=tl.PropagateNan.ALL)
        gradient = -tl.exp(log_p) * (of_logprob + of_entropy * (log_p + entropy))
        gradient = (gradient + tl.where(offs_v == target, of_logprob, 0.0)) * slope
        gradient = tl.where((offs_v < vocab_size) & live, gradient, 0.0)
        tl.store(grad_ptr + offs_v, gradient.to(grad_ptr.dtype.element_ty), mask=inside)


def logprob_rows(
    logits: Tensor,
    *,
    target_ids: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    with_entropy: bool,
    config: RowConfig | None = None,
) -> Tensor:
    """Log-probability of a token and entropy of each row; as `logprob_rows.logprob_rows`.

    Args:
        config: launch settings; None for those of the device.

    Returns:
        [R, 4] fp32.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
    """
    check_logits(logits, None, vocab_size)
    check_targets(logits, target_ids, vocab_size)
    num_rows, columns = logits.shape
    stats = logits.new_empty((num_rows, definition.LOGPROB_STATS), dtype=torch.float32)
    if num_rows == 0:
        return stats
    config = config or row_config(torch.cuda.get_device_capability(logits.device), LOGPROBS)
    with torch.cuda.device_of(logits):
        _logprob_rows_kernel[(num_rows,)](
            logits,
            stats if bias is None else bias,  # what is absent is never read
            target_ids,
            stats,
            columns,
            vocab_size,
            logits.stride(0),
            inv_temperature,
            softcap,
            logit_scale,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap > 0,
            WITH_ENTROPY=with_entropy,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
    return stats


def logprob_gradient(
    logits: Tensor,
    grad: Tensor,
    stats: Tensor,
    upstream: Tensor,
    *,
    target_ids: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    config: RowConfig | None = None,
) -> None:
    """Gradient of each row; as `logprob_rows.logprob_gradient`.

    Args:
        config: launch settings; None for those of the device.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
    """
    check_logits(logits, grad, vocab_size)
    check_targets(logits, target_ids, vocab_size)
    check_of_rows(logits, "stats", stats, definition.LOGPROB_STATS)
    check_of_rows(logits, "upstream", upstream, 2)
    num_rows, columns = logits.shape
    if num_rows == 0:
        return
    config = config or row_config(torch.cuda.get_device_capability(logits.device), LOGPROBS)
    with torch.cuda.device_of(logits):
        _logprob_gradient_kernel[(num_rows,)](
            logits,
            grad,
            stats if bias is None else bias,
            target_ids,
            stats,
            upstream,
            columns,
            vocab_size,
            logits.stride(0),
            grad.stride(0),
            inv_temperature,
            softcap,
            logit_scale,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap > 0,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
