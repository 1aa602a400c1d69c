"""The formulas of the row kernels, in torch; C++, CUDA and Triton compute the same.

With x = log p_s - log p_t, which for a shared head comes from (h_s - h_t)·Wᵀ without a difference
of large numbers, and phi(u) = exp(u) - 1 - u, every divergence is a sum of non-negative terms
p·phi(u). So the divergence of nearby distributions keeps its relative precision, cannot be
negative, and is exactly 0 for equal logits:

    forward KL   sum p_t phi(x)                                d/dz = p_t expm1(x) = p_s - p_t
    reverse KL   sum p_s phi(-x)                               d/dz = p_s (x - KL)
    JSD          beta sum p_t phi(l) + (1-beta) sum p_s phi(r) d/dz = (1-beta) p_s (-r - K)
                 l = log(m / p_t), r = log(m / p_s), K = KL(p_s | m) = sum p_s phi(r)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hero_kernels.constants import (
    CLOSE_LOG_RATIO,
    FORWARD_KL,
    JSD,
    LOG_RATIO_LIMIT,
    MASKED,
    REVERSE_KL,
)
from hero_kernels.objective import Objective

_EXP_LIMIT = {torch.float32: 80.0, torch.float64: 700.0}
"""exp of it is finite, and exp of its negative counts nothing in a sum of probabilities."""
_SERIES_LIMIT = 0.25
"""|u| up to which phi(u) is summed as a series."""


def divergence_sums(
    p_s: Tensor, p_t: Tensor, log_ratio: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """What some columns [R, C] add to the divergence [R] and to the centre [R] of its gradient: the
    divergence itself (reverse KL), K (JSD), or nothing (forward KL).
    """
    if objective.code == FORWARD_KL:
        value = weighted_phi(p_t, p_s, log_ratio).sum(-1)
        return value, torch.zeros_like(value)
    if objective.code == REVERSE_KL:
        value = weighted_phi(p_s, p_t, -log_ratio).sum(-1)
        return value, value
    return _jsd_sums(p_s, p_t, log_mixture(log_ratio, objective.beta), objective.beta)


def _jsd_sums(
    p_s: Tensor, p_t: Tensor, log_m: tuple[Tensor, Tensor], beta: float
) -> tuple[Tensor, Tensor]:
    """The JSD's share and K's, from log(m / p_t) and log(m / p_s).

    K is summed from the same logarithms as the gradient's bracket, so that for a confident student
    the two cancel as they do in exact numbers.
    """
    mixture = (beta * p_t).add_(p_s, alpha=1 - beta)
    student_part = weighted_phi(p_s, mixture, log_m[1]).sum(-1)
    teacher_part = weighted_phi(p_t, mixture, log_m[0]).sum(-1)
    return beta * teacher_part + (1 - beta) * student_part, -(p_s * log_m[1]).sum(-1)


def divergence_slope(
    p_s: Tensor, p_t: Tensor, log_ratio: Tensor, centre: Tensor, objective: Objective
) -> Tensor:
    """Gradient [R, C] by z_s, given the centre [R] over all columns; see `divergence_sums`."""
    if objective.code == FORWARD_KL:
        close = p_t * torch.expm1(log_ratio.clamp(-CLOSE_LOG_RATIO, CLOSE_LOG_RATIO))
        return torch.where(log_ratio.abs() < CLOSE_LOG_RATIO, close, p_s - p_t)
    if objective.code == REVERSE_KL:
        return p_s * (log_ratio - centre[:, None])
    _, log_m_s = log_mixture(log_ratio, objective.beta)
    return (objective.beta - 1) * p_s * (log_m_s + centre[:, None])


def dense_divergence(
    p_s: Tensor, p_t: Tensor, log_ratio: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Divergence [R] of distributions [R, C] over all outcomes, and its gradient [R, C] by z_s."""
    if objective.code == JSD:
        log_m = log_mixture(log_ratio, objective.beta)
        value, centre = _jsd_sums(p_s, p_t, log_m, objective.beta)
        bracket = log_m[1].add_(centre[:, None])
        return value, bracket.mul_(p_s).mul_(objective.beta - 1)
    value, centre = divergence_sums(p_s, p_t, log_ratio, objective)
    return value, divergence_slope(p_s, p_t, log_ratio, centre, objective)


def log_mixture(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(m / p_t) and log(m / p_s), each with full relative precision near 0.

    Far from it they are formed from the side that gives most of the mixture, so that the argument
    of the logarithm stays away from 0: log(m / p_s) = log(1-beta) + log1p(exp(-x) beta / (1-beta)).
    """
    from_student_side = x > math.log(beta / (1 - beta))
    limit = _EXP_LIMIT[x.dtype]
    bounded_x = x.clamp(-limit, limit)
    close = bounded_x.abs() < CLOSE_LOG_RATIO
    near_s = torch.expm1(-bounded_x).mul_(beta).log1p_()
    near_t = torch.expm1(bounded_x).mul_(1 - beta).log1p_()
    # Where (1-beta) p_s is the larger part: log(1-beta) + log1p(exp(-x) beta / (1-beta)).
    of_s = (-bounded_x + math.log(beta / (1 - beta))).exp_().log1p_().add_(math.log1p(-beta))
    of_t = (bounded_x + math.log((1 - beta) / beta)).exp_().log1p_().add_(math.log(beta))
    log_s = torch.where(from_student_side, of_s, of_t - x)
    log_t = torch.where(from_student_side, of_s + x, of_t)
    return near_t.where(close, log_t), near_s.where(close, log_s)


def weighted_phi(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """p·phi(u) >= 0 where q = p·exp(u); near 0, where it would cancel, by a series."""
    terms = 13 if u.dtype == torch.float64 else 6
    near = u.clamp(-_SERIES_LIMIT, _SERIES_LIMIT)
    series = torch.full_like(u, 1 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        series = series.mul_(near).add_(1 / math.factorial(k))
    series.mul_(near).mul_(near).mul_(p)
    return torch.where(u.abs() < _SERIES_LIMIT, series, (q - p).addcmul_(p, u, value=-1.0))


def bounded(log_ratio: Tensor) -> Tensor:
    """The log ratio, overwritten, with a bound where one side alone is masked; in fp32 everywhere,
    which no row notices whose ratios stay below exp(1e4)."""
    if log_ratio.dtype == torch.float32:
        return log_ratio.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    masked = log_ratio.abs() > -MASKED / 2
    return log_ratio.where(~masked, log_ratio.sign() * LOG_RATIO_LIMIT)


def soft_cap(z: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(z / cap)


def soft_cap_slope(z: Tensor, cap: float) -> Tensor:
    """d soft_cap / dz = 1 - tanh², without cancellation where tanh saturates."""
    decay = torch.exp(-2 * (z / cap).abs())
    return 4 * decay / (1 + decay) ** 2


def soft_cap_gap(gap: Tensor, z_t: Tensor, cap: float) -> Tensor:
    """cap(z_t + gap) - cap(z_t) = s·sinh(gap/s) / (cosh(z_s/s)·cosh(z_t/s)), all exponents <= 0."""
    d, a_t = gap / cap, (z_t / cap).abs()
    a_s = (z_t / cap + d).abs()
    size = d.abs()
    numerator = -torch.expm1(-2 * size) * torch.exp((size - a_s - a_t).clamp(max=0.0))
    both = (1 + torch.exp(-2 * a_s)) * (1 + torch.exp(-2 * a_t))
    return 2 * cap * d.sign() * numerator / both
