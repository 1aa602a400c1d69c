"""A maker of logits: one GEMM kernel for both sides of a tile, whose epilogue sums up its rows.

Products of the library leave logits that a row kernel reads once for its statistics before it can
use them. Here the statistics come with the logits. For a shared head teacher logits and delta =
(h_s - h_t)·Wᵀ are kept in two accumulators that share every tile of W.

Delta is stored in fp16, not in the inputs' type: 11 bits of it keep gradients within 0.3 % of fp64
for any divergence, 8 do not. Rows too far for a 16-bit h_s - h_t are subtracted in the
accumulators, in fp32. Heads of their own have both logits stored in fp32.

It has not run on a GPU yet, and is not taken by `impl="auto"`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hero_kernels import gemm
from hero_kernels.constants import (
    ENERGY,
    ENTROPY,
    LOG_MASS,
    LOGPROB,
    MAX_T,
    MAXIMUM,
    NUM_LOGPROB_STATS,
    NUM_STATISTICS,
    SUM_T,
    TARGET_T,
)
from hero_kernels.objective import Objective
from hero_kernels.triton.configs import GemmEntry, gemm_entry
from hero_kernels.triton.fused_kernel import ONE_SIDE, OWN_HEADS, SHARED_HEAD, fused_kernel
from hero_kernels.triton.rows import available, divergence_rows
from hero_kernels.triton.statistics import merge_statistics
from hero_kernels.types import Head, RowTensors, Tile

__all__ = ["available", "divergence_rows", "logits_into", "logprob_rows", "refusal"]

DELTA_DTYPE = torch.float16
OPERANDS = (torch.bfloat16, torch.float16)
_LARGEST_VOCAB = 1 << 24


def refusal(capability: tuple[int, int], dtype: torch.dtype, vocab_size: int) -> str | None:
    """Why the kernel cannot serve, or None if it can.

    Any hidden size is served; one that is not a multiple of 8 is read element by element.

    Args:
        capability: compute capability of the device.
        dtype: of hidden states and head.
        vocab_size: columns.
    """
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    if dtype not in OPERANDS:
        return f"it multiplies bfloat16 or float16, got {dtype}: library GEMMs serve the others"
    if vocab_size >= _LARGEST_VOCAB:
        return f"it numbers columns by floats, which are exact below 2^24, got {vocab_size}"
    return None


def logits_into(
    tile: Tile, student: Head, teacher: Head, rows: RowTensors, objective: Objective
) -> Tile:
    """The tile with its logits and statistics.

    Args:
        tile: of whole rows, [R, C] with C at least V, to be filled: `teacher` (fp32) with raw
            logits, `student` with delta (`DELTA_DTYPE`) if `is_delta`, else with raw logits (fp32).
        student: R hidden states, 16-bit, and head [V, H] with adjacent columns; V = tile.num_real.
        teacher: likewise; the same head if `is_delta`.
        rows: of the same rows.
        objective: scaling of the logits.
    """
    operand, absolute_rows = student.hidden, None
    if tile.is_delta:
        operand, absolute_rows = gemm.difference_operand(student.hidden, teacher.hidden)
    statistics = _statistics(
        SHARED_HEAD.value if tile.is_delta else OWN_HEADS.value,
        _Side(gemm.rows_of(operand), student.weight, student.bias, tile.student),
        _Side(gemm.rows_of(teacher.hidden), teacher.weight, teacher.bias, tile.teacher),
        rows,
        objective,
        absolute_rows,
    )
    return tile._replace(statistics=statistics)


def logprob_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    objective: Objective,
    vocab_size: int,
    with_entropy: bool,
) -> Tensor:
    """[R, 4] as `rows_logprobs.logprob_rows` returns them, without logits in memory.

    Args:
        hidden: [R, H] bf16 or fp16.
        weight: [V, H] of the same type, with adjacent columns.
        bias: [V] fp32.
        target_ids: [R] int64, -1 for none.
        objective: scaling of the logits.
        vocab_size: V.
        with_entropy: fill the entropies.
    """
    side = _Side(gemm.rows_of(hidden), weight[:vocab_size], bias, None)
    rows = RowTensors(hidden.new_empty(0), target_ids)
    sums = _statistics(ONE_SIDE.value, side._replace(bias=None), side, rows, objective, None)
    stats = sums.new_zeros(len(sums), NUM_LOGPROB_STATS)
    stats[:, MAXIMUM] = sums[:, MAX_T]
    stats[:, LOG_MASS] = log_mass = sums[:, SUM_T].log()
    logprob = (sums[:, TARGET_T] - sums[:, MAX_T] - log_mass).clamp(max=0.0)
    stats[:, LOGPROB] = logprob.where(target_ids >= 0, 0.0)
    if with_entropy:
        stats[:, ENTROPY] = (log_mass - sums[:, ENERGY] / sums[:, SUM_T]).clamp(min=0.0)
    return stats


class _Side(NamedTuple):
    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V] or more
    out: Tensor | None  # [R, V] or more: where the logits go


def operand_path(entry: GemmEntry, *operands: Tensor) -> str:
    """How [rows, size] 16-bit matrices with last stride 1 are read: a field of `GemmEntry`."""

    def multiple(size: int, *, with_width: bool) -> bool:
        return all(
            (t.stride(0) % size, t.data_ptr() % 16) == (0, 0)
            and not (with_width and t.shape[1] % size)
            for t in operands
        )

    # The accelerator needs rows that start at multiples of 16 bytes, and masks any width itself.
    if entry.descriptors is not None and multiple(8, with_width=False):
        return "descriptors"
    # Triton takes a number for aligned if it is a multiple of 16.
    return "aligned" if multiple(16, with_width=True) else "unaligned"


def _statistics(
    mode: int,
    student: _Side,
    teacher: _Side,
    rows: RowTensors,
    objective: Objective,
    absolute_rows: Tensor | None,
) -> Tensor:
    """Fills the logits; returns [R, 12]."""
    num_rows, columns = len(student.hidden), len(student.weight)
    operands = student.hidden, student.weight, teacher.hidden, teacher.weight
    entry = gemm_entry(student.hidden.device)
    path = operand_path(entry, *operands)
    config = getattr(entry, path)[mode]
    tiles_v = triton.cdiv(columns, config.block_v)
    # Rows last: then the kernel's stores, and the merge's loads, are of neighbours.
    parts = student.hidden.new_empty((tiles_v, NUM_STATISTICS, num_rows), dtype=torch.float32)
    if num_rows == 0:
        return parts.new_empty((0, NUM_STATISTICS))

    def source(tensor: Tensor, block_rows: int) -> Tensor | TensorDescriptor:
        if path != "descriptors":
            return tensor
        return TensorDescriptor.from_tensor(tensor, [block_rows, config.block_k])

    with torch.cuda.device_of(student.hidden):
        fused_kernel[(triton.cdiv(num_rows, config.block_t) * tiles_v,)](
            source(student.hidden, config.block_t),
            source(student.weight, config.block_v),
            source(teacher.hidden, config.block_t),
            source(teacher.weight, config.block_v),
            student.out,
            teacher.out,
            student.bias,
            teacher.bias,
            rows.target_ids,
            absolute_rows,
            rows.temperatures,
            parts,
            num_rows,
            columns,
            student.hidden.shape[1],
            teacher.hidden.shape[1],
            *(tensor.stride(0) for tensor in operands),
            *(0 if out is None else out.stride(0) for out in (student.out, teacher.out)),
            parts.stride(0),
            parts.stride(1),
            1.0 / objective.temperature,
            objective.softcap,
            objective.logit_scale,
            MODE=mode,
            DESCRIPTORS=path == "descriptors",
            BLOCK_T=config.block_t,
            BLOCK_V=config.block_v,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return merge_statistics(parts.transpose(1, 2), one_side=mode == ONE_SIDE.value)
