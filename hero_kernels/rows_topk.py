"""Divergences over part of the vocabulary: top-k with or without a tail, and the sampled token.

The kept tokens, with the rest of the mass as one more outcome, are themselves a softmax: of the
kept logits and of the logsumexp of the others. So the dense formulas apply to the outcomes, and the
tail's gradient is shared out among its tokens by their probability within the tail.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels.constants import LOG_RATIO_LIMIT, MASKED
from hero_kernels.formulas import dense_divergence
from hero_kernels.objective import Objective
from hero_kernels.types import RowTensors

_SERVER_ROUNDING = 1e-7
"""Log-probabilities from a server are rounded: the tail's mass is known no better than this."""


class LogProbs(NamedTuple):
    """Both distributions of a block; without a teacher's logits its side is the student's."""

    student: Tensor  # [B, C] log p_s
    teacher: Tensor  # [B, C] log p_t
    log_ratio: Tensor  # [B, C] log p_s - log p_t


def restricted_divergence(
    probs: LogProbs, rows: RowTensors, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Divergence [B] and its gradient [B, V] by z_s, for `support="topk"` and `"sampled"`."""
    if objective.support == "sampled":
        assert rows.target_ids is not None
        return _sampled(probs, rows.target_ids)
    return _topk(_with_infinities(probs), rows, objective)


def _with_infinities(probs: LogProbs) -> LogProbs:
    """-inf in place of its finite stand-in, as the sums below expect, and a log ratio of 0 where
    both sides are masked."""
    none_s, none_t = probs.student < MASKED / 2, probs.teacher < MASKED / 2
    return LogProbs(
        probs.student.masked_fill(none_s, -torch.inf),
        probs.teacher.masked_fill(none_t, -torch.inf),
        probs.log_ratio.masked_fill(none_s & none_t, 0.0),
    )


def masked_log_ratio(logp_s: Tensor, logp_t: Tensor) -> Tensor:
    """log p_s - log p_t; 0 where both are -inf, bounded where one side alone is."""
    both = (logp_s == -torch.inf) & (logp_t == -torch.inf)
    return (logp_s - logp_t).masked_fill(both, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _sampled(probs: LogProbs, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """stop_gradient(log p_s(y) - log p_t(y))·log p_s(y): the score-function form of the KL."""
    target = target_ids[:, None].clamp(min=0)
    advantage = probs.log_ratio.gather(1, target)
    d_logits = -advantage * probs.student.exp()
    d_logits.scatter_add_(1, target, advantage)
    return (advantage * probs.student.gather(1, target))[:, 0], d_logits


def _topk(probs: LogProbs, rows: RowTensors, objective: Objective) -> tuple[Tensor, Tensor]:
    """Of the student's or the teacher's largest, or of those that the teacher's server named."""
    if rows.teacher_ids is not None and rows.teacher_logprobs is not None:
        ids, kept_t = rows.teacher_ids, rows.teacher_logprobs.to(probs.student.dtype)
        kept_s = probs.student.gather(1, ids)
        gap = masked_log_ratio(kept_s, kept_t)
        rest_t = -torch.expm1(kept_t.logsumexp(-1, keepdim=True))
        tail_t = rest_t.clamp(min=_SERVER_ROUNDING).log()
        empty_t = rest_t <= _SERVER_ROUNDING
    else:
        assert objective.top_k is not None
        source = probs.student if objective.top_k_source == "student" else probs.teacher
        ids = source.topk(objective.top_k).indices
        kept_s, kept_t = probs.student.gather(1, ids), probs.teacher.gather(1, ids)
        gap = probs.log_ratio.gather(1, ids)
        tail_t = probs.teacher.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        empty_t = tail_t == -torch.inf
    if not objective.top_k_tail:
        return _renormalised(probs.student, ids, kept_s, kept_t, gap, objective)
    rest_s = probs.student.scatter(1, ids, -torch.inf)
    tail_s = rest_s.logsumexp(-1, keepdim=True)
    # Where both tails are empty (the teacher's up to its server's rounding), they hold no mass.
    tail_gap = masked_log_ratio(tail_s, tail_t)
    tail_gap = tail_gap.where((tail_s > -torch.inf) | ~empty_t, 0.0)
    value, d_outcomes = dense_divergence(
        torch.cat([kept_s, tail_s], 1).exp_(),
        torch.cat([kept_t, tail_t], 1).exp_(),
        torch.cat([gap, tail_gap], 1),
        objective,
    )
    return value, _share_out(d_outcomes, ids, rest_s, tail_s)


def _renormalised(
    logp_s: Tensor, ids: Tensor, kept_s: Tensor, kept_t: Tensor, gap: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Divergence between the two distributions restricted to the kept tokens."""
    mass_s, mass_t = kept_s.logsumexp(-1, keepdim=True), kept_t.logsumexp(-1, keepdim=True)
    both_masked = (kept_s == -torch.inf) & (kept_t == -torch.inf)
    gap = (gap - (mass_s - mass_t)).masked_fill(both_masked, 0.0)
    value, d_kept = dense_divergence(
        (kept_s - mass_s).exp_(), (kept_t - mass_t).exp_(), gap, objective
    )
    return value, torch.zeros_like(logp_s).scatter_add_(1, ids, d_kept)


def _share_out(d_outcomes: Tensor, ids: Tensor, rest_s: Tensor, tail_s: Tensor) -> Tensor:
    """Gradient [B, V] by z_s from that of the outcomes [B, k + 1]."""
    within_tail = (rest_s - tail_s.where(tail_s > -torch.inf, 0.0)).exp()
    return (d_outcomes[:, -1:] * within_tail).scatter_add_(1, ids, d_outcomes[:, :-1])
