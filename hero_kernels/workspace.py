"""The memory of the sliced design, and the width of its slices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hero_kernels import phases
from hero_kernels.layout import buffer_types

SAVED = phases.NUM_STATISTICS + phases.NUM_VALUES
"""Numbers of each row that the forward pass keeps for the backward pass."""

DEFAULT_BUDGET = 448 << 20
"""Bytes; with them (8192, 4096, 151936) in bf16 stays below 0.5 GB beside dW."""

_ALIGNMENT = 128
"""Slices are a multiple of it: whole tiles, and aligned rows of the buffers."""
_DEFAULT_MIN_WIDTH = 1024
"""Without a budget of the user's slices get no narrower: the products would be inefficient."""
_CPU_SPACING = 127
"""Columns by which `layout.buffer` spaces the rows of a buffer on CPU, at most."""


class Workspace(NamedTuple):
    """Bytes that a call takes beyond inputs and gradients, at most."""

    fixed: int
    per_column: int
    """For each column of a slice."""

    def bytes(self, width: int) -> int:
        return self.fixed + width * self.per_column


def workspace(
    num_rows: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    storage: str,
    shared_head: bool,
    in_torch: bool = True,
    compacted: bool = False,
) -> Workspace:
    """What a call takes, with gradients.

    Args:
        num_rows: N.
        hidden_size: H, the larger one where teacher and student differ.
        dtype: of the hidden states.
        device: of the tensors.
        storage: value of `Storage`.
        shared_head: whether teacher and student have one head.
        in_torch: whether the phases are those in torch, which need temporaries.
        compacted: whether rows of zero weight are dropped, which copies the hidden states.
    """
    types = buffer_types(dtype, device, storage, shared_head)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = dtype != wide
    operand = dtype if device.type == "cuda" else wide
    elements = wide.itemsize + operand.itemsize * shared_head  # the sum of dX, h_s - h_t
    if device.type == "cuda":
        elements += dtype.itemsize  # h_s without masked rows
    elif narrow:
        elements += 2 * wide.itemsize  # h_s and h_t in fp32, or what cpu_gemm packs
    elements += 2 * dtype.itemsize * compacted
    fixed = num_rows * (elements * hidden_size + 8 * SAVED * wide.itemsize)
    if in_torch:
        fixed += phases.SCRATCH_TENSORS * phases.block_elements(device) * wide.itemsize
    logits = wide.itemsize + types.student.itemsize
    if types.gradient != types.student:
        logits += types.gradient.itemsize
    converted = wide.itemsize if narrow and device.type != "cuda" else 0  # weight or dW of a slice
    if device.type == "cpu":
        fixed += num_rows * logits * _CPU_SPACING
    return Workspace(fixed, num_rows * logits + hidden_size * converted)


def slice_width(columns: int, num_rows: int, space: Workspace, budget: int) -> int:
    """Columns of a slice: as few slices as the budget allows, of equal width.

    Args:
        columns: to be cut.
        num_rows: N, for the message.
        space: what they take.
        budget: bytes; 0 for the default, which yields where it is too small to be efficient.

    Raises:
        ValueError: the budget does not hold a slice of 128 columns.
    """
    room = ((budget or DEFAULT_BUDGET) - space.fixed) // max(space.per_column, 1)
    width = columns if room >= columns else room // _ALIGNMENT * _ALIGNMENT
    least = min(columns, _ALIGNMENT if budget else _DEFAULT_MIN_WIDTH)
    if width < least:
        if budget:
            raise ValueError(
                f"memory_budget={budget} bytes cannot hold a slice of {least} columns for "
                f"{num_rows} rows, which takes {space.bytes(least)}: raise it, pass fewer rows at "
                "a time, or use design='chunked'."
            )
        width = least
    count = -(-columns // max(width, 1))
    even = -(-columns // max(count, 1))
    return min(columns, -(-even // _ALIGNMENT) * _ALIGNMENT)
