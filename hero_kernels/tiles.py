"""The loop over tiles of logits: products of the library around the kernels that work on rows.

For each tile of rows: the logits of teacher and student (for a shared head delta = (h_s - h_t)·Wᵀ),
what row kernels make of them, then the products with the head and the hidden states.

Where the logits of a row fit one tile they are made once, and their gradient takes their place: 4
head GEMMs, 3 for a frozen head, 2 for evaluation, one less without a teacher's head. Where columns
are split too (`tile_columns` < V) the logits are made again each time they are gone through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hero_kernels import cpu, gemm
from hero_kernels.call import Call
from hero_kernels.memory import Layout
from hero_kernels.types import GRADIENT_DTYPE, Gradients, Head, Tile
from hero_kernels.vocab_parallel import Shards


class Work(Protocol):
    """What is to be computed of the rows of row tile `i`."""

    num_stats: int

    def of_rows(self, tiles: Tiles, i: int) -> Tensor:
        """[R, num_stats]. With whole rows it may fill the gradient too."""
        ...

    def gradient(self, tile: Tile, i: int) -> None:
        """Fill `tile.grad`, unless `of_rows` has done it."""
        ...


class Sides(NamedTuple):
    """Both heads of a call, N rows; the head is this rank's shard of it."""

    student: Head
    teacher: Head | None
    active: Tensor | None  # [N] bool, None for all; other rows count as zeros, whatever they hold
    first_column: int  # place of the head's first column in the whole vocabulary
    columns: int  # real columns
    shared: bool  # whether both heads are one


