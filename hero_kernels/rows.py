"""The row kernels in torch: any device, any floating-point type, every support.

`RowKernels` in types.py says what each function returns. A tile is worked on in blocks of rows that
fit the cache; whole rows take the same steps as tiles of some columns, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels import constants as c
from hero_kernels.formulas import (
    bounded,
    dense_divergence,
    divergence_slope,
    divergence_sums,
    soft_cap,
    soft_cap_gap,
    soft_cap_slope,
)
from hero_kernels.objective import Objective
from hero_kernels.rows_topk import LogProbs, restricted_divergence
from hero_kernels.types import RowTensors, Tile

SCRATCH_TENSORS = 20
"""Bound on the temporaries of one block, in blocks of the wide type."""


class ScaledLogits(NamedTuple):
    """z of a block of B rows and C real columns, MASKED in place of -inf."""

    teacher: Tensor  # [B, C] z_t
    student: Tensor  # [B, C] z_s
    gap: Tensor | None  # [B, C] z_s - z_t without cancellation; None for heads of their own
    slope: Tensor | float  # d z_s / d raw_s: [B, C], [B, 1] or one number


def available() -> None:
    """It always is."""


def divergence_rows(tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool) -> Tensor:
    """[R, 8]; see `RowKernels`."""
    result = tile.student.new_empty(len(tile.student), c.NUM_STATS, dtype=_wide(tile))
    for block in row_blocks(tile):
        logits = _scaled(tile, block, rows, objective)
        part = rows.take(block)
        statistics, from_t, from_s = _statistics(logits, part.target_ids, first_column=0)
        values = statistics.new_zeros(len(statistics), c.NUM_VALUES)
        if objective.support == "full":
            p_t, log_ratio = (
                from_t.div_(statistics[:, c.SUM_T, None]),
                _log_ratio(logits, statistics),
            )
            # p_s from p_t where the two are close: there their difference counts, not their sizes.
            own = from_s.div_(statistics[:, c.SUM_S, None])
            p_s = (log_ratio.exp().mul_(p_t)).where(log_ratio.abs() < c.CLOSE_LOG_RATIO, own)
            values[:, c.VALUE], slope = dense_divergence(p_s, p_t, log_ratio, objective)
        if objective.support != "full" or with_stats:
            probs = _log_probs(logits, statistics)
            if with_stats:
                _add_entropies(values, probs)
            if objective.support != "full":
                values[:, c.VALUE], slope = restricted_divergence(probs, part, objective)
        result[block] = stats = finish_rows(statistics, values, part, objective, with_stats)
        if tile.grad is not None:
            _write_gradient(tile, block, slope, logits.slope, row_scales(part, stats))
    return result


def row_statistics(tile: Tile, rows: RowTensors, objective: Objective) -> Tensor:
    """[R, 11]; see `RowKernels`."""
    result = tile.student.new_zeros(len(tile.student), c.NUM_STATISTICS, dtype=_wide(tile))
    result[:, c.MAX_T] = result[:, c.MAX_S] = c.MASKED
    for block in row_blocks(tile):
        logits = _scaled(tile, block, rows, objective)
        found, *_ = _statistics(logits, rows.take(block).target_ids, tile.first_column)
        result[block] = found
    return result


def row_values(
    tile: Tile, rows: RowTensors, objective: Objective, statistics: Tensor, with_stats: bool
) -> Tensor:
    """[R, 4]; see `RowKernels`."""
    result = statistics.new_zeros(len(statistics), c.NUM_VALUES)
    for block in row_blocks(tile):
        probs = _log_probs(_scaled(tile, block, rows, objective), statistics[block])
        result[block] = _values(probs, objective, with_stats)
    return result


def row_gradient(
    tile: Tile,
    rows: RowTensors,
    objective: Objective,
    statistics: Tensor,
    values: Tensor,
    row_scale: Tensor,
) -> None:
    """Fills `tile.grad`; see `RowKernels`."""
    assert tile.grad is not None
    for block in row_blocks(tile):
        logits = _scaled(tile, block, rows, objective)
        probs = _log_probs(logits, statistics[block])
        slope = _slope(probs, values[block, c.CENTRE], objective)
        _write_gradient(tile, block, slope, logits.slope, row_scale[block])
    tile.grad[:, tile.num_real :] = 0


def merge_statistics(parts: Tensor) -> Tensor:
    """[R, 11] of all columns from [P, R, 11]; see `RowKernels`.

    All take the shift of the tile that holds most of the teacher's mass: shifts differ from tile to
    tile, and x0 of every tile must be small where it counts.
    """
    result = parts.new_zeros(parts.shape[1:])
    max_t, max_s = parts[..., c.MAX_T].amax(0), parts[..., c.MAX_S].amax(0)
    log_weight = parts[..., c.MAX_T] - max_t
    weight_t, weight_s = log_weight.exp(), (parts[..., c.MAX_S] - max_s).exp()
    mass_t, mass_s = weight_t * parts[..., c.SUM_T], weight_s * parts[..., c.SUM_S]
    shift = parts[..., c.SHIFT].gather(0, mass_t.argmax(0, keepdim=True))
    moved = parts[..., c.SHIFT] - shift  # [P, R]
    # x0 becomes x0 + moved: expm1 of the sum is exp(moved) expm1(x0) + expm1(moved).
    factor = (moved + log_weight).exp()
    near = weight_t * torch.expm1(moved.clamp(-c.CLOSE_LOG_RATIO, c.CLOSE_LOG_RATIO))
    constant = near.where(moved.abs() <= c.CLOSE_LOG_RATIO, factor - weight_t)
    growth = factor * parts[..., c.GROWTH] + constant * parts[..., c.SUM_T]

    result[:, c.MAX_T], result[:, c.MAX_S], result[:, c.SHIFT] = max_t, max_s, shift[0]
    result[:, c.SUM_T], result[:, c.SUM_S] = mass_t.sum(0), mass_s.sum(0)
    result[:, c.GROWTH] = growth.sum(0)
    for column in (c.TARGET_T, c.TARGET_GAP):
        result[:, column] = parts[..., column].sum(0)
    for column, maximum, mass in ((c.TOP_T, c.MAX_T, c.SUM_T), (c.TOP_S, c.MAX_S, c.SUM_S)):
        # Of equal maxima the lower column counts as the first.
        attains = (parts[..., maximum] == result[:, maximum]) & (parts[..., mass] > 0)
        first = parts[..., column].where(attains, torch.inf).amin(0)
        result[:, column] = first.where(attains.any(0), 0.0)
    return result


def finish_rows(
    statistics: Tensor,
    values: Tensor,
    rows: RowTensors,
    objective: Objective,
    with_stats: bool,
) -> Tensor:
    """What whole rows return, [R, 8], from statistics [R, 11] and values [R, 4] of all columns.

    A row whose logits are -inf throughout, on one side or both, is no distribution: NaN, as
    `log_softmax` has it.
    """
    result = statistics.new_zeros(len(statistics), c.NUM_STATS)
    nowhere = (statistics[:, c.MAX_T] <= c.MASKED) | (statistics[:, c.MAX_S] <= c.MASKED)
    result[:, c.DIVERGENCE] = values[:, c.VALUE].masked_fill(nowhere, torch.nan)
    result[:, c.RATIO] = 1.0
    if with_stats:
        result[:, c.ENTROPY_S] = values[:, c.VALUE_ENTROPY_S].clamp(min=0.0)
        result[:, c.ENTROPY_T] = values[:, c.VALUE_ENTROPY_T].clamp(min=0.0)
        result[:, c.TOP1] = (statistics[:, c.TOP_T] == statistics[:, c.TOP_S]).to(result.dtype)
    if rows.target_ids is None:
        return result
    given = rows.target_ids >= 0
    z_t, gap = statistics[:, c.TARGET_T, None], statistics[:, c.TARGET_GAP, None]
    probs = _log_probs(ScaledLogits(z_t, z_t + gap, gap, 1.0), statistics)
    logp_s = probs.student[:, 0].clamp(max=0.0)
    result[:, c.LOGPROB_S] = logp_s.where(given, 0.0)
    result[:, c.LOGPROB_T] = probs.teacher[:, 0].clamp(max=0.0).where(given, 0.0)
    if rows.old_logprobs is not None:
        ratio = (logp_s - rows.old_logprobs).exp()
        if objective.is_clip is not None:
            ratio = ratio.clamp(max=objective.is_clip)
        result[:, c.RATIO] = ratio.where(given, 1.0)
    return result


def row_scales(rows: RowTensors, stats: Tensor) -> Tensor:
    """[R] weight · importance ratio; 0 for a masked row, whose ratio may be anything, and NaN for a
    row without a distribution."""
    scale = (rows.weights * stats[:, c.RATIO]).masked_fill(
        stats[:, c.DIVERGENCE].isnan(), torch.nan
    )
    return scale.where(rows.weights != 0, 0.0)


def row_blocks(tile: Tile) -> Iterator[slice]:
    """Slices of the tile's rows, of about `block_elements` logits each; none without columns."""
    num_rows, columns = len(tile.student), tile.num_real
    size = max(1, block_elements(tile.student.device) // max(1, columns))
    for start in range(0, num_rows if columns else 0, size):
        yield slice(start, min(start + size, num_rows))


def block_elements(device: torch.device) -> int:
    """Logits worked on at once: few enough for the CPU's cache, or for the GPU's memory."""
    return 1 << 18 if device.type == "cpu" else 1 << 22


def _scaled(tile: Tile, block: slice, rows: RowTensors, objective: Objective) -> ScaledLogits:
    """The tile's rows `block` as z; without a teacher its side is the student's."""
    wide, columns = _wide(tile), tile.num_real
    inverse: Tensor | float = 1.0 / objective.temperature
    if rows.temperatures is not None:
        inverse = rows.temperatures[block, None].reciprocal()

    def scaled(raw: Tensor, bias: Tensor | None) -> Tensor:
        raw = raw[block, :columns].to(wide)
        raw = raw if bias is None else raw + bias[:columns]
        return raw if objective.logit_scale == 1.0 else raw * objective.logit_scale

    cap = objective.softcap
    slope: Tensor | float = inverse * objective.logit_scale
    if tile.teacher is None or not tile.is_delta:
        z_s = scaled(tile.student, tile.student_bias)
        if cap:
            slope, z_s = slope * soft_cap_slope(z_s, cap), soft_cap(z_s, cap)
        z_s = (z_s * inverse).clamp_(min=c.MASKED)
        if tile.teacher is None:
            return ScaledLogits(z_s, z_s, None, slope)
        z_t = scaled(tile.teacher, tile.teacher_bias)
        z_t = ((soft_cap(z_t, cap) if cap else z_t) * inverse).clamp_(min=c.MASKED)
        return ScaledLogits(z_t, z_s, None, slope)

    z_t = scaled(tile.teacher, tile.teacher_bias)
    gap = scaled(tile.student, None)
    if tile.absolute_rows is not None:  # these hold raw_s: subtract raw_t, without its bias
        raw_t = scaled(tile.teacher, None)
        gap = torch.addcmul(gap, raw_t, tile.absolute_rows[block, None].to(wide), value=-1.0)
    # A column masked for the teacher is masked for both, whatever the product made of its delta.
    gap = gap.masked_fill(z_t < c.MASKED, 0.0)
    if cap:
        slope = slope * soft_cap_slope(z_t + gap, cap)
        gap, z_t = soft_cap_gap(gap, z_t, cap), soft_cap(z_t, cap)
    gap = gap.mul_(inverse)
    z_t = (z_t * inverse).clamp_(min=c.MASKED)
    return ScaledLogits(z_t, (z_t + gap).clamp_(min=c.MASKED), gap, slope)


def _statistics(
    logits: ScaledLogits, target_ids: Tensor | None, first_column: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, 11] of a block, exp(z_t - MAX_T) and exp(z_s - MAX_S) [B, C]."""
    z_t, z_s, gap, _ = logits
    out = z_t.new_zeros(len(z_t), c.NUM_STATISTICS)
    max_t, top_t = z_t.max(-1)
    max_s, top_s = z_s.max(-1)
    out[:, c.MAX_T], out[:, c.TOP_T] = max_t, top_t + first_column
    out[:, c.MAX_S], out[:, c.TOP_S] = max_s, top_s + first_column
    apart = max_s - max_t
    needed = (apart.abs() > c.NEARBY_MAXIMA) & (max_t > c.MASKED) & (max_s > c.MASKED)
    out[:, c.SHIFT] = shift = apart.where(needed, 0.0)

    x = _shifted_gap(logits, out)
    from_t, from_s = (z_t - max_t[:, None]).exp_(), (z_s - max_s[:, None]).exp_()
    out[:, c.SUM_T], out[:, c.SUM_S] = from_t.sum(-1), from_s.sum(-1)
    # exp(z_t - max_t) expm1(x); far from 0 by way of z_s, where no factor overflows.
    far = from_s.mul((max_s - max_t - shift).exp()[:, None]).sub_(from_t)
    is_close = x.abs() <= c.CLOSE_LOG_RATIO
    close = x.clamp_(-c.CLOSE_LOG_RATIO, c.CLOSE_LOG_RATIO).expm1_().mul_(from_t)
    out[:, c.GROWTH] = torch.where(is_close, close, far).sum(-1)
    if target_ids is not None:
        local = target_ids[:, None] - first_column
        inside = (local >= 0) & (local < z_t.shape[1])
        local = local.clamp(0, z_t.shape[1] - 1)
        at_t = z_t.gather(1, local)
        at_gap = z_s.gather(1, local) - at_t if gap is None else gap.gather(1, local)
        out[:, c.TARGET_T] = at_t.where(inside, 0.0)[:, 0]
        out[:, c.TARGET_GAP] = at_gap.where(inside, 0.0)[:, 0]
    return out, from_t, from_s


def _log_ratio(logits: ScaledLogits, statistics: Tensor) -> Tensor:
    """x of a block of rows, by the statistics [B, 11] of all columns."""
    return _shifted_gap(logits, statistics).sub_(_log_offset(statistics)[:, None])


def _shifted_gap(logits: ScaledLogits, statistics: Tensor) -> Tensor:
    """x0 [B, C] = gap - shift, bounded.

    With heads of their own each side is seen from its maximum first: where the logits are large,
    their difference would be rounded more than what counts in it.
    """
    max_t, max_s = statistics[:, c.MAX_T, None], statistics[:, c.MAX_S, None]
    shift = statistics[:, c.SHIFT, None]
    if logits.gap is not None:
        return bounded(logits.gap - shift)
    below = (logits.student - max_s).sub_(logits.teacher - max_t)
    return bounded(below.add_(max_s - max_t - shift))


def _log_probs(logits: ScaledLogits, statistics: Tensor) -> LogProbs:
    """Of a block of rows, by the statistics [B, 11] of all columns."""
    stats = statistics[:, :, None]
    log_ratio = _log_ratio(logits, statistics)
    logp_t = (logits.teacher - stats[:, c.MAX_T]).sub_(stats[:, c.SUM_T].log())
    logp_s = (logits.student - stats[:, c.MAX_S]).sub_(stats[:, c.SUM_S].log())
    # Close to the teacher's, log p_s keeps delta's precision; beyond, its own sums are as accurate.
    logp_s = (logp_t + log_ratio).where(log_ratio.abs() < c.CLOSE_LOG_RATIO, logp_s)
    return LogProbs(logp_s, logp_t, log_ratio)


def _log_offset(statistics: Tensor) -> Tensor:
    """[R] log sum p_t exp(x0), from the statistics of all columns."""
    growth = statistics[:, c.GROWTH] / statistics[:, c.SUM_T]
    near = growth.abs() < c.NEAR_GROWTH  # False where it overflowed too
    far = statistics[:, c.MAX_S] - statistics[:, c.MAX_T] - statistics[:, c.SHIFT]
    far = far + (statistics[:, c.SUM_S] / statistics[:, c.SUM_T]).log()
    return growth.where(near, 0.0).log1p().where(near, far)


def _values(probs: LogProbs, objective: Objective, with_stats: bool) -> Tensor:
    """[B, 4] of a block."""
    p_s, p_t = probs.student.exp(), probs.teacher.exp()
    out = p_s.new_zeros(len(p_s), c.NUM_VALUES)
    out[:, c.VALUE], out[:, c.CENTRE] = divergence_sums(p_s, p_t, probs.log_ratio, objective)
    if with_stats:
        _add_entropies(out, probs)
    return out


def _add_entropies(values: Tensor, probs: LogProbs) -> None:
    values[:, c.VALUE_ENTROPY_S] = -(probs.student.exp() * probs.student).sum(-1)
    values[:, c.VALUE_ENTROPY_T] = -(probs.teacher.exp() * probs.teacher).sum(-1)


def _slope(probs: LogProbs, centre: Tensor, objective: Objective) -> Tensor:
    """[B, C] gradient of the divergence by z_s."""
    p_s, p_t = probs.student.exp(), probs.teacher.exp()
    return divergence_slope(p_s, p_t, probs.log_ratio, centre, objective)


def _write_gradient(
    tile: Tile, block: slice, slope: Tensor, of_raw: Tensor | float, row_scale: Tensor
) -> None:
    """Rows `block` of the gradient by raw logits: exactly 0 where the row's scale is 0."""
    assert tile.grad is not None
    scale = row_scale[:, None].to(slope.dtype)
    grad = slope.mul_(of_raw * scale).masked_fill_(scale == 0, 0.0)
    tile.grad[block, : tile.num_real] = grad
    tile.grad[block, tile.num_real :] = 0


def _wide(tile: Tile) -> torch.dtype:
    return torch.promote_types(tile.student.dtype, torch.float32)
