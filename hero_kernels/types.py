"""The nouns of the loop: heads, rows, tiles, gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hero_kernels.objective import Objective


class Head(NamedTuple):
    """Hidden states and the head that turns them into logits."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class RowTensors(NamedTuple):
    """What a row kernel is told of each of N rows."""

    weights: Tensor  # [N] fp32, or fp64; 0 masks the row
    target_ids: Tensor | None = None  # [N] int64 in the whole vocabulary, -1 for none
    old_logprobs: Tensor | None = None  # [N] like `weights`; turns the importance ratio on
    temperatures: Tensor | None = None  # [N] like `weights`; in place of the objective's
    teacher_ids: Tensor | None = None  # [N, k] int64; of a teacher given by its top-k
    teacher_logprobs: Tensor | None = None  # [N, k]

    def take(self, index: Tensor | slice) -> RowTensors:
        """The same for some of the rows."""
        return RowTensors(*(None if tensor is None else tensor[index] for tensor in self))  # type: ignore[arg-type]


class Tile(NamedTuple):
    """Logits of R rows and C columns, as a row kernel is given them.

    Raw logits become z = cap((raw + bias) · logit_scale) / temperature, cap(z) = s·tanh(z / s).
    """

    student: Tensor  # [R, C] raw logits, or raw_s - raw_t if `is_delta`
    teacher: Tensor | None  # [R, C] raw logits; None for a teacher given by its top-k
    grad: Tensor | None = None  # [R, C] to be filled; may be `student` itself
    is_delta: bool = False  # the head is shared, and so is its bias
    student_bias: Tensor | None = None  # [C] fp32 (fp64)
    teacher_bias: Tensor | None = None  # [C]
    absolute_rows: Tensor | None = None  # [R] bool: rows that hold raw_s although `is_delta`
    first_column: int = 0  # place of column 0 in the whole vocabulary
    num_real: int = 0  # columns from here on are padding: ignored, with a gradient of 0


class Gradients(NamedTuple):
    """With respect to the student's tensors, of type `GRADIENT_DTYPE`; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Result(NamedTuple):
    """What the loop returns for N rows."""

    losses: Tensor  # [N] row weight · importance ratio · divergence
    stats: Tensor  # [N, 8] as row kernels write them; 0 for rows of zero weight
    gradients: Gradients
    saved: (
        Tensor | None
    )  # [N, 15] statistics and values, for a backward pass that makes logits anew


class RowKernels(Protocol):
    """The row kernels of one implementation; a module. Rows of weight 0 may hold anything.

    `divergence_rows` sees whole rows. The other four see tiles of some columns: statistics of tiles
    are merged, values are added, gradients follow. What they compute is written in `formulas.py`,
    the columns of their results in `constants.py`. All results are fp32 (fp64 for fp64 logits).
    """

    def divergence_rows(
        self, tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool
    ) -> Tensor:
        """[R, 8] of whole rows; fills `tile.grad`, if there is one, with weight · ratio ·
        d(divergence) / d(raw student logit). `with_stats`: columns 4 to 6 too."""
        ...

    def row_statistics(self, tile: Tile, rows: RowTensors, objective: Objective) -> Tensor:
        """[R, 11] of the tile's columns."""
        ...

    def merge_statistics(self, parts: Tensor) -> Tensor:
        """[R, 11] of all columns from [P, R, 11] of P disjoint tiles, in the order of columns."""
        ...

    def row_values(
        self,
        tile: Tile,
        rows: RowTensors,
        objective: Objective,
        statistics: Tensor,
        with_stats: bool,
    ) -> Tensor:
        """[R, 4] that the tile's columns contribute, by the merged statistics [R, 11]."""
        ...

    def row_gradient(
        self,
        tile: Tile,
        rows: RowTensors,
        objective: Objective,
        statistics: Tensor,
        values: Tensor,
        row_scale: Tensor,
    ) -> None:
        """Fill `tile.grad` with row_scale [R] · d(divergence) / d(raw student logit); 0 in padding
        and in rows of scale 0. `values` [R, 4] are those of all columns."""
        ...


GRADIENT_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""dtype of gradients kept until backward, by that of the tensor: fp16 would overflow."""
