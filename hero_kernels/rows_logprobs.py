"""The log-probability kernels in torch; the same two functions exist in Triton.

Each is a single sweep over a tile of whole rows: `logprob_rows` returns four numbers for each row,
and `logprob_gradient` needs no others. With z as in `types.Tile`:

    log p_j = z_j - maximum - log_mass      log_mass = log sum exp(z_j - maximum)
    entropy = log_mass - sum p_j (z_j - maximum)
    d(a log p_y + b entropy)/dz_j = a ([j = y] - p_j) - b p_j (log p_j + entropy)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hero_kernels.constants import ENTROPY, LOG_MASS, LOGPROB, MAXIMUM, NUM_LOGPROB_STATS
from hero_kernels.formulas import soft_cap_slope
from hero_kernels.objective import Objective
from hero_kernels.rows import row_blocks
from hero_kernels.types import Tile

_LOWEST = -1e4
"""Beneath every log-probability that counts: exp is 0 there, and a product with it is 0 too, which
for the -inf of a masked column it would not be."""


def logprob_rows(
    tile: Tile, target_ids: Tensor, objective: Objective, with_entropy: bool
) -> Tensor:
    """Log-probability of a token and entropy of each row.

    Args:
        tile: its `student` holds R rows of raw logits, of any floating-point type.
        target_ids: [R] int64 tokens, -1 for none.
        objective: scaling of the logits.
        with_entropy: fill column 1.

    Returns:
        [R, 4] fp32 (fp64 for fp64 logits), columns as in `constants`; log p is 0 without a target.
    """
    wide = torch.promote_types(tile.student.dtype, torch.float32)
    stats = tile.student.new_zeros(len(tile.student), NUM_LOGPROB_STATS, dtype=wide)
    for rows in row_blocks(tile):
        z, _ = _scaled(tile, rows, objective, with_slope=False)
        block, ids = stats[rows], target_ids[rows, None]
        top = z.amax(-1, keepdim=True)
        target = (z.gather(1, ids.clamp(min=0)) - top)[:, 0]
        below = z.sub_(top)
        weights = below.exp()
        mass = weights.sum(-1)
        block[:, MAXIMUM], block[:, LOG_MASS] = top[:, 0], mass.log()
        logprob = (target - block[:, LOG_MASS]).clamp(max=0.0)
        block[:, LOGPROB] = logprob.where(ids[:, 0] >= 0, 0.0)
        if with_entropy:
            mean = (weights * below.clamp_(min=_LOWEST)).sum(-1) / mass
            block[:, ENTROPY] = (block[:, LOG_MASS] - mean).clamp(min=0.0)
    return stats


def logprob_gradient(
    tile: Tile, target_ids: Tensor, objective: Objective, stats: Tensor, upstream: Tensor
) -> None:
    """Fill `tile.grad` with the gradient of a·log p(target) + b·entropy by raw logits.

    Args:
        tile: as for `logprob_rows`; the gradient is 0 in padding, and in rows whose upstream is 0
            whatever they hold.
        target_ids: as there.
        objective: as there.
        stats: [R, 4] as returned there; the entropy is needed where b is not 0.
        upstream: [R, 2] in the type of `stats`: a and b; a counts as 0 where there is no target.
    """
    assert tile.grad is not None
    tile.grad[:, tile.num_real :] = 0
    for rows in row_blocks(tile):
        z, slope = _scaled(tile, rows, objective, with_slope=True)
        block, ids = stats[rows, :, None], target_ids[rows, None]
        of_logprob, of_entropy = upstream[rows, :1].where(ids >= 0, 0.0), upstream[rows, 1:]
        log_p = z.sub_(block[:, MAXIMUM]).sub_(block[:, LOG_MASS]).clamp_(min=_LOWEST)
        d_logits = log_p.exp().mul_(of_logprob + of_entropy * (log_p + block[:, ENTROPY])).neg_()
        d_logits.scatter_add_(1, ids.clamp(min=0), of_logprob)
        d_logits.mul_(slope).masked_fill_((of_logprob == 0) & (of_entropy == 0), 0.0)
        tile.grad[rows, : tile.num_real] = d_logits


def _scaled(
    tile: Tile, rows: slice, objective: Objective, with_slope: bool
) -> tuple[Tensor, Tensor | float]:
    """z of some rows, a fresh tensor in fp32 or wider, and dz/d(raw)."""
    raw = tile.student[rows, : tile.num_real]
    z = raw.to(torch.promote_types(raw.dtype, torch.float32), copy=True)
    if tile.student_bias is not None:
        z.add_(tile.student_bias[: tile.num_real])
    factor = objective.logit_scale / objective.temperature
    if not objective.softcap:
        return z.mul_(factor), factor
    z.mul_(objective.logit_scale)
    slope = factor * soft_cap_slope(z, objective.softcap) if with_slope else factor
    return z.div_(objective.softcap).tanh_().mul_(objective.softcap / objective.temperature), slope
