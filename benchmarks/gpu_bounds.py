"""What the GPU kernels cannot be faster than, read from their machine code. Bounds, not times.

    python -m benchmarks.gpu_bounds [--json FILE]

Every kernel is compiled for an H100 (sm_90). Of the loop that walks the columns the fewest
instructions on any way through it are counted, by the unit that executes them, and divided by the
columns of one step. With the bytes that a logit costs this gives the least time on an H100: by
memory, by issue slots, by unit. Nothing here has run on a GPU: latencies, replays and imperfect
overlap come on top.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.machine import write_json
from benchmarks.offline import Compiled, Instruction, cuda_rows, divergence, statistics
from hero_kernels.constants import DIVERGENCE_CODES

# An H100 SXM: its data sheet, and for the rates of the units the table "Throughput of Native
# Arithmetic Instructions" of the CUDA programming guide, column 9.0. Rates of memory and tensor
# cores are what libraries reach, not the data sheet's.
PROCESSORS, CLOCK = 132, 1.755e9
BYTES_PER_SECOND, PRODUCTS_PER_SECOND = 3.0e12, 790e12
LANES = {"issue": 128, "fma": 128, "alu": 64, "sfu": 16, "memory unit": 32}
"""Threads a clock and multiprocessor."""
UNITS = {
    "fma": ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "IMAD"),
    "sfu": ("MUFU",),
    "memory unit": ("LDG", "STG", "LDS", "STS", "SHFL", "LDC", "LDSM", "STSM"),
    "control": ("BRA", "NOP", "BAR", "EXIT", "SYNCS", "WARPSYNC", "BSSY", "BSYNC", "HGMMA"),
}
"""By mnemonic; uniform instructions (U*) have a unit of their own, all others are the ALU's."""
TOKENS, VOCAB = 8192, 151936
HIDDEN_SIZES = (1024, 2560, 4096)
TARGETS = {1024: 0.75, 2560: 0.85, 4096: 0.9}
"""Share of the four products in the time of the loss; see docs/benchmarks.md."""


@dataclass(frozen=True)
class Bound:
    """Of one kernel, for each logit: a column of student and teacher together."""

    name: str
    bytes: float
    """Read from and written to device memory."""
    instructions: dict[str, float]
    """For each unit, and of all in "issue"."""
    registers: int
    warps_per_sm: int

    def milliseconds(self) -> dict[str, float]:
        """The least time for all logits by each limit."""
        logits = TOKENS * VOCAB
        times = {"memory": self.bytes * logits / BYTES_PER_SECOND}
        for unit, lanes in LANES.items():
            clocks = self.instructions.get(unit, 0.0) * logits / lanes
            times[unit] = clocks / (PROCESSORS * CLOCK)
        return {name: 1e3 * seconds for name, seconds in times.items()}

    def least(self) -> tuple[float, str]:
        """Milliseconds, and what limits."""
        times = self.milliseconds()
        limit = max(times, key=times.__getitem__)
        return times[limit], limit


def unit(name: str) -> str:
    """Which unit executes an instruction."""
    mnemonic = name.split(".")[0]
    for candidate, mnemonics in UNITS.items():
        if mnemonic in mnemonics:
            return candidate
    return "uniform" if mnemonic.startswith("U") else "alu"


def inner_loops(code: tuple[Instruction, ...]) -> Iterator[tuple[Instruction, ...]]:
    """The loops without loops in them that compute exponentials or write a gradient."""
    back = [
        (line.target, line.address)
        for line in code
        if line.target is not None and line.target < line.address
    ]
    for first, last in back:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in back):
            continue
        loop = tuple(line for line in code if first <= line.address <= last)
        if any(line.name.startswith(("MUFU.EX2", "STG.E.128")) for line in loop):
            yield loop


def shortest_way(
    code: tuple[Instruction, ...],
    loop: tuple[Instruction, ...],
    least: Mapping[str, int],
    loads: int | None = None,
) -> list[Instruction]:
    """The fewest instructions from a loop's head to its last branch.

    Args:
        code: of the function.
        loop: of it.
        least: how many instructions the way has whose names begin so: ways without them skip the
            columns.
        loads: how many `LDS.128` it has exactly, which says of which types the logits are.
    """
    index = {line.address: position for position, line in enumerate(code)}
    start, end = index[loop[0].address], index[loop[-1].address]
    marks = (*least, "LDS.128")
    most = (*least.values(), 0 if loads is None else loads + 1)
    goal = (end, (*least.values(), loads or 0))
    State = tuple[int, tuple[int, ...]]
    came: dict[State, State | None] = {(start, (0,) * len(marks)): None}
    states = deque(came)
    while states and goal not in came:
        position, seen = state = states.popleft()
        line = code[position]
        if position == end or (line.name.startswith("EXIT") and not line.predicated):
            continue
        seen = tuple(
            min(n + line.name.startswith(mark), limit)
            for n, mark, limit in zip(seen, marks, most, strict=True)
        )
        nexts = [position + 1] if line.target is None or line.predicated else []
        nexts += [index[line.target]] if line.target in index else []
        for following in nexts:
            if following != start and (following, seen) not in came:
                came[following, seen] = state
                states.append((following, seen))
    way = []
    at: State | None = goal
    while at is not None:
        way.append(code[at[0]])
        at = came[at]
    return way


