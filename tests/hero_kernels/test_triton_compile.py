"""Compiles the Triton kernels for GPUs this machine need not have; reads what ptxas made of them.

For every entry of the tuning tables: no spills, registers that let enough warps run, shared memory
that fits, wide loads and stores. test_triton_cases.py tests that kernels compute the right thing;
how fast they are, neither does.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import offline
from benchmarks.offline import Compiled, compile_kernel, logprobs, statistics
from hero_kernels.triton.configs import ROWS, newest, row_config
from hero_kernels.triton.statistics import _merge_kernel

ARCHES = pytest.mark.parametrize("arch", sorted(ROWS))
FULL = pytest.mark.parametrize("full", [False, True], ids=["plain", "all-features"])
ATOMICS = {"RED", "REDG", "ATOM", "ATOMG"}


def check_rows(arch: int, compiled: Compiled) -> None:
    """What holds for every sweep over a row."""
    print(f"sm_{arch}: {compiled}, {compiled.warps_per_sm} warps per multiprocessor")
    assert compiled.spills == 0
    assert compiled.warps_per_sm >= 16
    assert not compiled.mnemonics & ATOMICS  # deterministic
    # Shared memory for reductions only: no value moves between threads from its load to its
    # store, which is what makes the gradient in place safe.
    assert compiled.shared <= 64 * compiled.num_warps


@FULL
@ARCHES
def test_statistics_sweep(arch: int, full: bool) -> None:
    compiled = statistics(arch, full)
    check_rows(arch, compiled)
    assert compiled.loads.get(128, 0) >= 4  # 4 columns a thread: of both sides, in two loops


@pytest.mark.parametrize(
    ("divergence", "values", "grad"),
    [
        pytest.param("jsd", True, False, id="jsd-values"),
        pytest.param("jsd", False, True, id="jsd-gradient"),
        pytest.param("forward_kl", True, True, id="forward-both"),
        pytest.param("reverse_kl", True, True, id="reverse-both"),
    ],
)
@FULL
@ARCHES
def test_divergence_sweep(arch: int, full: bool, divergence: str, values: bool, grad: bool) -> None:
    config = ROWS[arch]
    compiled = offline.divergence(arch, divergence, values=values, grad=grad, full=full)
    check_rows(arch, compiled)
    eight = config.block_v == 256 * config.num_warps  # columns a thread, else four
    assert compiled.loads.get(128, 0) >= (4 if eight else 2)
    assert not grad or compiled.stores.get(128 if eight else 64, 0) >= 1
    # Statistics, flag, temperature and scale: single numbers.
    narrow = {bits: count for bits, count in compiled.loads.items() if bits < 64}
    assert sum(narrow.values()) <= 11


@ARCHES
def test_merge(arch: int) -> None:
    types = {
        **dict.fromkeys(("parts_ptr", "statistics_ptr"), "*fp32"),
        **dict.fromkeys(("parts", "rows", "stride_pp", "stride_pr", "stride_pc"), "i32"),
    }
    constants = {"BLOCK_P": 32, "BLOCK_R": 8}
    compiled = compile_kernel(_merge_kernel, types, constants, arch=arch, num_warps=4)
    assert compiled.spills == 0 and not compiled.mnemonics & ATOMICS
    # A launch makes constants of integers that are 1, which the compiler treats otherwise.
    constants |= {"BLOCK_P": 1, "parts": 1, "rows": 1, "stride_pr": 1}
    types = {name: kind for name, kind in types.items() if name not in constants}
    compile_kernel(_merge_kernel, types, constants, arch=arch, num_warps=4)


@pytest.mark.parametrize("gradient", [False, True], ids=["statistics", "gradient"])
@FULL
@ARCHES
def test_logprob_kernels(arch: int, full: bool, gradient: bool) -> None:
    """On fp32 logits, with a bf16 gradient: what the tile loop holds on CUDA."""
    compiled = logprobs(arch, gradient=gradient, full=full)
    print(f"sm_{arch}: {compiled}, {compiled.warps_per_sm} warps per multiprocessor")
    assert compiled.spills == 0
    assert compiled.shared <= (0 if gradient else 64 * compiled.num_warps)
    assert compiled.warps_per_sm >= 24
    assert compiled.loads.get(128, 0) >= 2  # 8 columns a thread
    assert compiled.stores.get(128, 0) >= gradient
    # The target's id and logit, the statistics, the upstream pair: single numbers.
    assert sum(n for bits, n in compiled.loads.items() if bits < 128) <= 6


def test_devices_between_the_entries() -> None:
    assert [newest(ROWS, kind) for kind in ((8, 9), (10, 3), (12, 1))] == [80, 100, 100]
    assert row_config(torch.device("cpu"), ROWS).block_v == 128  # the interpreter's
    with pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.5"):
        newest(ROWS, (7, 5))
