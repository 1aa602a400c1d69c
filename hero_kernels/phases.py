"""A row kernel in three phases, for rows whose columns are seen in pieces: the phases in torch.

Pieces are slices of the vocabulary (`sliced.py`) or the shards of a tensor-parallel group
(`vocab_parallel.py`). `triton/phases.py` has the same functions. What they compute is defined in
`rows.py`; here with x = log p_s - log p_t from sums over all columns:

    statistics   of the columns of one piece; `merge_statistics` joins pieces
    values       what a piece contributes to the divergence, by the joined statistics; pieces add up
    gradient     of a piece, by the joined statistics and values

With r a shift of the row that keeps small what is subtracted, and x0 = clamp(gap - r), gap = z_s -
z_t (from delta where there is one): x = x0 - offset, offset = log sum p_t exp(x0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hero_kernels import rows
from hero_kernels.rows import divergence_slope, divergence_sums, row_blocks
from hero_kernels.scaled_logits import MASKED, ScaledLogits, Scaling, scaled_logits

NUM_STATISTICS = 12
(
    MAX_T,  # max of z_t; MASKED without columns
    SUM_T,  # sum exp(z_t - MAX_T)
    MAX_S,
    SUM_S,
    SHIFT,  # r
    GROWTH,  # sum exp(z_t - MAX_T) expm1(x0)
    MEAN,  # sum exp(z_s - MAX_S) x0
    TARGET_T,  # z_t at the target, 0 where it lies elsewhere: pieces add up
    TARGET_GAP,  # gap at the target, likewise
    TOP_T,  # first column that attains MAX_T, as a float: exact below 2^24
    TOP_S,
    ENERGY,  # sum exp(z_s - MAX_S) (z_s - MAX_S) of kernels that see one side alone; here 0
) = range(NUM_STATISTICS)
"""Columns of the statistics [R, 12]. Logits are z: all scaling applied."""

NUM_VALUES = 4
DIVERGENCE, CENTRE, ENTROPY_S, ENTROPY_T = range(NUM_VALUES)
"""Columns of the values [R, 4]; CENTRE as in `rows.divergence_sums`."""

LOG_RATIO_LIMIT = 1e4
"""|x0| where only one side is masked."""

SCRATCH_TENSORS = 16
"""Bound on the temporaries of one block, in blocks of the wide type."""

_NEARBY_MAXIMA = 0.25
"""Maxima closer than this need no shift: sum p_t expm1(gap) stays below 1/2 without it."""
_CLOSE = 1.0
"""|x| below which log p_s = log p_t + x; above, the student's own sums are at least as accurate."""


def row_statistics(
    student: Tensor,
    teacher: Tensor,
    *,
    delta: bool,
    scaling: Scaling,
    target_ids: Tensor | None = None,
    first_column: int = 0,
    vocab_size: int,
) -> Tensor:
    """Statistics of some columns of each row.

    Args:
        student: [R, C] raw logits of columns `first_column` on, or raw_s - raw_t if `delta`.
        teacher: [R, C] raw logits.
        delta: what `student` holds.
        scaling: of these columns.
        target_ids: [R] int64 over the whole vocabulary, -1 for none.
        first_column: place of the first column in the vocabulary.
        vocab_size: columns of the whole vocabulary; from here on they are padding.

    Returns:
        [R, 12] fp32 (fp64 for fp64 logits).
    """
    columns = _real_columns(student, first_column, vocab_size)
    result = student.new_zeros(len(student), NUM_STATISTICS, dtype=_wide(student))
    result[:, MAX_T] = result[:, MAX_S] = MASKED
    for block in row_blocks(student, block_elements(student.device)) if columns else ():
        logits = scaled_logits(student, teacher, block, columns, delta, scaling)
        out, z_t, z_s = result[block], logits.teacher, logits.student
        out[:, MAX_T], out[:, MAX_S] = max_t, max_s = z_t.amax(-1), z_s.amax(-1)
        out[:, TOP_T] = z_t.argmax(-1) + first_column
        out[:, TOP_S] = z_s.argmax(-1) + first_column
        apart = max_s - max_t
        needed = (apart.abs() > _NEARBY_MAXIMA) & (max_t > MASKED) & (max_s > MASKED)
        out[:, SHIFT] = shift = apart.where(needed, 0.0)

        x = _clamped(logits.gap - shift[:, None])
        from_t, from_s = (z_t - max_t[:, None]).exp(), (z_s - max_s[:, None]).exp()
        out[:, SUM_T], out[:, SUM_S] = from_t.sum(-1), from_s.sum(-1)
        out[:, MEAN] = (from_s * x).sum(-1)
        # exp(z_t - max) expm1(x); far from 0 by way of z_s, where no factor overflows.
        far = (z_s - (max_t + shift)[:, None]).exp() - from_t
        near = from_t * torch.expm1(x.clamp(-1.0, 1.0))
        out[:, GROWTH] = near.where(x.abs() <= 1.0, far).sum(-1)
        if target_ids is not None:
            local = target_ids[block, None] - first_column
            inside = (local >= 0) & (local < columns)
            local = local.clamp(0, columns - 1)
            for column, values in ((TARGET_T, z_t), (TARGET_GAP, logits.gap)):
                out[:, column] = values.gather(1, local).where(inside, 0.0)[:, 0]
    return result


