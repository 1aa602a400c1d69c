"""Launch settings of the Triton kernels for each architecture; nothing is tuned at run time.

Chosen from what the compiler reports offline (registers, occupancy, width of the loads), not from
timings. tests/hero_kernels/test_triton_compile.py compiles every entry for its architecture.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch


class RowConfig(NamedTuple):
    """How one row is walked through."""

    block_v: int
    """Columns of one step, a power of two; 128-bit loads take 8 a thread of 16 bits, 4 of fp32."""
    num_warps: int


ROWS = {
    80: RowConfig(block_v=1024, num_warps=4),
    90: RowConfig(block_v=1024, num_warps=4),
    100: RowConfig(block_v=1024, num_warps=8),  # four warps would spill
}
"""By compute capability times 10; a device takes the newest entry that is not newer than itself."""


STATISTICS = dict.fromkeys(ROWS, RowConfig(block_v=1024, num_warps=8))
"""The sweep of `row_statistics` keeps eight numbers a lane: 4 columns a thread leave registers."""


class GemmConfig(NamedTuple):
    """Tile of `fused_kernel`.

    Both accumulators of 128 x 128 take 128 registers a thread of 8 warps, half of all there are.
    """

    block_t: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int


class GemmConfigs(NamedTuple):
    """By what is multiplied."""

    shared_head: GemmConfig
    own_heads: GemmConfig
    one_side: GemmConfig


class GemmEntry(NamedTuple):
    """By how operands are read; see `fused.operand_path`."""

    descriptors: GemmConfigs | None
    """Through the tensor memory accelerator; None where there is none, or no gain by it."""
    aligned: GemmConfigs
    """Through pointers, 16 bytes at a time."""
    unaligned: GemmConfigs
    """Through pointers, element by element."""


_TILE = GemmConfig(block_t=128, block_v=128, block_k=64, num_warps=8, num_stages=4)
_SMALL = GemmConfig(block_t=128, block_v=128, block_k=32, num_warps=8, num_stages=4)
_NARROW = GemmConfig(block_t=128, block_v=64, block_k=32, num_warps=8, num_stages=4)
_WIDE = GemmConfig(block_t=128, block_v=256, block_k=64, num_warps=8, num_stages=4)
_HALF = GemmConfig(block_t=128, block_v=64, block_k=64, num_warps=8, num_stages=4)
_HOPPER = GemmEntry(
    descriptors=GemmConfigs(_TILE, _TILE, _WIDE),
    aligned=GemmConfigs(_TILE, _TILE, _WIDE),
    unaligned=GemmConfigs(_NARROW, _NARROW, _NARROW),
)
_BLACKWELL = GemmEntry(
    descriptors=GemmConfigs(_TILE, _HALF, _WIDE),  # own heads would spill with a full tile
    aligned=GemmConfigs(_TILE, _HALF, _WIDE),
    unaligned=GemmConfigs(_NARROW, _NARROW, _NARROW),
)
_AMPERE = GemmEntry(
    descriptors=None,
    aligned=GemmConfigs(_SMALL, _NARROW, _SMALL),
    unaligned=GemmConfigs(_NARROW, _NARROW, _NARROW),
)
_CONSUMER_BLACKWELL = _AMPERE._replace(aligned=GemmConfigs(_NARROW, _NARROW, _SMALL))
GEMMS = {
    80: _AMPERE,  # and 86, 89, which have 99 KB of shared memory
    90: _HOPPER,
    100: _BLACKWELL,
    120: _CONSUMER_BLACKWELL,  # 99 KB, and Ampere's tensor-core instructions
}
"""By compute capability times 10, as `ROWS`."""

LOGPROBS = dict.fromkeys((80, 90, 100), RowConfig(block_v=1024, num_warps=4))
"""For the log-probability kernels, which hold few registers; as `ROWS`."""


# For tensors on the CPU, which only Triton's interpreter takes: short rows have several blocks.
_INTERPRETED = RowConfig(block_v=128, num_warps=4)
_SMALLEST = GemmConfig(block_t=16, block_v=64, block_k=16, num_warps=4, num_stages=2)
_INTERPRETED_GEMM = GemmEntry(*(GemmConfigs(*(_SMALLEST,) * 3),) * 3)


def row_config(device: torch.device, table: dict[int, RowConfig]) -> RowConfig:
    """The entry of `table` for a device.

    Raises:
        ValueError: the device is older than all entries.
    """
    if device.type == "cpu":
        return _INTERPRETED
    return table[newest(table, torch.cuda.get_device_capability(device), "row kernel")]


def gemm_entry(device: torch.device) -> GemmEntry:
    """The entry of `GEMMS` for a device.

    Raises:
        ValueError: the device is older than all entries.
    """
    if device.type == "cpu":
        return _INTERPRETED_GEMM
    return GEMMS[newest(GEMMS, torch.cuda.get_device_capability(device), "GEMM")]


def newest(table: Collection[int], capability: tuple[int, int], name: str) -> int:
    """The newest key of `table` that is not newer than a device.

    Raises:
        ValueError: the device is older than all of them.
    """
    arch = 10 * capability[0] + capability[1]
    known = [entry for entry in table if entry <= arch]
    if not known:
        raise ValueError(
            f"The Triton {name} needs compute capability {min(table) / 10} or newer, got "
            f"{arch / 10}: pass impl='torch'."
        )
    return max(known)
