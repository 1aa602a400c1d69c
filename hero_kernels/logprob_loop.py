"""The log-probability of every row: the chunk loop with a log-probability kernel.

The forward pass is one head GEMM and one sweep over the logits, and keeps four numbers for each
row; the fused design does without the sweep, and without logits in memory. The backward pass forms
the logits again, turns each into its gradient with those numbers (one sweep, no sum over the row),
and multiplies: three GEMMs, or two where the head is frozen. Keeping the logits, or their gradient,
would save one of them at the price of N·V numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hero_kernels import backends, fused, gemm
from hero_kernels.chunked import (
    Gradients,
    Head,
    LogitChunk,
    active_rows,
    cleared,
    power_of_two_scale,
    run_chunks,
    spread,
)
from hero_kernels.layout import Plan, chunk_sizes
from hero_kernels.logprob_rows import LOGPROB_STATS
from hero_kernels.options import Design
from hero_kernels.scaled_logits import Scaling


class Tokens(NamedTuple):
    """What the kernels are told of each of N rows."""

    target_ids: Tensor  # [N] int64
    mask: Tensor  # [N] bool; other rows may hold anything

    def take(self, index: Tensor | None) -> Tokens:
        """Some of the rows; None for all."""
        return self if index is None else Tokens(self.target_ids[index], self.mask[index])


class Transform(NamedTuple):
    """How raw logits become z; as in `options.Objective`."""

    temperature: float
    softcap: float
    logit_scale: float
    vocab_size: int

    def arguments(self, chunk: LogitChunk, target_ids: Tensor) -> dict[str, Any]:
        """What both kernels are called with."""
        return {
            "target_ids": target_ids[chunk.rows],
            "bias": chunk.student_bias,
            "inv_temperature": 1.0 / self.temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "vocab_size": self.vocab_size,
        }


def forward(head: Head, tokens: Tokens, transform: Transform, plan: Plan) -> Tensor:
    """[N, 4] as `logprob_rows.logprob_rows` writes them; 0 for masked rows, NaN if there are more
    rows than `plan.max_active_rows` where that cannot be raised. `plan.with_stats`: entropies too.
    """
    num_rows = len(head.hidden)
    kept, overflow = active_rows(tokens.mask, plan.max_active_rows)
    tokens = tokens.take(kept)
    head = head if kept is None else head._replace(hidden=head.hidden[kept])
    with torch.autocast(head.hidden.device.type, enabled=False):
        loop = _fused_forward if plan.design == Design.FUSED else _chunked_forward
        stats = loop(head, tokens, transform, plan)
    stats = stats.masked_fill(~tokens.mask[:, None], 0.0)
    if overflow is not None:
        stats = stats.masked_fill(overflow, torch.nan)
    return spread(stats, kept, num_rows)


def _chunked_forward(head: Head, tokens: Tokens, transform: Transform, plan: Plan) -> Tensor:
    kernels = backends.logprob_kernels(backends.resolve_logprobs(plan.impl, head.hidden))
    target_ids = tokens.target_ids.where(tokens.mask, -1)

    def row_kernel(chunk: LogitChunk) -> Tensor:
        stats: Tensor = kernels.logprob_rows(
            chunk.student,
            with_entropy=plan.with_stats,
            **transform.arguments(chunk, target_ids),
        )
        return stats

    stats, _ = run_chunks(
        head, None, tokens.mask, transform.vocab_size, row_kernel, plan, LOGPROB_STATS
    )
    return stats


def _fused_forward(head: Head, tokens: Tokens, transform: Transform, plan: Plan) -> Tensor:
    """The same without logits in memory: the GEMM's epilogue sums up its rows."""
    vocab = transform.vocab_size
    bias = None if head.bias is None else head.bias[:vocab].float()
    weight = gemm.rows_of(head.weight[:vocab])
    scaling = Scaling(
        1.0 / transform.temperature, transform.softcap, transform.logit_scale, bias, None
    )
    target_ids = tokens.target_ids.where(tokens.mask, -1)
    stats = head.hidden.new_zeros(len(head.hidden), LOGPROB_STATS, dtype=torch.float32)
    start = 0
    for size in chunk_sizes(len(head.hidden), plan.chunk_size):
        rows = slice(start, start + size)
        start += size
        hidden = gemm.rows_of(cleared(head.hidden[rows], tokens.mask[rows]))
        stats[rows] = fused.logprob_stats(
            hidden, weight, scaling, target_ids[rows].contiguous(), vocab, plan.with_stats
        )
    return stats


def backward(
    head: Head,
    tokens: Tokens,
    stats: Tensor,
    upstream: Tensor,
    transform: Transform,
    plan: Plan,
) -> Gradients:
    """Gradients of sum(upstream · (log-probability, entropy)).

    Rows whose upstream gradient is 0 (clipped by PPO, say) cost what masked rows cost: nothing
    where they can be dropped.

    Args:
        head: N rows.
        tokens: of the same rows.
        stats: [N, 4], result of `forward`.
        upstream: [N, 2] in the type of `stats`.
        transform: as for `forward`.
        plan: which gradients, and how.
    """
    if not plan.need_grad:
        return Gradients(None, None, None)
    kernels = backends.logprob_kernels(backends.resolve_logprobs(plan.impl, head.hidden))
    num_rows = len(head.hidden)
    live = tokens.mask & (upstream != 0).any(1)
    kept, _ = active_rows(live, plan.max_active_rows)
    tokens = Tokens(tokens.target_ids, live).take(kept)
    if kept is not None:
        head = head._replace(hidden=head.hidden[kept])
        stats, upstream = stats[kept], upstream[kept]
    target_ids = tokens.target_ids.where(tokens.mask, -1)
    upstream = upstream.masked_fill(~tokens.mask[:, None], 0.0)
    scale = power_of_two_scale(upstream, head.hidden.dtype)
    scaled = upstream * scale

    def row_kernel(chunk: LogitChunk) -> Tensor:
        kernels.logprob_gradient(
            chunk.student,
            chunk.grad,
            stats[chunk.rows],
            scaled[chunk.rows],
            **transform.arguments(chunk, target_ids),
        )
        return stats[chunk.rows]

    with torch.autocast(head.hidden.device.type, enabled=False):
        _, grads = run_chunks(
            head, None, tokens.mask, transform.vocab_size, row_kernel, plan, LOGPROB_STATS
        )
    if head.hidden.dtype == torch.float16:
        grads = grads.unscaled(scale)
    if grads.hidden is not None:
        grads = grads._replace(hidden=spread(grads.hidden, kept, num_rows))
    return grads
