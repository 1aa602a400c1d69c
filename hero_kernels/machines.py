"""What products, row kernels and memory cost on a machine: the constants of the planner.

The numbers stand in `costs/*.json`, one file for each kind of machine, written by
`python -m benchmarks.calibrate`. A file says in `source` whether its numbers were measured, and
where; numbers that come from a model say so, and `explain()` repeats it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from hero_kernels import cpu_gemm

FOLDER = Path(__file__).parent / "costs"
CUDA_COSTS = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
"""By compute capability times 10; a device takes the newest entry that is not newer than itself."""


@dataclass(frozen=True)
class Products:
    """Rates of the head's products for one type of operands, in FLOP/s, for many rows."""

    logits: float
    hidden: float
    weight: float
    half_rows: float
    """Rows at which a product runs at half its rate."""
    fused: float = 0.0
    """Of the logits of both sides by the fused design's kernel; 0 if unknown."""

    def seconds(self, rate: float, flops: float, rows: int) -> float:
        """Of a product of `rows` rows at a time."""
        return flops / rate * (1 + self.half_rows / max(rows, 1))


@dataclass(frozen=True)
class Machine:
    """One kind of machine."""

    name: str
    source: str
    """Where the numbers come from."""
    measured: bool
    products: dict[str, Products]
    """By type of the operands, "bfloat16" and "float32"; float16 counts as bfloat16."""
    rows: dict[str, dict[str, float]]
    """Logits a second that a row kernel works through, gradient included: by name, then by
    divergence."""
    bandwidth: float
    """Bytes a second of a copy, read plus written."""
    fresh: float
    """Bytes a second at which fresh memory is touched first; page faults on CPU."""
    chunk_seconds: float
    """Of each chunk apart from its size: launches, Python."""

    def products_of(self, dtype: torch.dtype) -> Products:
        return self.products["bfloat16" if dtype.itemsize == 2 else "float32"]

    def row_rate(self, impl: str, divergence: str) -> float:
        """Logits a second; a kernel without numbers counts as the slowest that has some."""
        rates = self.rows.get(impl)
        if rates is None:
            rates = min(self.rows.values(), key=lambda known: known[divergence])
        return rates[divergence]


@lru_cache
def load(name: str) -> Machine:
    """The machine called `name`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    values = json.loads((FOLDER / f"{name}.json").read_text())
    products = {dtype: Products(**rates) for dtype, rates in values.pop("products").items()}
    return Machine(name=name, products=products, **values)


def machine_of(device: torch.device) -> Machine:
    """The entry for a device; for CUDA without a device at hand, that of Hopper."""
    if device.type != "cuda":
        return load("cpu-amx" if cpu_gemm.kind() == "amx" else "cpu")
    if not torch.cuda.is_available():
        return load("sm_90")
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in CUDA_COSTS if arch <= 10 * major + minor] or [min(CUDA_COSTS)]
    return load(CUDA_COSTS[max(known)])
