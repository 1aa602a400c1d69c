"""The row kernel in torch, and with it the definition of the row-kernel interface.

A row kernel takes a chunk of raw logits, returns eight numbers for each row and writes the gradient
with respect to the raw student logits, which may overwrite the student's chunk. The same function
exists in C++ (`cpu.py`) and in Triton (`triton/rows.py`).

Raw logits become z = cap((raw + bias) · logit_scale) / temperature with cap(z) = softcap · tanh(z /
softcap).

With `delta=True` the student's tensor holds delta = raw_s - raw_t of a shared head (same bias). All
formulas are then written in x = log p_s - log p_t, which comes from delta without a difference of
large numbers, and as sums of non-negative terms p·phi(u), phi(u) = exp(u) - 1 - u; so the
divergence of nearby distributions keeps its relative precision, cannot be negative, and is exactly
0 for delta = 0:

    forward KL   sum p_t phi(x)                                d/dz = p_t expm1(x) = p_s - p_t
    reverse KL   sum p_s phi(-x)                               d/dz = p_s (x - KL)
    JSD          beta sum p_t phi(l) + (1-beta) sum p_s phi(r) d/dz = (1-beta) p_s (-r - K)
                 l = log(m / p_t), r = log(m / p_s), K = KL(p_s | m) = sum p_s phi(r)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

STATS = 8
LOSS, RATIO, STUDENT_LOGPROB, TEACHER_LOGPROB, STUDENT_ENTROPY, TEACHER_ENTROPY, TOP1 = range(7)
"""Columns of the result; the eighth is reserved."""

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Logits worked on at once: few enough for the CPU's cache, or for the GPU's memory."""

_RATIO_LIMIT = 1e4
_EXP_LIMIT = 80.0
"""exp(80) is finite in fp32, and exp(-80) counts nothing in a sum of probabilities."""


class LogProbs(NamedTuple):
    """Both distributions of a block of rows; without logits the teacher equals the student."""

    student: Tensor  # [R, V] log p_s
    teacher: Tensor  # [R, V] log p_t
    log_ratio: Tensor  # [R, V] log p_s - log p_t
    slope: Tensor | float  # d z_s / d raw_s: [R, V], or one number


RowObjective = Callable[[LogProbs, slice], tuple[Tensor, Tensor]]
"""Divergence [R] and gradient with respect to z_s [R, V] of the rows `slice`."""


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
    pointwise_clip: float = 0.0,
) -> Tensor:
    """Divergence of each row of a chunk of logits and its gradient.

    Args:
        student: [R, V] raw logits, or raw_s - raw_t if `delta`; fp64, fp32, bf16 or fp16.
        teacher: [R, V] raw logits.
        grad: [R, V] receives row_weights · ratio · d(divergence)/d(raw student logit), 0 in columns
            from `vocab_size` on; None to skip it, `student` itself to overwrite it.
        delta: what `student` holds. Both biases are then the same tensor.
        divergence: `Divergence.code`.
        beta: weight of the teacher in the JSD's mixture.
        inv_temperature: 1 / temperature.
        softcap: s of s·tanh(z / s), 0 for none.
        logit_scale: multiplies raw + bias.
        student_bias: [V].
        teacher_bias: [V].
        target_ids: [R] int64 tokens whose log-probability is wanted, -1 for none.
        row_weights: [R] fp32; rows of weight 0 get a gradient of 0, whatever they hold.
        old_logprobs: [R] fp32 log-probability of `target_ids` when they were sampled; turns the
            ratio on.
        is_clip: upper bound of the importance ratio exp(log p_s(target) - old), 0 for none.
        vocab_size: columns from here on are padding.
        with_stats: fill columns 4 to 6.
        absolute_rows: [R] bool; with `delta`, rows whose `student` holds raw_s all the same: they
            are too far from the teacher for a 16-bit h_s - h_t (`chunked.difference_operand`).
        pointwise_clip: upper bound of one entry's contribution to the textbook sum, 0 for none;
            where it binds the entry has no gradient. (Only this implementation has it.)

    Returns:
        [R, 8] fp32 (fp64 for fp64 logits): divergence (without weight and ratio), importance ratio
        (1 if off), log p_s(target), log p_t(target), entropy of the student, of the teacher, top-1
        agreement, 0.
    """

    def objective(probs: LogProbs, _: slice) -> tuple[Tensor, Tensor]:
        if pointwise_clip:
            return clipped_divergence(probs, divergence, beta, pointwise_clip)
        return dense_divergence(probs.student, probs.teacher, probs.log_ratio, divergence, beta)

    return map_rows(
        objective,
        student,
        teacher,
        grad,
        delta=delta,
        inv_temperature=inv_temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        target_ids=target_ids,
        row_weights=row_weights,
        old_logprobs=old_logprobs,
        is_clip=is_clip,
        vocab_size=vocab_size,
        with_stats=with_stats,
        absolute_rows=absolute_rows,
    )


