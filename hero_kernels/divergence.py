"""The divergence of every row and its gradients: what the loop over tiles is asked to do for it.

    whole rows   one call of `divergence_rows` for each row tile, gradient included
    split rows   statistics of the column tiles are merged, values added, then gradients follow: the
                 logits are made three times, 8 head GEMMs in all. Gradients are formed in the
                 backward pass, by the statistics and values kept from the forward pass, so nothing
                 of the head's size exists beside dW, each part of which is written once.
    shards       with a process group the columns of a row lie on several ranks: steps as for split
                 rows, statistics gathered and merged, values gathered and added.

A value could be had from the statistics alone, but only as a difference that loses relative
precision where teacher and student are close: hence two passes before the gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from hero_kernels import backends, gemm
from hero_kernels import constants as c
from hero_kernels import rows as torch_rows
from hero_kernels.call import Call
from hero_kernels.memory import SAVED, Layout, Shape, layout
from hero_kernels.objective import Objective
from hero_kernels.tiles import (
    Sides,
    Tiles,
    walk,
    with_adjacent_columns,
)
from hero_kernels.types import Gradients, Head, Result, RowTensors, Tile
from hero_kernels.vocab_parallel import Shards


def divergence(
    student: Head,
    teacher: Head | None,
    rows: RowTensors,
    objective: Objective,
    call: Call,
    saved: Tensor | None = None,
) -> Result:
    """The loss of every row, its statistics, and the gradients of the sum of the losses.

    Args:
        student: N rows; the head, or this rank's shard of it.
        teacher: the same rows; with the student's weight tensor itself if the head is shared; None
            for a teacher given by its top-k.
        rows: of the same rows.
        objective: what to compute.
        call: how.
        saved: `Result.saved` of an earlier call for the same rows, whatever their weights were.
    """
    num_rows, on_cpu = student.hidden.shape[0], student.hidden.device.type == "cpu"
    kept, overflow = active_rows(rows.weights, call.max_active_rows)
    if kept is not None:
        rows = rows.take(kept)
        student = student._replace(hidden=student.hidden[kept])
        teacher = None if teacher is None else teacher._replace(hidden=teacher.hidden[kept])
        saved = None if saved is None else saved[kept]
    scaled, scale = rows, None
    if student.hidden.dtype == torch.float16:
        # Unclipped importance ratios have no bound; fp16 leaves them a factor of 255.
        slope = max(objective.is_clip or 1.0, 1.0) * objective.logit_scale
        by = objective.temperature if rows.temperatures is None else rows.temperatures
        scale = power_of_two_scale(rows.weights / by, slope)
        scaled = rows._replace(weights=rows.weights * scale)
    shards, place = Shards(), (0, call.vocab_size)
    if call.group:
        shards = Shards.named(call.group)
        place = shards.place(student.weight.shape[0], call.vocab_size)
    shared = teacher is not None and teacher.weight is student.weight
    # On CPU all rows that are left are active.
    active = None if on_cpu else rows.weights != 0
    sides = Sides(student, teacher, active, *place, shared)
    with without_autocast(student.hidden.device.type):
        stats, grads, sums = _walked(sides, scaled, objective, call, shards, saved)
    if overflow is not None:
        stats = stats.masked_fill(overflow, torch.nan)
    if active is not None:
        stats = stats.masked_fill(~active[:, None], 0.0)
        sums = None if sums is None else sums.masked_fill(~active[:, None], 0.0)
    losses = rows.weights * stats[:, c.RATIO] * stats[:, c.DIVERGENCE]
    if scale is not None:
        grads = Gradients(*(None if grad is None else grad.div_(scale) for grad in grads))
    if kept is not None:
        losses, stats = spread(losses, kept, num_rows), spread(stats, kept, num_rows)
        sums = None if sums is None else spread(sums, kept, num_rows)
        if grads.hidden is not None:
            grads = grads._replace(hidden=spread(grads.hidden, kept, num_rows))
    return Result(losses, stats, grads, sums)


def _walked(
    sides: Sides,
    rows: RowTensors,
    objective: Objective,
    call: Call,
    shards: Shards,
    saved: Tensor | None,
) -> tuple[Tensor, Gradients, Tensor | None]:
    """Statistics [N, 8], gradients, and [N, 15] sums of split rows."""
    hidden = sides.student.hidden
    on_cpu = hidden.device.type == "cpu"
    if on_cpu and gemm.takes_16_bit(hidden.device, hidden.dtype):
        sides = with_adjacent_columns(sides)
    plan = _layout(sides, call)
    kernels = backends.row_kernels(call.impl)
    parts = _cut(rows, plan)
    if not call.tile_columns and shards.size == 1:
        work = WholeRows(kernels, parts, objective, call.with_stats)
        stats, grads = walk(sides, work, call, plan, shards)
        return stats, grads, None
    split = SplitRows(kernels, parts, objective, call.with_stats, shards, saved, plan)
    stats, grads = walk(sides, split, call, plan, shards)
    return stats, grads, split.sums()


def _layout(sides: Sides, call: Call) -> Layout:
    hidden = sides.student.hidden
    sizes = [hidden.shape[1]]
    if sides.teacher is not None:
        sizes.append(sides.teacher.hidden.shape[1])
    shape = Shape(
        len(hidden), max(sizes), sides.columns, hidden.dtype, str(hidden.device),
        sides.shared, call.need_hidden, call.need_weight, call.need_bias,
    )  # fmt: skip
    return layout(shape, call.tile_rows, call.tile_columns)


def _cut(rows: RowTensors, plan: Layout) -> list[RowTensors]:
    """The tensors of the rows of each row tile."""
    if len(plan.sizes) <= 1:
        return [rows]
    none = [None] * len(plan.sizes)
    cut = [none if tensor is None else tensor.split(plan.sizes) for tensor in rows]
    return [RowTensors(*tensors) for tensors in zip(*cut, strict=True)]


def active_rows(row_weights: Tensor, bound: int) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the rows to compute (None for all), and whether there are more than `bound` (None
    if known).

    On CUDA the number of active rows is not known to the host: there a bound gives the size of the
    result, and the count is compared on the device.

    Args:
        row_weights: [N]; 0 masks a row.
        bound: 0 for none.

    Raises:
        ValueError: more rows are active than `bound`, on CPU.
    """
    if not row_weights.is_cuda:
        if not bound and bool(row_weights.all()):
            return None, None
        kept = row_weights.nonzero()[:, 0]
        if bound and len(kept) > bound:
            raise ValueError(
                f"{len(kept)} rows have a non-zero weight, more than max_active_rows={bound}: "
                "raise the bound or leave it None."
            )
        return (None if len(kept) == len(row_weights) else kept), None
    if not bound or bound >= len(row_weights):
        return None, None
    active = row_weights != 0
    first = torch.argsort(active, descending=True, stable=True)[:bound]
    return first.sort().values, active.sum() > bound


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Products take the types that they are given."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def spread(values: Tensor, kept: Tensor | None, num_rows: int) -> Tensor:
    """[num_rows, ...] with `values` at the rows `kept` and 0 elsewhere."""
    if kept is None:
        return values
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, kept, values)


