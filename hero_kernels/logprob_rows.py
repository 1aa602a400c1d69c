"""The log-probability kernels in torch, and with them the definition of their interface.

Two functions, each a single sweep over a chunk of raw logits: `logprob_rows` returns four numbers
for each row, and `logprob_gradient` needs them to form the gradient. The same two exist in C++
(`cpu_logprobs.py`) and in Triton (`triton/logprobs.py`).

With z = cap((raw + bias) · logit_scale) / temperature, cap(z) = softcap · tanh(z / softcap):

    log p_j = z_j - maximum - log_mass      log_mass = log sum exp(z_j - maximum)
    entropy = log_mass - sum p_j (z_j - maximum)
    d(a log p_y + b entropy)/dz_j = a ([j = y] - p_j) - b p_j (log p_j + entropy)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hero_kernels.rows import row_blocks

LOGPROB_STATS = 4
LOGPROB, ENTROPY, MAXIMUM, LOG_MASS = range(LOGPROB_STATS)
"""Columns of the result of `logprob_rows`."""

LOWEST = -1e4
"""Beneath every log-probability that counts: exp is 0 there, and a product with it is 0 too, which
for the -inf of a masked column it would not be."""


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
) -> Tensor:
    """Log-probability of a token and entropy of each row of a chunk of logits.

    Args:
        logits: [R, V] raw logits; fp64, fp32, bf16 or fp16. -inf masks a column.
        target_ids: [R] int64 tokens, -1 for none.
        bias: [V].
        inv_temperature: 1 / temperature.
        softcap: s of s·tanh(z / s), 0 for none.
        logit_scale: multiplies raw + bias.
        vocab_size: columns from here on are padding.
        with_entropy: fill column 1.

    Returns:
        [R, 4] fp32 (fp64 for fp64 logits): log p(target) (0 for none), entropy, the largest z,
        log sum exp(z - largest).
    """
    stats = logits.new_zeros(
        len(logits), LOGPROB_STATS, dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    for rows in row_blocks(logits):
        z, _ = _scaled(
            logits[rows, :vocab_size], bias, inv_temperature, softcap, logit_scale, slope=False
        )
        block, ids = stats[rows], target_ids[rows, None]
        top = z.amax(-1, keepdim=True)
        target = (z.gather(1, ids.clamp(min=0)) - top)[:, 0]
        below = z.sub_(top)
        weights = below.exp()
        mass = weights.sum(-1)
        block[:, MAXIMUM], block[:, LOG_MASS] = top[:, 0], mass.log()
        block[:, LOGPROB] = (target - block[:, LOG_MASS]).where(ids[:, 0] >= 0, 0.0)
        if with_entropy:
            mean = (weights * below.clamp_(min=LOWEST)).sum(-1) / mass
            block[:, ENTROPY] = block[:, LOG_MASS] - mean
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
) -> None:
    """Gradient of a·log p(target) + b·entropy of each row with respect to its raw logits.

    Args:
        logits: [R, V] as given to `logprob_rows`.
        grad: [R, V] receives the gradient, 0 in columns from `vocab_size` on, and in rows whose
            upstream is 0 whatever they hold; `logits` itself to overwrite it.
        stats: [R, 4] as `logprob_rows` returned them; the entropy is needed where b is not 0.
        upstream: [R, 2] in the type of `stats`: a and b; a counts as 0 where there is no target.
        target_ids: as there, and so the rest.
    """
    if grad.shape[1] > vocab_size:
        grad[:, vocab_size:] = 0
    for rows in row_blocks(logits):
        z, slope = _scaled(
            logits[rows, :vocab_size], bias, inv_temperature, softcap, logit_scale, slope=True
        )
        block, ids = stats[rows, :, None], target_ids[rows, None]
        of_logprob, of_entropy = upstream[rows, :1].where(ids >= 0, 0.0), upstream[rows, 1:]
        log_p = z.sub_(block[:, MAXIMUM]).sub_(block[:, LOG_MASS]).clamp_(min=LOWEST)
        d_logits = log_p.exp().mul_(of_logprob + of_entropy * (log_p + block[:, ENTROPY])).neg_()
        d_logits.scatter_add_(1, ids.clamp(min=0), of_logprob)
        d_logits.mul_(slope).masked_fill_((of_logprob == 0) & (of_entropy == 0), 0.0)
        grad[rows, :vocab_size] = d_logits


def _scaled(
    raw: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    *,
    slope: bool,
) -> tuple[Tensor, Tensor | float]:
    """z [R, V], a fresh tensor in fp32 or wider, and dz/d(raw)."""
    z = raw.to(torch.promote_types(raw.dtype, torch.float32), copy=True)
    if bias is not None:
        z.add_(bias[: z.shape[1]])
    factor = inv_temperature * logit_scale
    if not softcap:
        return z.mul_(factor), factor
    z.mul_(logit_scale / softcap)
    of_cap: Tensor | float = factor
    if slope:  # 1 - tanh^2, without cancellation where tanh saturates
        fall = z.abs().mul_(-2).exp_()
        of_cap = 4 * factor * fall / (1 + fall).square_()
    return z.tanh_().mul_(softcap * inv_temperature), of_cap