def merge_statistics(parts: Tensor) -> Tensor:
    """Statistics [R, 12] of all columns from those of P disjoint pieces, [P, R, 12].

    All take the shift of the piece that holds most of the teacher's mass. Of equal maxima the lower
    column counts as the first.
    """
    result = parts.new_zeros(parts.shape[1:])
    max_t, max_s = parts[..., MAX_T].amax(0), parts[..., MAX_S].amax(0)
    log_weight = parts[..., MAX_T] - max_t
    weight_t, weight_s = log_weight.exp(), (parts[..., MAX_S] - max_s).exp()
    mass_t, mass_s = weight_t * parts[..., SUM_T], weight_s * parts[..., SUM_S]
    shift = parts[..., SHIFT].gather(0, mass_t.argmax(0, keepdim=True))
    moved = parts[..., SHIFT] - shift  # [P, R]
    # x0 becomes x0 + moved: expm1 of the sum is exp(moved) expm1(x0) + expm1(moved).
    factor = (moved + log_weight).exp()
    near = weight_t * torch.expm1(moved.clamp(-1.0, 1.0))
    constant = near.where(moved.abs() <= 1.0, factor - weight_t)
    growth = factor * parts[..., GROWTH] + constant * parts[..., SUM_T]
    mean = weight_s * (parts[..., MEAN] + moved * parts[..., SUM_S])

    result[:, MAX_T], result[:, MAX_S], result[:, SHIFT] = max_t, max_s, shift[0]
    result[:, SUM_T], result[:, SUM_S] = mass_t.sum(0), mass_s.sum(0)
    result[:, GROWTH], result[:, MEAN] = growth.sum(0), mean.sum(0)
    for column in (TARGET_T, TARGET_GAP):
        result[:, column] = parts[..., column].sum(0)
    for column, maximum, mass in ((TOP_T, MAX_T, SUM_T), (TOP_S, MAX_S, SUM_S)):
        attains = (parts[..., maximum] == result[:, maximum]) & (parts[..., mass] > 0)
        first = parts[..., column].where(attains, torch.inf).amin(0)
        result[:, column] = first.where(attains.any(0), 0.0)
    return result


def log_offset(statistics: Tensor) -> Tensor:
    """[R] log sum p_t exp(x0), from merged statistics: what x0 exceeds x = log p_s - log p_t by."""
    growth = statistics[:, GROWTH] / statistics[:, SUM_T]
    near = growth.abs() < 0.5  # False where it overflowed too
    far = statistics[:, MAX_S] - statistics[:, MAX_T] - statistics[:, SHIFT]
    far = far + (statistics[:, SUM_S] / statistics[:, SUM_T]).log()
    return growth.where(near, 0.0).log1p().where(near, far)


def row_values(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    *,
    delta: bool,
    scaling: Scaling,
    divergence: int,
    beta: float,
    with_stats: bool,
    first_column: int = 0,
    vocab_size: int,
) -> Tensor:
    """What some columns contribute to the divergence and the entropies of each row.

    Args:
        student: as for `row_statistics`; so are the other arguments that are not named here.
        teacher: as there.
        statistics: [R, 12] merged, of all columns.
        delta: as there.
        scaling: as there.
        divergence: `Divergence.code`.
        beta: weight of the teacher in the JSD's mixture.
        with_stats: fill the entropies.
        first_column: as there.
        vocab_size: as there.

    Returns:
        [R, 4] fp32 (fp64 for fp64 logits); those of all pieces add up.
    """
    columns = _real_columns(student, first_column, vocab_size)
    result = student.new_zeros(len(student), NUM_VALUES, dtype=_wide(student))
    for block in row_blocks(student, block_elements(student.device)) if columns else ():
        logits = scaled_logits(student, teacher, block, columns, delta, scaling)
        probs = _log_probs(logits, statistics[block])
        p_s, p_t = probs.student.exp(), probs.teacher.exp()
        out = result[block]
        sums = divergence_sums(p_s, p_t, probs.log_ratio, divergence, beta)
        out[:, DIVERGENCE], out[:, CENTRE] = sums
        if with_stats:
            out[:, ENTROPY_S] = -(p_s * probs.student).sum(-1)
            out[:, ENTROPY_T] = -(p_t * probs.teacher).sum(-1)
    return result


