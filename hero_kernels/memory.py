"""How a call is cut into tiles, in which types it holds them, and the largest tile for a budget."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch

from hero_kernels import constants, gemm, rows
from hero_kernels.types import GRADIENT_DTYPE

SAVED = constants.NUM_STATISTICS + constants.NUM_VALUES
"""Numbers of each row that split rows keep from the forward pass for the backward pass."""

_CPU_ROWS = 256
"""They keep a product busy, and two tiles of logits in fp32 stay below 512 bytes a column."""
_CUDA_LOGITS = 3 << 30
"""Bytes of fp32 logits of both sides: dX of fewer rows has too few tiles to fill the device."""
_CUDA_ROWS = (256, 8192)
_LEAST_ROWS = 16
"""A budget that only holds fewer whole rows is met by splitting the vocabulary instead."""
_ALIGNMENT = 128
"""Column tiles are a multiple of it: whole tiles of the products, aligned rows of the buffers."""


class Shape(NamedTuple):
    """What decides about tiles and memory."""

    num_rows: int
    hidden_size: int
    """H, the larger one where teacher and student differ."""
    vocab_size: int
    """Columns of the head, or of this rank's shard."""
    dtype: torch.dtype
    device: str
    shared_head: bool
    need_hidden: bool
    need_weight: bool
    need_bias: bool

    @property
    def need_grad(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias

    @property
    def on_cpu(self) -> bool:
        return self.device.startswith("cpu")

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


class Layout(NamedTuple):
    """How a call is cut into tiles, and what it holds them in."""

    sizes: tuple[int, ...]
    """Rows of each row tile."""
    columns: int
    """Columns of a column tile; all of them where rows are kept whole."""
    groups: tuple[int, ...]
    """Number of row tiles whose gradients are held together, for one product that forms dW."""
    held: int
    """Rows of the gradient's buffer; 0 where the gradient takes the place of the logits."""
    gradient: torch.dtype
    """Of the logits' gradient: 16-bit, the type of the products' operands, where such a product has
    wide results (`gemm.takes_16_bit`), else fp32."""
    weight_sum: torch.dtype
    """In which dW is summed."""
    in_place: bool
    """Whether the gradient takes the place of the student's logits."""
    wide: torch.dtype
    """fp32, or fp64: of logits, statistics and sums. Logits are never 16-bit: the difference of
    student and teacher counts."""
    need_grad: bool


@lru_cache(maxsize=256)
def layout(shape: Shape, tile_rows: int, tile_columns: int) -> Layout:
    """The layout of a call; 0 means all rows, or all columns.

    A sum over row tiles is kept in fp32: 4·V·H bytes that every product for dW reads and writes.
    Where the gradients of all rows are held instead, 2·N·V bytes in 16 bits, one product sums in
    its registers. Up to twice as many rows as H that takes no more memory than the sum; on CPU,
    where traffic costs more than memory, twice that is allowed. Split rows hold nothing.
    """
    sizes = _equal_parts(shape.num_rows, tile_rows or max(1, shape.num_rows))
    longest = max(sizes, default=0)
    columns = min(tile_columns or shape.vocab_size, shape.vocab_size)
    gradient = shape.wide
    if gemm.takes_16_bit(torch.device(shape.device), shape.dtype):
        gradient = shape.dtype
    in_place = gradient == shape.wide
    groups, held = (1,) * len(sizes), 0
    if tile_columns:
        held = 0 if in_place or not shape.need_grad else longest
    elif shape.need_grad and not in_place:
        limit = shape.hidden_size * (4 if shape.on_cpu else 2) if shape.need_weight else 0
        groups = _equal_parts(len(sizes), max(1, limit // max(1, longest)))
        tiles = iter(sizes)
        held = max((sum(islice(tiles, group)) for group in groups), default=0)
    # fp16 has not the range for a sum of scaled rows.
    products = len(sizes) if tile_columns else len(groups)
    weight_sum = GRADIENT_DTYPE[gradient] if products <= 1 else shape.wide
    return Layout(
        sizes, columns, groups, held, gradient, weight_sum, in_place, shape.wide, shape.need_grad,
    )  # fmt: skip


def _equal_parts(total: int, largest: int) -> tuple[int, ...]:
    """`total` as a sum of as few numbers as possible, none above `largest`, that differ by 1: no
    product of a handful of rows at the end."""
    count = -(-total // largest)
    return tuple(total * (i + 1) // count - total * i // count for i in range(count))


def workspace(shape: Shape, tile_rows: int, tile_columns: int, in_torch: bool = True) -> int:
    """Bytes that a call takes beyond inputs and gradients, at most.

    Args:
        shape: of the call.
        tile_rows: rows of a row tile, 0 for all.
        tile_columns: columns of a column tile, 0 for all.
        in_torch: whether the row kernels are those in torch, which need temporaries.
    """
    plan = layout(shape, tile_rows, tile_columns)
    longest, wide, narrow = max(plan.sizes, default=0), shape.wide.itemsize, shape.dtype.itemsize
    spacing = 127 if shape.on_cpu else 0  # columns by which rows are spaced, at most
    elements = longest * 2 * wide + plan.held * plan.gradient.itemsize
    total = elements * (plan.columns + spacing)
    total += longest * shape.hidden_size * 2 * wide  # operands, or what a product packs of them
    if shape.need_weight and plan.weight_sum.itemsize > narrow:
        total += shape.vocab_size * shape.hidden_size * plan.weight_sum.itemsize
    if in_torch:
        blocks = rows.SCRATCH_TENSORS * rows.block_elements(torch.device(shape.device))
        total += min(blocks, rows.SCRATCH_TENSORS * longest * plan.columns) * wide
    if tile_columns:
        total += shape.num_rows * (shape.hidden_size * wide + 8 * SAVED * wide)  # sum of dX, sums
    if shape.on_cpu:
        # Rows that count, gathered from both sides; dX in parts, and these joined.
        joined = 0 if tile_columns else 2 * GRADIENT_DTYPE[shape.dtype].itemsize - narrow
        total += shape.num_rows * shape.hidden_size * (2 * narrow + joined)
        if narrow < wide:  # a part of the head or of dW, widened
            part = plan.columns if tile_columns else min(plan.columns, gemm.PART_ROWS)
            total += shape.hidden_size * part * wide
    return total


def default_rows(device: str, vocab_size: int) -> int:
    """Rows of logits held at once if nothing is said."""
    if not device.startswith("cuda"):
        return _CPU_ROWS
    fitting = _CUDA_LOGITS // (8 * max(1, vocab_size)) // 256 * 256
    return max(_CUDA_ROWS[0], min(_CUDA_ROWS[1], fitting))


def tile_for(
    shape: Shape, budget: int, may_split: bool, in_torch: bool, split_in_torch: bool
) -> tuple[int, int]:
    """The largest tile (rows, columns; 0 for all) that fits `budget` bytes: of whole rows if
    `_LEAST_ROWS` of them fit, else of all rows and some columns.

    Args:
        shape: of the call.
        budget: bytes beyond inputs and gradients.
        may_split: whether the implementation can split the vocabulary.
        in_torch: as for `workspace`, of whole rows.
        split_in_torch: the same of split rows.

    Raises:
        ValueError: no tile fits.
    """
    tile_rows = default_rows(shape.device, shape.vocab_size)
    while tile_rows >= _LEAST_ROWS:
        if workspace(shape, tile_rows, 0, in_torch) <= budget:
            return tile_rows, 0
        tile_rows //= 2
    least = workspace(shape, _LEAST_ROWS, 0, in_torch)
    if may_split:
        narrowest = min(_ALIGNMENT, shape.vocab_size)
        smallest = workspace(shape, 0, narrowest, split_in_torch)
        least = min(least, smallest)
        if smallest <= budget:
            per_column = (workspace(shape, 0, narrowest + 128, split_in_torch) - smallest) / 128
            fitting = narrowest + int((budget - smallest) // max(per_column, 1))
            count = -(-shape.vocab_size // max(fitting // _ALIGNMENT * _ALIGNMENT, narrowest))
            even = -(-shape.vocab_size // count)
            return 0, min(shape.vocab_size, -(-even // _ALIGNMENT) * _ALIGNMENT)
    raise ValueError(
        f"memory_budget={budget} bytes is too small for {shape.num_rows} rows of "
        f"{shape.vocab_size} logits: the least is {least}. Raise it, or pass fewer rows at a time."
    )
