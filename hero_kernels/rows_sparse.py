"""Row kernels over part of the vocabulary: top-k with or without a tail, and the sampled token
alone.

The kept tokens, with the rest of the mass as one more bucket, are themselves a softmax: of the kept
logits and of the logsumexp of the others. So the dense formulas of `rows.py` apply to the buckets,
and the tail's gradient is shared out among its tokens by their probability within the tail.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hero_kernels.options import Objective, Support, TopKSource
from hero_kernels.rows import LogProbs, RowObjective, dense_divergence, map_rows, masked_log_ratio

_SERVER_ROUNDING = 1e-7
"""Log-probabilities from a server are rounded: the tail's mass is known no better than this."""


def sparse_rows(
    student: Tensor,
    teacher: Tensor | None,
    grad: Tensor | None,
    *,
    objective: Objective,
    teacher_topk: tuple[Tensor, Tensor] | None,
    **row_arguments: Any,
) -> Tensor:
    """`rows.divergence_rows` for `support="topk"` and `"sampled"`.

    Args:
        student: [R, V], see `rows.divergence_rows`.
        teacher: [R, V], or None with `teacher_topk`.
        grad: [R, V] or None.
        objective: the divergence and its support.
        teacher_topk: ids [R, k] int64 and log-probabilities [R, k] of a teacher behind a server.
        row_arguments: as for `rows.map_rows`.

    Returns:
        [R, 8] as `rows.divergence_rows`; the statistics are those of the whole vocabulary.
    """
    compute: RowObjective
    if objective.support == Support.SAMPLED:
        compute = partial(_sampled, target_ids=row_arguments["target_ids"])
    elif teacher_topk is not None:
        compute = partial(_topk_of_server, objective=objective, teacher_topk=teacher_topk)
    else:
        compute = partial(_topk, objective=objective)
    return map_rows(compute, student, teacher, grad, **row_arguments)


def _sampled(probs: LogProbs, rows: slice, *, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """stop_gradient(log p_s(y) - log p_t(y))·log p_s(y): the score-function form of the KL."""
    target = target_ids[rows, None].clamp(min=0)
    advantage = probs.log_ratio.gather(1, target)
    d_logits = -advantage * probs.student.exp()
    d_logits.scatter_add_(1, target, advantage)
    return (advantage * probs.student.gather(1, target))[:, 0], d_logits


def _topk(probs: LogProbs, _: slice, *, objective: Objective) -> tuple[Tensor, Tensor]:
    k = objective.top_k
    if objective.top_k_source == TopKSource.UNION:
        of_student, of_teacher = probs.student.topk(k).indices, probs.teacher.topk(k).indices
        repeated = (of_teacher[:, :, None] == of_student[:, None, :]).any(-1)
        ids = torch.cat([of_student, of_teacher], 1)
        dropped = torch.cat([torch.zeros_like(repeated), repeated], 1)
    else:
        source = probs.student if objective.top_k_source == TopKSource.STUDENT else probs.teacher
        ids = source.topk(k).indices
        dropped = torch.zeros_like(ids, dtype=torch.bool)

    kept_s = probs.student.gather(1, ids).where(~dropped, -torch.inf)
    kept_t = probs.teacher.gather(1, ids).where(~dropped, -torch.inf)
    gap = probs.log_ratio.gather(1, ids).where(~dropped, 0.0)
    if not objective.top_k_tail:
        return _renormalised(probs.student, ids, kept_s, kept_t, gap, objective)
    rest_s = probs.student.scatter(1, ids, -torch.inf)
    tail_s = rest_s.logsumexp(-1, keepdim=True)
    tail_t = probs.teacher.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    tail_gap = masked_log_ratio(tail_s, tail_t)  # 0 for an empty tail, which holds no mass
    value, d_buckets = dense_divergence(
        torch.cat([kept_s, tail_s], 1),
        torch.cat([kept_t, tail_t], 1),
        torch.cat([gap, tail_gap], 1),
        objective.divergence,
        objective.beta,
    )
    return value, _share_out(d_buckets, ids, rest_s, tail_s)


def _topk_of_server(
    probs: LogProbs, rows: slice, *, objective: Objective, teacher_topk: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    ids, kept_t = teacher_topk[0][rows], teacher_topk[1][rows].to(probs.student.dtype)
    kept_s = probs.student.gather(1, ids)
    if not objective.top_k_tail:
        gap = masked_log_ratio(kept_s, kept_t)
        return _renormalised(probs.student, ids, kept_s, kept_t, gap, objective)
    rest_s = probs.student.scatter(1, ids, -torch.inf)
    tail_s = rest_s.logsumexp(-1, keepdim=True)
    rest_t = -torch.expm1(kept_t.logsumexp(-1, keepdim=True))
    tail_t = rest_t.clamp(min=_SERVER_ROUNDING).log()
    bucket_s, bucket_t = torch.cat([kept_s, tail_s], 1), torch.cat([kept_t, tail_t], 1)
    # An empty tail of the student is one of the teacher too, up to the server's rounding.
    tail_gap = masked_log_ratio(tail_s, tail_t)
    tail_gap = tail_gap.where((tail_s > -torch.inf) | (rest_t > _SERVER_ROUNDING), 0.0)
    gap = torch.cat([masked_log_ratio(kept_s, kept_t), tail_gap], 1)
    value, d_buckets = dense_divergence(
        bucket_s, bucket_t, gap, objective.divergence, objective.beta
    )
    return value, _share_out(d_buckets, ids, rest_s, tail_s)


def _renormalised(
    logp_s: Tensor, ids: Tensor, kept_s: Tensor, kept_t: Tensor, gap: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Divergence between the two distributions restricted to the kept tokens."""
    mass_s, mass_t = kept_s.logsumexp(-1, keepdim=True), kept_t.logsumexp(-1, keepdim=True)
    both_masked = (kept_s == -torch.inf) & (kept_t == -torch.inf)
    gap = (gap - (mass_s - mass_t)).masked_fill(both_masked, 0.0)
    value, d_kept = dense_divergence(
        kept_s - mass_s, kept_t - mass_t, gap, objective.divergence, objective.beta
    )
    return value, torch.zeros_like(logp_s).scatter_add_(1, ids, d_kept)


def _share_out(d_buckets: Tensor, ids: Tensor, rest_s: Tensor, tail_s: Tensor) -> Tensor:
    """Gradient [R, V] of the logits from that of the buckets [R, k + 1]."""
    within_tail = (rest_s - tail_s.where(tail_s > -torch.inf, 0.0)).exp()
    return (d_buckets[:, -1:] * within_tail).scatter_add_(1, ids, d_buckets[:, :-1])