def row_gradient(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor,
    statistics: Tensor,
    values: Tensor,
    row_scale: Tensor,
    *,
    delta: bool,
    scaling: Scaling,
    divergence: int,
    beta: float,
    first_column: int = 0,
    vocab_size: int,
) -> None:
    """Gradient of row_scale · divergence with respect to some of the raw student logits.

    Args:
        student: as for `row_statistics`; so are the other arguments that are not named here.
        teacher: as there.
        grad: [R, C] is written, 0 in padding and in rows whose scale is 0, whatever they hold; may
            be `student` or `teacher` itself.
        statistics: [R, 12] merged, of all columns.
        values: [R, 4] summed over all columns; only CENTRE is read.
        row_scale: [R].
        delta: as there.
        scaling: as there.
        divergence: `Divergence.code`.
        beta: weight of the teacher in the JSD's mixture.
        first_column: as there.
        vocab_size: as there.
    """
    columns = _real_columns(student, first_column, vocab_size)
    for block in row_blocks(student, block_elements(student.device)) if columns else ():
        logits = scaled_logits(student, teacher, block, columns, delta, scaling)
        probs = _log_probs(logits, statistics[block])
        slope = divergence_slope(
            probs.student.exp(),
            probs.teacher.exp(),
            probs.log_ratio,
            values[block, CENTRE],
            divergence,
            beta,
        )
        scale = row_scale[block, None].to(slope.dtype)
        grad[block, :columns] = (slope * (probs.slope * scale)).where(scale != 0, 0.0)
    grad[:, columns:] = 0


def finish(
    statistics: Tensor,
    values: Tensor,
    target_ids: Tensor | None,
    old_logprobs: Tensor | None,
    is_clip: float,
) -> Tensor:
    """What `rows.divergence_rows(with_stats=True)` returns, [R, 8], from the sums of all columns.

    Args:
        statistics: [R, 12] merged.
        values: [R, 4] summed; the ratio needs none of them.
        target_ids: [R] int64, -1 for none.
        old_logprobs: [R] turns the importance ratio on.
        is_clip: its upper bound, 0 for none.
    """
    result = statistics.new_zeros(len(statistics), rows.STATS)
    result[:, rows.LOSS] = values[:, DIVERGENCE]
    result[:, rows.RATIO] = 1.0
    result[:, rows.STUDENT_ENTROPY] = values[:, ENTROPY_S]
    result[:, rows.TEACHER_ENTROPY] = values[:, ENTROPY_T]
    result[:, rows.TOP1] = (statistics[:, TOP_T] == statistics[:, TOP_S]).to(result.dtype)
    if target_ids is None:
        return result
    given = target_ids >= 0
    at_target = ScaledLogits(
        statistics[:, TARGET_T, None],
        (statistics[:, TARGET_T] + statistics[:, TARGET_GAP])[:, None],
        statistics[:, TARGET_GAP, None],
        1.0,
    )
    probs = _log_probs(at_target, statistics)
    logp_s = probs.student[:, 0]
    result[:, rows.STUDENT_LOGPROB] = logp_s.where(given, 0.0)
    result[:, rows.TEACHER_LOGPROB] = probs.teacher[:, 0].where(given, 0.0)
    if old_logprobs is not None:
        ratio = (logp_s - old_logprobs).exp()
        ratio = ratio.clamp(max=is_clip) if is_clip else ratio
        result[:, rows.RATIO] = ratio.where(given, 1.0)
    return result


def _log_probs(logits: ScaledLogits, statistics: Tensor) -> rows.LogProbs:
    """Of a block of rows, by its merged statistics [R, 12]."""
    stats = statistics[:, :, None]
    log_ratio = _clamped(logits.gap - stats[:, SHIFT]) - log_offset(statistics)[:, None]
    logp_t = (logits.teacher - stats[:, MAX_T]) - stats[:, SUM_T].log()
    logp_s = (logits.student - stats[:, MAX_S]) - stats[:, SUM_S].log()
    logp_s = (logp_t + log_ratio).where(log_ratio.abs() < _CLOSE, logp_s)
    return rows.LogProbs(logp_s, logp_t, log_ratio, logits.slope)


def _clamped(x: Tensor) -> Tensor:
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def block_elements(device: torch.device) -> int:
    """Logits worked on at once: fewer than in `rows`, as slices are chosen for their low memory."""
    return 1 << 18 if device.type == "cpu" else 1 << 20


def _real_columns(chunk: Tensor, first_column: int, vocab_size: int) -> int:
    return min(max(vocab_size - first_column, 0), chunk.shape[1])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