def power_of_two_scale(row_scales: Tensor, slope: float = 1.0) -> Tensor:
    """[] factor for the rows of an fp16 gradient tile, so that small probabilities do not vanish.

    Args:
        row_scales: [N, ...] what the rows of the tile are multiplied by.
        slope: bound of what else multiplies the tile.
    """
    if row_scales.numel() == 0:
        return row_scales.new_ones(())
    peak = row_scales.abs().max() * max(slope, 1.0)
    factor = torch.exp2(8.0 - torch.ceil(torch.log2(peak)))
    return torch.where(torch.isfinite(factor), factor, 1.0)


class WholeRows:
    """Rows whose logits fit one tile: the row kernel does all of it."""

    num_stats = c.NUM_STATS

    def __init__(
        self, kernels: ModuleType, parts: list[RowTensors], objective: Objective, with_stats: bool
    ) -> None:
        self.kernels, self.parts = kernels, parts
        self.objective, self.with_stats = objective, with_stats

    def of_rows(self, tiles: Tiles, i: int) -> Tensor:
        (tile,) = tiles
        stats: Tensor = self.kernels.divergence_rows(
            tile, self.parts[i], self.objective, self.with_stats
        )
        return stats

    def gradient(self, tile: Tile, i: int) -> None:
        """Done by `of_rows`."""


class SplitRows:
    """Rows whose columns are seen tile by tile, here or on several ranks."""

    num_stats = c.NUM_STATS

    def __init__(
        self,
        kernels: ModuleType,
        parts: list[RowTensors],
        objective: Objective,
        with_stats: bool,
        shards: Shards,
        saved: Tensor | None,
        plan: Layout,
    ) -> None:
        self.kernels, self.parts, self.objective = kernels, parts, objective
        self.with_stats, self.shards = with_stats, shards
        self.saved = [None] * len(parts) if saved is None else list(saved.split(plan.sizes))
        self.scales: list[Tensor] = []

    def of_rows(self, tiles: Tiles, i: int) -> Tensor:
        rows, objective, saved = self.parts[i], self.objective, self.saved[i]
        if saved is None:
            merged = self._statistics(tiles, rows)
            total: Tensor | None = None
            for tile in tiles:
                values = self._kernels(tile).row_values(
                    tile, rows, objective, merged, self.with_stats
                )
                total = values if total is None else total.add_(values)
            assert total is not None
            saved = self.saved[i] = torch.cat([merged, self.shards.total(total)], 1)
        stats = torch_rows.finish_rows(*_parted(saved), rows, objective, self.with_stats)
        self.scales.append(torch_rows.row_scales(rows, stats))
        return stats

    def _statistics(self, tiles: Tiles, rows: RowTensors) -> Tensor:
        """[R, 11] of all columns, of all ranks; tiles are merged as they come."""
        merged: Tensor | None = None
        for tile in tiles:
            part = self._kernels(tile).row_statistics(tile, rows, self.objective)
            if merged is not None:
                part = self.kernels.merge_statistics(torch.stack([merged, part]))
            merged = part
        assert merged is not None  # a shard of padding is one empty tile
        gathered = self.shards.gathered(merged)
        return merged if gathered is None else self.kernels.merge_statistics(gathered)

    def gradient(self, tile: Tile, i: int) -> None:
        saved = self.saved[i]
        assert saved is not None
        self._kernels(tile).row_gradient(
            tile, self.parts[i], self.objective, *_parted(saved), self.scales[i]
        )

    def sums(self) -> Tensor:
        """[N, 15] statistics and values of all columns."""
        found = [part for part in self.saved if part is not None]
        return torch.cat(found) if found else self.parts[0].weights.new_zeros(0, SAVED)

    def _kernels(self, tile: Tile) -> ModuleType:
        """Those in torch for an empty tile: compiled ones take no empty matrix."""
        return self.kernels if tile.num_real else torch_rows


def _parted(saved: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [R, 11] and values [R, 4], as kernels want them."""
    return (
        saved[:, : c.NUM_STATISTICS].contiguous(),
        saved[:, c.NUM_STATISTICS :].contiguous(),
    )