def count(lines: list[Instruction], columns: float) -> dict[str, float]:
    """Instructions a column by unit."""
    units = Counter(unit(line.name) for line in lines)
    return {name: n / columns for name, n in {**units, "issue": len(lines)}.items()}


def of_sweep(
    name: str, compiled: Compiled, columns: int, size: float, loads: int | None = None
) -> Bound:
    """Of a kernel that walks the columns in loops, each of which takes `columns` a thread.

    A loop computes p_s at least, one exponential a column, or only writes the gradient.
    """
    ways = []
    for loop in inner_loops(compiled.code):
        computes = any(line.name.startswith("MUFU.EX2") for line in loop)
        least = {"MUFU.EX2": columns} if computes else {"STG.E.128": 1}
        ways += shortest_way(compiled.code, loop, least, loads)
    counts = count(ways, columns)
    return Bound(name, size, counts, compiled.registers, compiled.warps_per_sm)


def bounds() -> dict[str, Bound]:
    """Of every kernel of the usual call: logits in fp32, a bf16 gradient."""
    found = [of_sweep("Triton, statistics", statistics(90), 4, 8)]
    for name in DIVERGENCE_CODES:
        # The JSD's gradient needs its value first; a KL gives both in one sweep.
        kinds = ((True, False), (False, True)) if name == "jsd" else ((True, True),)
        for values, grad in kinds:
            compiled = divergence(90, name, values=values, grad=grad, stats=False)
            parts = " and ".join(["values"] * values + ["gradient"] * grad)
            found.append(of_sweep(f"Triton, {name}: {parts}", compiled, 8, 8 + 2 * grad))
    codes = {code: name for name, code in DIVERGENCE_CODES.items()}
    for (code, delta, leaves), compiled in sorted(cuda_rows("90a").items()):
        if delta and leaves == (codes[code] == "jsd"):
            # Eight columns are two loads of fp32 for each side.
            found.append(of_sweep(f"CUDA, {codes[code]}: whole row", compiled, 8, 10, loads=4))
    return {bound.name: bound for bound in found}


def designs(found: dict[str, Bound]) -> dict[str, list[tuple[str, float]]]:
    """For each design of the JSD the kernels beside its four products, with milliseconds."""

    def least(*names: str) -> list[tuple[str, float]]:
        return [(name, found[name].least()[0]) for name in names]

    sweeps = ("Triton, jsd: values", "Triton, jsd: gradient")
    return {
        "triton": least("Triton, statistics", *sweeps),
        "cuda": least("CUDA, jsd: whole row"),
    }


def shares(kernels: list[tuple[str, float]]) -> dict[int, float]:
    """Of the four products in the loss, by hidden size, at best."""
    beside = sum(time for _, time in kernels)
    products = {h: 1e3 * 4 * 2 * TOKENS * h * VOCAB / PRODUCTS_PER_SECOND for h in HIDDEN_SIZES}
    return {h: time / (time + beside) for h, time in products.items()}


def tables(found: dict[str, Bound]) -> str:
    """Both tables in Markdown."""
    units = [name for name in LANES if name != "issue"]
    lines = [
        "| kernel | bytes | instructions | " + " | ".join(units) + " | registers | warps | least |",
        "| --- |" + " ---: |" * (len(units) + 5),
    ]
    for bound in found.values():
        time, limit = bound.least()
        cells = [f"{bound.bytes:.0f}", f"{bound.instructions['issue']:.0f}"]
        cells += [f"{bound.instructions.get(name, 0):.0f}" for name in units]
        cells += [str(bound.registers), str(bound.warps_per_sm), f"{time:.1f} ms ({limit})"]
        lines.append(f"| {bound.name} | " + " | ".join(cells) + " |")
    lines += ["", "| bound, not measured | " + " | ".join(f"H = {h}" for h in HIDDEN_SIZES) + " |"]
    lines += ["| --- |" + " ---: |" * len(HIDDEN_SIZES)]
    for name, kernels in designs(found).items():
        cells = [f"{share:.2f}" for share in shares(kernels).values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines.append("| target | " + " | ".join(f"{s}" for s in TARGETS.values()) + " |")
    return "\n".join(lines)


def compilers() -> dict[str, str]:
    """Versions of what made the machine code: others count otherwise."""
    nvcc = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return {"nvcc": nvcc.strip().splitlines()[-1], "triton": triton.__version__}


def as_json(found: dict[str, Bound]) -> dict[str, Any]:
    """What is committed under benchmarks/results/."""
    of_kernels = {
        name: {**asdict(bound), "least_ms": bound.least()[0], "limit": bound.least()[1]}
        for name, bound in found.items()
    }
    of_designs = {name: shares(kernels) for name, kernels in designs(found).items()}
    return {"compilers": compilers(), "bounds": of_kernels, "shares of the JSD": of_designs}


def main() -> None:
    """Print the tables; see the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    found = bounds()
    print(tables(found))
    if arguments.json:
        write_json(arguments.json, as_json(found))


if __name__ == "__main__":
    main()
