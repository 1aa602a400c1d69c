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


LOGPROBS = dict.fromkeys((80, 90, 100), RowConfig(block_v=1024, num_warps=4))
"""For the log-probability kernels, which hold few registers; as `ROWS`."""


# For tensors on the CPU, which only Triton's interpreter takes: short rows have several blocks.
_INTERPRETED = RowConfig(block_v=128, num_warps=4)


def row_config(device: torch.device, table: dict[int, RowConfig]) -> RowConfig:
    """The entry of `table` for a device.

    Raises:
        ValueError: the device is older than all entries.
    """
    if device.type == "cpu":
        return _INTERPRETED
    return table[newest(table, torch.cuda.get_device_capability(device))]


def newest(table: Collection[int], capability: tuple[int, int]) -> int:
    """The newest key of `table` that is not newer than a device.

    Raises:
        ValueError: the device is older than all of them.
    """
    arch = 10 * capability[0] + capability[1]
    known = [entry for entry in table if entry <= arch]
    if not known:
        raise ValueError(
            f"The Triton row kernels need compute capability {min(table) / 10} or newer, got "
            f"{arch / 10}: pass impl='torch'."
        )
    return max(known)