def map_rows(
    objective: RowObjective,
    student: Tensor,
    teacher: Tensor | None,
    grad: Tensor | None,
    *,
    delta: bool,
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
) -> Tensor:
    """Apply `objective` block by block: what all supports share. See `divergence_rows`."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    stats = student.new_zeros(student.shape[0], STATS, dtype=dtype)
    stats[:, RATIO] = 1.0
    if grad is not None and grad.shape[1] > vocab_size:
        grad[:, vocab_size:] = 0
    for rows in row_blocks(student):
        block_student = student[rows, :vocab_size]
        if absolute_rows is not None and teacher is not None:
            still_to_subtract = absolute_rows[rows, None].to(dtype)
            block_student = torch.addcmul(
                block_student.to(dtype),
                teacher[rows, :vocab_size].to(dtype),
                still_to_subtract,
                value=-1.0,
            )
        probs = log_probs(
            block_student,
            None if teacher is None else teacher[rows, :vocab_size],
            delta=delta,
            inv_temperature=inv_temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            student_bias=None if student_bias is None else student_bias[:vocab_size],
            teacher_bias=None if teacher_bias is None else teacher_bias[:vocab_size],
        )
        block = stats[rows]
        block[:, LOSS], d_logits = objective(probs, rows)
        scale = row_weights[rows].to(dtype)
        if target_ids is not None:
            ids = target_ids[rows, None]
            for column, logprobs in (
                (STUDENT_LOGPROB, probs.student),
                (TEACHER_LOGPROB, probs.teacher),
            ):
                if column == STUDENT_LOGPROB or teacher is not None:
                    picked = logprobs.gather(1, ids.clamp(min=0)).where(ids >= 0, 0.0)
                    block[:, column] = picked[:, 0]
            if old_logprobs is not None:
                ratio = (block[:, STUDENT_LOGPROB] - old_logprobs[rows]).exp()
                block[:, RATIO] = ratio.clamp(max=is_clip) if is_clip else ratio
                scale = scale * block[:, RATIO]
        if with_stats:
            block[:, STUDENT_ENTROPY] = -(probs.student.exp() * probs.student).sum(-1)
            if teacher is not None:
                block[:, TEACHER_ENTROPY] = -(probs.teacher.exp() * probs.teacher).sum(-1)
                block[:, TOP1] = (probs.student.argmax(-1) == probs.teacher.argmax(-1)).to(dtype)
        if grad is not None:
            d_raw = d_logits * (probs.slope * scale[:, None])
            grad[rows, :vocab_size] = d_raw.masked_fill_(row_weights[rows, None] == 0, 0.0)
    return stats


def row_blocks(chunk: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Slices of the rows of `chunk` [R, V] that hold about `elements` logits each."""
    elements = elements or BLOCK_ELEMENTS.get(chunk.device.type, 1 << 24)
    rows = max(1, elements // max(1, chunk.shape[1]))
    for start in range(0, chunk.shape[0], rows):
        yield slice(start, min(start + rows, chunk.shape[0]))


def log_probs(
    student: Tensor,
    teacher: Tensor | None,
    *,
    delta: bool,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
) -> LogProbs:
    """Log-probabilities of a block [R, V] from its raw logits. See `divergence_rows`."""
    dtype = torch.promote_types(student.dtype, torch.float32)

    def scaled(raw: Tensor, bias: Tensor | None) -> Tensor:
        raw = raw.to(dtype)
        return (raw if bias is None else raw + bias) * logit_scale

    slope: Tensor | float = inv_temperature * logit_scale
    if delta:
        assert teacher is not None
        z_t, gap = scaled(teacher, teacher_bias), scaled(student, None)
        if softcap:
            slope = slope * sech2((z_t + gap) / softcap)
            gap = capped_gap(gap, z_t, softcap)
            z_t = softcap * torch.tanh(z_t / softcap)
        logp_t = torch.log_softmax(z_t * inv_temperature, -1)
        gap = gap * inv_temperature
        top = (logp_t + gap).argmax(-1, keepdim=True)  # seen from there, what counts is small
        z_s = (logp_t - logp_t.gather(1, top)) + (gap - gap.gather(1, top))
        logp_s = torch.log_softmax(z_s, -1)
        growth = (logp_t.exp() * torch.expm1(gap)).sum(-1, keepdim=True)  # sum p_t exp(gap) - 1
        near = growth.abs() < 0.5  # False for overflow (inf, or nan from 0·inf) too
        log_ratio = gap - growth.where(near, 0.0).log1p()
        return LogProbs(
            logp_s, logp_t, log_ratio.where(near, masked_log_ratio(logp_s, logp_t)), slope
        )

    z_s = scaled(student, student_bias)
    if softcap:
        slope = slope * sech2(z_s / softcap)
        z_s = softcap * torch.tanh(z_s / softcap)
    logp_s = torch.log_softmax(z_s * inv_temperature, -1)
    if teacher is None:
        return LogProbs(logp_s, logp_s, logp_s.new_zeros(()).expand_as(logp_s), slope)
    z_t = scaled(teacher, teacher_bias)
    if softcap:
        z_t = softcap * torch.tanh(z_t / softcap)
    logp_t = torch.log_softmax(z_t * inv_temperature, -1)
    return LogProbs(logp_s, logp_t, masked_log_ratio(logp_s, logp_t), slope)


def masked_log_ratio(logp_s: Tensor, logp_t: Tensor) -> Tensor:
    """log p_s - log p_t; 0 in columns masked for both, +-1e4 where one side alone is masked."""
    both = (logp_s == -torch.inf) & (logp_t == -torch.inf)
    return (logp_s - logp_t).masked_fill(both, 0.0).clamp(-_RATIO_LIMIT, _RATIO_LIMIT)


def sech2(a: Tensor) -> Tensor:
    """1 - tanh(a)^2, without cancellation where tanh saturates."""
    decay = torch.exp(-2 * a.abs())
    return 4 * decay / (1 + decay) ** 2


def capped_gap(gap: Tensor, z_t: Tensor, softcap: float) -> Tensor:
    """cap(z_t + gap) - cap(z_t) = s·sinh(gap/s) / (cosh(z_s/s)·cosh(z_t/s)), all exponents <= 0."""
    d, a_t = gap / softcap, (z_t / softcap).abs()
    a_s = (z_t / softcap + d).abs()
    size = d.abs()
    numerator = -torch.expm1(-2 * size) * torch.exp((size - a_s - a_t).clamp(max=0.0))
    return (
        2 * softcap * d.sign() * numerator / ((1 + torch.exp(-2 * a_s)) * (1 + torch.exp(-2 * a_t)))
    )


def dense_divergence(
    logp_s: Tensor, logp_t: Tensor, log_ratio: Tensor, divergence: int, beta: float
) -> tuple[Tensor, Tensor]:
    """Divergence [R] of log-probabilities [R, V] and its gradient [R, V] by z_s."""
    p_s, p_t = logp_s.exp(), logp_t.exp()
    value, centre = divergence_sums(p_s, p_t, log_ratio, divergence, beta)
    return value, divergence_slope(p_s, p_t, log_ratio, centre, divergence, beta)


def divergence_sums(
    p_s: Tensor, p_t: Tensor, log_ratio: Tensor, divergence: int, beta: float
) -> tuple[Tensor, Tensor]:
    """What some columns [R, C] contribute to the divergence [R], and to the centre [R] of its
    gradient: the divergence itself (reverse KL), K (JSD), or nothing (forward KL).
    """
    if divergence == 1:
        value = weighted_phi(p_t, p_s, log_ratio).sum(-1)
        return value, torch.zeros_like(value)
    if divergence == 2:
        value = weighted_phi(p_s, p_t, -log_ratio).sum(-1)
        return value, value
    log_m_t, log_m_s = log_mixture(log_ratio, beta)
    mixture = beta * p_t + (1 - beta) * p_s
    student_part = weighted_phi(p_s, mixture, log_m_s).sum(-1)
    teacher_part = weighted_phi(p_t, mixture, log_m_t).sum(-1)
    return beta * teacher_part + (1 - beta) * student_part, student_part


def divergence_slope(
    p_s: Tensor, p_t: Tensor, log_ratio: Tensor, centre: Tensor, divergence: int, beta: float
) -> Tensor:
    """Gradient [R, C] by z_s, given the centre [R] over all columns; see `divergence_sums`."""
    if divergence == 1:
        small = p_t * torch.expm1(log_ratio.clamp(-1.0, 1.0))
        return torch.where(log_ratio.abs() < 1.0, small, p_s - p_t)
    if divergence == 2:
        return p_s * (log_ratio - centre[:, None])
    _, log_m_s = log_mixture(log_ratio, beta)
    return (1 - beta) * p_s * (-log_m_s - centre[:, None])


def clipped_divergence(
    probs: LogProbs, divergence: int, beta: float, pointwise_clip: float
) -> tuple[Tensor, Tensor]:
    """The same with each entry of the textbook sum, as p_t·(log p_t - log p_s), bounded."""
    p_s, p_t, x = probs.student.exp(), probs.teacher.exp(), probs.log_ratio
    if divergence == 1:
        terms, d_logp = -p_t * x, -p_t
    elif divergence == 2:
        terms, d_logp = p_s * x, p_s * (x + 1)
    else:
        log_m_t, log_m_s = log_mixture(x, beta)
        terms = -beta * p_t * log_m_t - (1 - beta) * p_s * log_m_s
        d_logp = -(1 - beta) * p_s * log_m_s
    d_logp = d_logp.where(terms <= pointwise_clip, 0.0)
    return terms.clamp(max=pointwise_clip).sum(-1), d_logp - p_s * d_logp.sum(-1, keepdim=True)


def log_mixture(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(m / p_t) and log(m / p_s), each with full relative precision near 0."""
    x = x.clamp(-_EXP_LIMIT, _EXP_LIMIT)
    return torch.log1p((1 - beta) * torch.expm1(x)), torch.log1p(beta * torch.expm1(-x))


def weighted_phi(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """p·(exp(u) - 1 - u) >= 0 where q = p·exp(u); near 0, where it would cancel, a series."""
    terms = 13 if u.dtype == torch.float64 else 6
    near = u.clamp(-0.25, 0.25)
    series = torch.full_like(u, 1 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        series = series.mul_(near).add_(1 / math.factorial(k))
    return torch.where(u.abs() < 0.25, p * near * near * series, (q - p) - p * u)