class Tiles:
    """The logits of some rows, column tile by column tile.

    Each iteration makes them anew, in the same buffers; if one tile holds all columns it is made
    once and kept.
    """

    def __init__(
        self, sides: Sides, rows: slice, place: int, buffers: Buffers, plan: Layout
    ) -> None:
        self.sides, self.buffers, self.plan = sides, buffers, plan
        self.of_grad = slice(place, place + rows.stop - rows.start)
        self.hidden = self.operand = cleared(sides.student.hidden, sides.active, rows)
        self.teacher_hidden: Tensor | None = None
        self.absolute_rows: Tensor | None = None
        self.kept: Tile | None = None
        if sides.teacher is None:
            return
        self.teacher_hidden = cleared(sides.teacher.hidden, sides.active, rows)
        if sides.shared:
            if plan.in_place:
                # At most one rounding, to the type that the product takes.
                self.operand = self.hidden.to(plan.wide) - self.teacher_hidden
            else:
                self.operand, self.absolute_rows = gemm.difference_operand(
                    self.hidden, self.teacher_hidden
                )

    def __iter__(self) -> Iterator[Tile]:
        if self.kept is not None:
            yield self.kept
            return
        width, total = self.plan.columns, self.sides.columns
        for start in range(0, max(total, 1), max(width, 1)):
            tile = self._made(slice(start, min(start + width, total)))
            if width >= total:
                self.kept = tile
            yield tile

    def _made(self, columns: slice) -> Tile:
        student, teacher, _, first_column, _, shared = self.sides
        real, buffers = columns.stop - columns.start, self.buffers
        # On CUDA the padding that makes rows a multiple of 16 columns is part of the tile.
        used = slice(0, -(-real // 16) * 16 if buffers.student.is_cuda else real)
        size = self.of_grad.stop - self.of_grad.start
        tile = Tile(
            buffers.student[:size, used],
            None if buffers.teacher is None else buffers.teacher[:size, used],
            None if buffers.grad is None else buffers.grad[self.of_grad, used],
            shared,
            None if student.bias is None else _padded(student.bias[columns], used.stop, self.plan),
            None
            if teacher is None or teacher.bias is None
            else _padded(teacher.bias[columns], used.stop, self.plan),
            self.absolute_rows,
            first_column + columns.start,
            real,
        )
        if real == 0:
            return tile
        head, logits = student.weight[columns], tile.student[:, :real]
        if teacher is None or tile.teacher is None or self.teacher_hidden is None:
            gemm.logits_into(head, (logits, self.hidden))
            return tile
        of_teacher = tile.teacher[:, :real], self.teacher_hidden
        if shared:
            gemm.logits_into(head, of_teacher, (logits, self.operand))
        else:
            gemm.logits_into(teacher.weight[columns], of_teacher)
            gemm.logits_into(head, (logits, self.operand))
        return tile


def _matrices(
    like: Tensor, columns: int, kinds: Sequence[tuple[int, torch.dtype]]
) -> tuple[list[Tensor], Tensor | None]:
    """Empty [rows, columns] of these rows and types, and the memory to keep, if they share one.

    On a CPU rows of the same place in every page would compete for the same lines of the cache, so
    they are spaced a little further apart.
    """
    on_cpu, total = like.device.type == "cpu", 0
    spaced = -(-columns // 64) * 64 + 64 if on_cpu else columns
    for rows, dtype in kinds:
        total += rows * spaced * dtype.itemsize
    memory = cpu.take_memory(total) if on_cpu and total >= cpu.HUGE else None
    if memory is None:
        made = [like.new_empty(rows, spaced, dtype=dtype)[:, :columns] for rows, dtype in kinds]
        return made, None
    matrices, start = [], 0
    for rows, dtype in kinds:
        whole = memory.view(dtype)
        matrices.append(whole.as_strided((rows, columns), (spaced, 1), start // dtype.itemsize))
        start += rows * spaced * dtype.itemsize
    return matrices, memory


class Buffers:
    """The matrices in which a call's tiles live, one after the other.

    Two ways to hold the gradient, after `Layout`: it overwrites the student's logits (types of the
    same size, nothing held), or has a matrix of its own, of as many row tiles as share a product
    for dW.
    """

    def __init__(self, like: Tensor, plan: Layout, need_grad: bool, has_teacher: bool) -> None:
        longest = max(plan.sizes, default=0)
        # Kernels on CUDA want rows of multiples of 16 columns for wide loads and stores.
        width = -(-plan.columns // 16) * 16 if like.is_cuda else plan.columns
        kinds = [(longest, plan.wide)] * (2 if has_teacher else 1)
        if plan.held:
            kinds.append((plan.held, plan.gradient))
        (self.student, *others), self.memory = _matrices(like, width, kinds)
        self.teacher = others[0] if has_teacher else None
        self.grad: Tensor | None = None
        if plan.held:
            self.grad = others[-1]
        elif plan.in_place and need_grad:
            self.grad = self.student


class Sums:
    """The gradients of the student's tensors, added up tile by tile."""

    def __init__(self, sides: Sides, call: Call, plan: Layout, shards: Shards) -> None:
        hidden, weight, bias = sides.student
        self.sides, self.call, self.plan, self.shards = sides, call, plan, shards
        # One product forms dX of a whole row; else it is a sum of many, which is not rounded.
        self.one_product = plan.columns >= sides.columns and shards.size == 1
        self.narrow = GRADIENT_DTYPE[hidden.dtype]
        self.hidden_parts: list[Tensor] = []
        self.hidden = self.weight = self.bias = None
        if call.need_hidden and not self.one_product:
            self.hidden = hidden.new_zeros(hidden.shape, dtype=plan.wide)
        if call.need_weight:
            self.weight = weight.new_empty(weight.shape, dtype=plan.weight_sum)
            if weight.numel() >= cpu.HUGE:  # a small one is spared the call
                cpu.advise_huge_pages(self.weight)
            filled = sides.columns if plan.sizes else 0
            if filled < weight.shape[0]:
                self.weight[filled:] = 0
        if call.need_bias and bias is not None:
            self.bias = bias.new_zeros(bias.shape, dtype=plan.wide)

    def add(self, tile: Tile, rows: slice, hidden: Tensor) -> None:
        """What a tile's gradient adds: to dX, db and, where columns are split, to dW."""
        assert tile.grad is not None
        grad = tile.grad[:, : tile.num_real]
        start = tile.first_column - self.sides.first_column
        columns = slice(start, start + tile.num_real)
        if grad.numel() == 0:
            return
        if self.call.need_hidden:
            head = self.sides.student.weight[columns]
            if self.hidden is None:
                self.hidden_parts.append(gemm.hidden_gradient(grad, head).to(self.narrow))
            else:
                gemm.add_hidden_gradient(self.hidden[rows], grad, head)
        if self.bias is not None:
            self.bias[columns] += grad.sum(0, dtype=self.plan.wide)
        if self.weight is not None and self.plan.columns < self.sides.columns:
            gemm.weight_gradient_into(self.weight[columns], grad, hidden, rows.start > 0)

    def add_whole_rows(self, grad: Tensor, rows: slice) -> None:
        """What the gradients of whole rows add to dW: one product for all that are held."""
        if self.weight is not None and grad.numel():
            hidden = cleared(self.sides.student.hidden, self.sides.active, rows)
            into = self.weight[: self.sides.columns]
            gemm.weight_gradient_into(into, grad, hidden, rows.start > 0)

    def gradients(self) -> Gradients:
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden is not None:
            hidden = self.shards.add_up(hidden).to(self.narrow)
        elif self.call.need_hidden:
            hidden = _joined(self.hidden_parts)
            if hidden is None:
                hidden = torch.zeros_like(self.sides.student.hidden, dtype=self.narrow)
        if weight is not None:
            weight = weight.to(GRADIENT_DTYPE[self.sides.student.weight.dtype])
        if bias is not None and self.sides.student.bias is not None:
            bias = bias.to(GRADIENT_DTYPE[self.sides.student.bias.dtype])
        return Gradients(hidden, weight, bias)


def walk(
    sides: Sides,
    work: Work,
    call: Call,
    plan: Layout,
    shards: Shards,
) -> tuple[Tensor, Gradients]:
    """Go through all tiles.

    Args:
        sides: N rows.
        work: what to compute.
        call: which gradients.
        plan: tiles and types.
        shards: the ranks that have the other columns.

    Returns:
        Statistics [N, num_stats], and the gradients of what `work` differentiates.
    """
    hidden, need_grad = sides.student.hidden, plan.need_grad
    buffers = Buffers(hidden, plan, need_grad, sides.teacher is not None)
    sums = Sums(sides, call, plan, shards)
    stats: list[Tensor] = []
    whole_rows = plan.columns >= sides.columns
    start, i = 0, 0
    sizes = iter(plan.sizes)
    for group in plan.groups:
        first = start
        for size in islice(sizes, group):
            rows = slice(start, start + size)
            place = start - first if plan.held else 0
            tiles = Tiles(sides, rows, place, buffers, plan)
            stats.append(work.of_rows(tiles, i))
            if need_grad:
                for tile in tiles:
                    work.gradient(tile, i)
                    sums.add(tile, rows, tiles.hidden)
            start, i = start + size, i + 1
        if need_grad and whole_rows and buffers.grad is not None:
            grad = buffers.grad[: start - first, : sides.columns]
            sums.add_whole_rows(grad, slice(first, start))
    if buffers.memory is not None:
        cpu.keep_memory(buffers.memory)
    found = _joined(stats)
    if found is None:
        found = hidden.new_zeros(0, work.num_stats, dtype=plan.wide)
    return found, sums.gradients()


def _joined(parts: list[Tensor]) -> Tensor | None:
    """All rows of some parts; None without any."""
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None


def cleared(hidden: Tensor, active: Tensor | None, rows: slice) -> Tensor:
    """Some rows, masked ones as zeros: 0·NaN would spoil the sums."""
    return hidden[rows] if active is None else hidden[rows].masked_fill(~active[rows, None], 0)


def with_adjacent_columns(sides: Sides) -> Sides:
    """Heads as kernels of our own need them, copied once for all tiles; a shared head stays so."""
    student, teacher = sides.student, sides.teacher
    weight = gemm.rows_of(student.weight)
    if teacher is not None:
        other = weight if sides.shared else gemm.rows_of(teacher.weight)
        teacher = teacher._replace(weight=other)
    return sides._replace(student=student._replace(weight=weight), teacher=teacher)


def _padded(bias: Tensor, width: int, plan: Layout) -> Tensor:
    bias = bias.to(plan.wide)
    return torch.nn.functional.pad(bias, (0, width - len(bias))) if width > len(bias) else bias
