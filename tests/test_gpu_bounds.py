"""The bounds of the GPU kernels' speed: how they are counted, and that no change raises one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu_bounds
from benchmarks.offline import Instruction, cuobjdump

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu-bounds.json"
ALLOWED = 1.05


def code(*names: str, **targets: int) -> tuple[Instruction, ...]:
    """Instructions at addresses 0, 16, ...; `targets` says where the branches so named go."""
    return tuple(
        Instruction(16 * at, name.rstrip("?"), targets.get(name.rstrip("?")), name.endswith("?"))
        for at, name in enumerate(names)
    )


def test_the_shortest_way_computes_what_is_asked_for() -> None:
    """Of two branches the one without an exponential skips the columns, and is not taken."""
    lines = code("FADD", "LDG", "BRA.A?", "FMUL", "MUFU.EX2", "MUFU.EX2", "BRA.B?", "EXIT",
                 **{"BRA.A": 96, "BRA.B": 16})  # fmt: skip
    [loop] = gpu_bounds.inner_loops(lines)
    assert [line.address for line in loop] == [16, 32, 48, 64, 80, 96]
    way = gpu_bounds.shortest_way(lines, loop, {"MUFU.EX2": 2})
    assert sorted(line.address for line in way) == [16, 32, 48, 64, 80, 96]
    shorter = gpu_bounds.shortest_way(lines, loop, {})
    assert sorted(line.address for line in shorter) == [16, 32, 96]


def test_the_shortest_way_reads_logits_of_the_type_that_is_asked_for() -> None:
    """Two loads, or a longer way with one and three instructions that convert."""
    lines = code("MUFU.EX2", "BRA.A?", "LDS.128", "LDS.128", "BRA.B", "LDS.128", "SHL", "PRMT",
                 "PRMT", "BRA.C?", "EXIT", **{"BRA.A": 80, "BRA.B": 144, "BRA.C": 0})  # fmt: skip
    [loop] = gpu_bounds.inner_loops(lines)
    for loads, length in ((None, 6), (2, 6), (1, 7)):
        assert len(gpu_bounds.shortest_way(lines, loop, {"MUFU.EX2": 1}, loads)) == length


def test_the_least_time_by_hand() -> None:
    """128 instructions a column are a clock of a multiprocessor; 16 exponentials are another."""
    clocks = 8192 * 151936 / (132 * 1.755e9) * 1e3
    bound = gpu_bounds.Bound("", 6.0, {"issue": 128.0, "sfu": 8.0, "fma": 64.0}, 32, 64)
    assert bound.milliseconds() == pytest.approx(
        {"memory": 8192 * 151936 * 6 / 3e9, "issue": clocks, "fma": clocks / 2, "alu": 0,
         "sfu": clocks / 2, "memory unit": 0}
    )  # fmt: skip
    assert bound.least() == (pytest.approx(clocks), "issue")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") and cuobjdump()), reason="nvcc is not installed")
def test_no_change_raises_a_bound() -> None:
    committed = json.loads(COMMITTED.read_text())
    if committed["compilers"] != (found := gpu_bounds.compilers()):
        pytest.skip(f"{COMMITTED.name} is of other compilers than {found}: they count otherwise")
    bounds = gpu_bounds.bounds()
    assert set(bounds) == set(committed["bounds"])
    raised = {
        name: (bound.least()[0], committed["bounds"][name]["least_ms"])
        for name, bound in bounds.items()
        if bound.least()[0] > ALLOWED * committed["bounds"][name]["least_ms"]
    }
    assert not raised, f"milliseconds now and in {COMMITTED.name}: {raised}"
