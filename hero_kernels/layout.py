"""The plan of a call, how it is cut into chunks, and the buffers that hold them."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels import cpu, gemm
from hero_kernels.options import Design, Storage


class Plan(NamedTuple):
    """How a call is carried out."""

    impl: str
    """Which row kernel: "auto" or a key of `backends.IMPLEMENTATIONS`."""
    chunk_size: int
    storage: str
    """`Storage.FLOAT32` or `Storage.MIXED`."""
    max_active_rows: int
    """0 for no bound."""
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    with_stats: bool
    design: str = Design.CHUNKED
    """Value of `Design`, not "auto" once the planner has chosen."""
    memory_budget: int = 0
    """Bytes that "sliced" may take beyond inputs and gradients; 0 for its default."""
    group: str = ""
    """Name of the process group over whose ranks the vocabulary is sharded; "" for none."""
    accumulate_weight_grad: bool = False
    """Whether the backward pass of "sliced" adds the weight's gradient where it accumulates."""

    @property
    def need_grad(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias


class BufferTypes(NamedTuple):
    """Types of the buffers of a call; teacher logits are always fp32 (fp64)."""

    student: torch.dtype
    gradient: torch.dtype
    """If the same as `student`, the gradient takes the logits' place."""


class Layout(NamedTuple):
    """How a call is cut into pieces, and what it holds them in."""

    sizes: list[int]
    """Rows of each chunk of logits."""
    types: BufferTypes
    groups: list[int]
    """Number of chunks whose gradients are held together, for one product that forms dW."""
    held: int
    """Rows of the gradient's buffer; 0 where the gradient takes the place of a single chunk."""
    weight_sum: torch.dtype
    """In which dW is summed."""
    in_place: bool
    """Whether the gradient takes the place of the student's logits."""


def layout(
    num_rows: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    shared_head: bool,
    plan: Plan,
) -> Layout:
    """The layout of a call.

    A sum over chunks is kept in fp32: 4·V·H bytes that every product for dW reads and writes. Where
    the gradients of all rows are held instead, 2·N·V bytes in 16 bits, one product sums in its
    registers. Up to twice as many rows as H that takes no more memory than the sum; on CPU, where
    traffic costs more than memory, twice that is allowed.
    """
    sizes = chunk_sizes(num_rows, plan.chunk_size)
    longest = max(sizes, default=0)
    fused = plan.design == Design.FUSED
    types = buffer_types(dtype, device, plan.storage, shared_head, fused)
    groups, held = [1] * len(sizes), 0
    in_place = types.gradient == types.student or (fused and shared_head)
    if plan.need_grad and (fused or not in_place):
        limit = hidden_size * (4 if device.type == "cpu" else 2) if plan.need_weight else 0
        groups = _equal_parts(len(sizes), max(1, limit // max(1, longest)))
        chunks = iter(sizes)
        held = max((sum(islice(chunks, group)) for group in groups), default=0)
    wide = torch.promote_types(dtype, torch.float32)
    # fp16 has not the range for a sum of scaled rows.
    weight_sum = gradient_dtype(types.gradient) if len(groups) <= 1 else wide
    return Layout(sizes, types, groups, held, weight_sum, in_place)


def buffer_types(
    dtype: torch.dtype,
    device: torch.device,
    storage: str,
    shared_head: bool,
    fused: bool = False,
) -> BufferTypes:
    """What the chunk loop holds its chunks in.

    Beside teacher logits in fp32 a 16-bit delta is as good as an fp32 one where delta is small: its
    error is relative to itself. Student logits are never 16-bit: their difference to the teacher's
    is what counts. The gradient is 16-bit, the type of the GEMM's operands, where such a product
    has wide results (`gemm.takes_16_bit`), else fp32.

    Args:
        dtype: of the hidden states.
        device: of the hidden states.
        storage: value of `Storage`.
        shared_head: whether the student's logits are a delta.
        fused: whether they come from the fused design, whose delta is fp16 (fused.py).
    """
    wide = torch.promote_types(dtype, torch.float32)
    if fused:
        return BufferTypes(torch.float16 if shared_head else wide, dtype)
    mixed = storage == Storage.MIXED
    return BufferTypes(
        student=dtype if mixed and shared_head else wide,
        gradient=dtype if mixed or gemm.takes_16_bit(device, dtype) else wide,
    )


def chunk_sizes(num_rows: int, chunk_size: int) -> list[int]:
    """As few chunks as possible, as equal as possible: no GEMM of a handful of rows at the end."""
    return _equal_parts(num_rows, chunk_size)


def _equal_parts(total: int, largest: int) -> list[int]:
    """`total` as a sum of as few numbers as possible, none above `largest`, that differ by 1."""
    count = -(-total // largest)
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def buffer(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An empty [rows, columns] on the device of `like`.

    On CPU rows of the same place in every page would compete for the same lines of the cache, so
    they are spaced a little further apart; and fresh memory is taken in huge pages.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns, dtype=dtype)
    whole_lines = -(-columns // 64) * 64
    spaced = like.new_empty(rows, whole_lines + 64, dtype=dtype)
    return cpu.advise_huge_pages(spaced)[:, :columns]


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which gradients wait for the upstream gradient; fp16 has not the range for it."""
    return torch.float32 if dtype == torch.float16 else dtype
