"""Launch settings of the Triton kernels for each architecture; nothing is tuned at run time.

Chosen from what the compiler reports offline (registers, occupancy, width of the loads), not from
timings. tests/hero_kernels/test_triton_compile.py compiles every entry for its architecture.
"""

from __future__ import annotations

from typing import NamedTuple


class RowConfig(NamedTuple):
    """How one row is walked through."""

    block_v: int
    """Columns of one step, a power of two; 8 a thread make 128-bit loads of 16-bit logits."""
    num_warps: int


ROWS = {
    80: RowConfig(block_v=1024, num_warps=4),
    90: RowConfig(block_v=1024, num_warps=4),
    100: RowConfig(block_v=1024, num_warps=4),
}
"""By compute capability times 10; a device takes the newest entry that is not newer than itself."""


def row_config(capability: tuple[int, int]) -> RowConfig:
    """The entry for a device.

    Raises:
        ValueError: the device is older than all entries.
    """
    arch = 10 * capability[0] + capability[1]
    known = [entry for entry in ROWS if entry <= arch]
    if not known:
        raise ValueError(
            f"The Triton row kernel needs compute capability {min(ROWS) / 10} or newer, got "
            f"{arch / 10}: pass impl='torch'."
        )
    return ROWS[max(known)]
