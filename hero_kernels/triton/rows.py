"""The row kernels in Triton; what each returns is said in `types.RowKernels`.

    row_statistics    one sweep: maxima, normalisers, sum p_t expm1(x), mean log ratio
    row_values        one sweep: the divergence, its centre, entropies
    row_gradient      one sweep: the gradient
    divergence_rows   all of them: three sweeps for the JSD, whose gradient needs its centre first,
                      two for the KLs, whose gradient needs the statistics alone

A program walks through one row, or through a piece of it where there are few rows; pieces are
merged like tiles. Sums are kept for each lane and combined once at the end of a sweep, so nothing
depends on timing, and no sweep synchronises before its end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hero_kernels.constants import JSD, MASKED, MAX_S, MAX_T, NUM_STATISTICS, NUM_VALUES
from hero_kernels.objective import Objective
from hero_kernels.rows import finish_rows, row_scales
from hero_kernels.triton.configs import ROWS, STATISTICS, RowConfig, row_config
from hero_kernels.triton.row_kernels import divergence_kernel, statistics_kernel
from hero_kernels.triton.statistics import merge_statistics
from hero_kernels.types import RowTensors, Tile

__all__ = [
    "available",
    "divergence_rows",
    "merge_statistics",
    "row_gradient",
    "row_statistics",
    "row_values",
]

_PROGRAMS = 1024
"""Rows are split into pieces until there are about this many programs, enough for any device; a
constant, so that the order of summation depends on shapes alone."""
_PIECE = 8192
"""Least number of columns of a piece."""


def available() -> str | None:
    """None if the kernels can run, else the reason why not."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the Triton row kernels need compute capability 8.0 or newer"
    return None


def divergence_rows(tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool) -> Tensor:
    """[R, 8]."""
    statistics = row_statistics(tile, rows, objective)
    if tile.grad is not None and objective.code != JSD:
        nothing = statistics.new_zeros(len(statistics), NUM_VALUES)
        scale = row_scales(rows, finish_rows(statistics, nothing, rows, objective, False))
        values = _sweep(tile, rows, objective, statistics, None, scale, with_stats)
        return finish_rows(statistics, values, rows, objective, with_stats)
    values = row_values(tile, rows, objective, statistics, with_stats)
    stats = finish_rows(statistics, values, rows, objective, with_stats)
    if tile.grad is not None:
        row_gradient(tile, rows, objective, statistics, values, row_scales(rows, stats))
    return stats


def row_statistics(tile: Tile, rows: RowTensors, objective: Objective) -> Tensor:
    """[R, 11]."""
    launch = _Launch(tile, rows, objective, STATISTICS)
    if launch.is_empty:
        nothing = tile.student.new_zeros(launch.rows, NUM_STATISTICS, dtype=torch.float32)
        nothing[:, MAX_T] = nothing[:, MAX_S] = MASKED
        return nothing
    parts = launch.new_parts(NUM_STATISTICS)
    launch(
        statistics_kernel,
        target_ids_ptr=rows.target_ids,
        parts_ptr=parts,
        first_column=tile.first_column,
    )
    # Also a single part: its shift comes from the first block, not from the maxima.
    return merge_statistics(parts)


def row_values(
    tile: Tile, rows: RowTensors, objective: Objective, statistics: Tensor, with_stats: bool
) -> Tensor:
    """[R, 4]."""
    return _sweep(tile, rows, objective, statistics, None, None, with_stats)


def row_gradient(
    tile: Tile,
    rows: RowTensors,
    objective: Objective,
    statistics: Tensor,
    values: Tensor,
    row_scale: Tensor,
) -> None:
    """Fills `tile.grad`."""
    _sweep(tile, rows, objective, statistics, values, row_scale, False)


def _sweep(
    tile: Tile,
    rows: RowTensors,
    objective: Objective,
    statistics: Tensor,
    values: Tensor | None,
    row_scale: Tensor | None,
    with_stats: bool,
) -> Tensor:
    """The sweep after the statistics: values unless they are given, and the gradient if there is a
    `row_scale`. Returns the values."""
    launch = _Launch(tile, rows, objective, ROWS)
    if launch.is_empty:
        return statistics.new_zeros(launch.rows, NUM_VALUES) if values is None else values
    parts = launch.new_parts(NUM_VALUES) if values is None else values[None]
    grad = None if row_scale is None else tile.grad
    launch(
        divergence_kernel,
        statistics_ptr=statistics,
        values_ptr=parts,
        row_scale_ptr=row_scale,
        grad_ptr=grad,
        stride_gr=0 if grad is None else grad.stride(0),
        beta=objective.beta,
        other_beta=1.0 - objective.beta,  # here, in double: of a rounded beta it would be 0
        DIVERGENCE=objective.code,
        WITH_VALUES=values is None,
        WITH_STATS=with_stats,
    )
    return parts[0] if len(parts) == 1 else parts.sum(0)


class _Launch:
    """What the launches have in common."""

    def __init__(
        self, tile: Tile, rows: RowTensors, objective: Objective, table: dict[int, RowConfig]
    ) -> None:
        assert tile.teacher is not None
        self.tile, self.config = tile, row_config(tile.student.device, table)
        self.rows, columns = tile.student.shape
        self.is_empty = tile.student.numel() == 0
        self.parts, piece = pieces(self.rows, columns, self.config.block_v)
        self.arguments: tuple[Any, ...] = (
            tile.student,
            tile.teacher,
            tile.student_bias,
            tile.teacher_bias,
            tile.absolute_rows,
            rows.temperatures,
            self.rows,
            columns,
            tile.num_real,
            piece,
            tile.student.stride(0),
            tile.teacher.stride(0),
            1.0 / objective.temperature,
            objective.softcap,
            objective.logit_scale,
        )

    def new_parts(self, width: int) -> Tensor:
        """[P, R, width]."""
        shape = (self.parts, self.rows, width)
        return self.tile.student.new_empty(shape, dtype=torch.float32)

    def __call__(self, kernel: Any, **arguments: Any) -> None:
        with torch.cuda.device_of(self.tile.student):
            kernel[self.rows, self.parts](
                *self.arguments,
                **arguments,
                DELTA=self.tile.is_delta,
                BLOCK_V=self.config.block_v,
                num_warps=self.config.num_warps,
            )


def pieces(rows: int, columns: int, block_v: int) -> tuple[int, int]:
    """Into how many pieces a row is cut, and their columns: a multiple of `block_v`."""
    wanted = max(1, min(_PROGRAMS // max(1, rows), columns // _PIECE))
    blocks = triton.cdiv(triton.cdiv(max(1, columns), block_v), wanted)
    return triton.cdiv(columns, blocks * block_v), blocks * block_v
