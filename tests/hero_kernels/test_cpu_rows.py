"""The C++ row kernel against textbook formulas in fp64 (tile_cases.py)."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tile_cases import (
    DELTA,
    DIVERGENCES,
    FLOATS,
    JSD,
    check,
    far_apart,
    make_case,
    relative_error,
)

from hero_kernels import cpu
from hero_kernels.cpu import divergence_rows

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))


@DIVERGENCES
@DELTA
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(FLOATS, FLOATS)), ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:]
)
def test_every_pair_of_dtypes(
    divergence: str, delta: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = make_case(divergence, delta)
    check(
        divergence_rows,
        replace(case, student=case.student.to(dtypes[0]), teacher=case.teacher.to(dtypes[1])),
    )


@DIVERGENCES
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_every_gradient_dtype(divergence: str, grad_dtype: torch.dtype) -> None:
    check(divergence_rows, make_case(divergence, True), grad_dtype)


@DIVERGENCES
@pytest.mark.parametrize("vocab", [1, 2, 15, 123, 1024, 1025, 32769])
def test_every_length_of_row(divergence: str, vocab: int) -> None:
    case = make_case(divergence, True, vocab=vocab)
    if vocab > 1:
        return check(divergence_rows, case)
    stats, grad = case.run(divergence_rows)
    assert stats[:, 0].eq(0).all() and grad.eq(0).all()


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target", ["student", "teacher"])
def test_gradient_in_place(divergence: str, delta: bool, dtype: torch.dtype, target: str) -> None:
    case = make_case(divergence, delta)
    case = replace(case, student=case.student.to(dtype), teacher=case.teacher.to(dtype))
    stats, grad = case.run(divergence_rows, dtype)
    inputs = {"student": case.student, "teacher": case.teacher}
    in_place = case.call(divergence_rows, inputs[target])
    assert torch.equal(in_place, stats)
    assert torch.equal(inputs[target], grad)


@DELTA
def test_more_than_2_31_logits(delta: bool) -> None:
    """64-bit offsets: rows so far apart that the last starts beyond element 2^31."""
    case = make_case(JSD, delta)
    far = replace(case, student=far_apart(case.student), teacher=far_apart(case.teacher))
    assert far.student.stride(0) * 2 > 2**31
    stats = far.call(divergence_rows, far.student)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(far.student, true_grad) < 1e-5


@DIVERGENCES
def test_bitwise_equal_for_any_number_of_threads(divergence: str) -> None:
    case = make_case(divergence, True, rows=37, vocab=3000, with_stats=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.run(divergence_rows))
    finally:
        torch.set_num_threads(before)
    for stats, grad in results[1:]:
        assert torch.equal(stats, results[0][0])
        assert torch.equal(grad, results[0][1])


@DIVERGENCES
@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
def test_every_instruction_set(divergence: str, name: str) -> None:
    best = cpu.INSTRUCTION_SETS.index(cpu.instruction_set())
    if cpu.INSTRUCTION_SETS.index(name) > best:
        pytest.skip(f"this machine has no {name}")
    case = make_case(divergence, True, vocab=3000, with_stats=True)
    stats, grad = case.run(partial(divergence_rows, instruction_set=name))
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


def test_no_rows() -> None:
    case = make_case(JSD, True)
    case = replace(case, student=case.student[:0], teacher=case.teacher[:0])
    assert case.run(divergence_rows)[0].shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_time_of_a_chunk(dtype: torch.dtype) -> None:
    """256 rows of SmolLM2's vocabulary; prints, and fails only without vector code."""
    case = make_case(JSD, True, rows=256, vocab=49152)
    case = replace(case, student=case.student.to(dtype), teacher=case.teacher.to(dtype))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        case.call(divergence_rows, case.student)
        seconds.append(time.perf_counter() - start)
    setting = f"{dtype}, {torch.get_num_threads()} threads, {cpu.instruction_set()}"
    print(f"\n256 x 49152 {setting}: {min(seconds) * 1e3:.1f} ms")
    assert min(seconds) < 2.0


CROSS = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"there is no {CROSS}")
@pytest.mark.parametrize("name", ["divergence_rows", "row_kernel", "bf16_gemm"])
def test_another_processor_compiles(name: str, tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "csrc" / "cpu" / f"{name}.cpp"
    command = [
        CROSS,
        "-std=c++17",
        "-O2",
        "-fopenmp",
        "-Wall",
        "-Werror",
        "-DHERO_ROW_FUNCTION=row",
        "-c",
    ]
    subprocess.run([*command, source, "-o", tmp_path / "object.o"], check=True, timeout=120)
