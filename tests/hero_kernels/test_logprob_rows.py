"""The log-probability kernels in torch and C++ against fp64 (logprob_cases.py)."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest
import torch
from logprob_cases import (
    TRANSFORMS,
    LogprobCase,
    check,
    check_garbage,
    check_in_place,
    check_masked_columns,
    check_strided,
    make_case,
    relative_error,
)
from row_cases import far_apart
from torch import Tensor

from hero_kernels import cpu, cpu_logprobs, logprob_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BUILT = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))


@pytest.fixture(params=["torch", pytest.param("cpu", marks=BUILT)])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return {"torch": logprob_rows, "cpu": cpu_logprobs}[request.param]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_transforms(kernels: ModuleType, transform: str, dtype: torch.dtype) -> None:
    case = make_case(**TRANSFORMS[transform])
    case.logits = case.logits.to(dtype)
    check(kernels, case)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_dtypes(kernels: ModuleType, dtype: torch.dtype) -> None:
    check(kernels, make_case(), dtype)


@pytest.mark.parametrize("vocab", [1, 2, 15, 1024, 1025, 32769])
def test_every_length_of_row(kernels: ModuleType, vocab: int) -> None:
    case = make_case(vocab=vocab)
    if vocab > 1:
        return check(kernels, case)
    stats, grad = case.run(kernels)
    assert stats[:, :2].eq(0).all() and grad.eq(0).all()


@pytest.mark.parametrize("sharpness", [0.0, 1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, -500.0, 1000.0])
def test_sizes_of_logits(kernels: ModuleType, sharpness: float, offset: float) -> None:
    """From uniform to one-hot, where exp of the logits themselves over- or underflows."""
    case = make_case(sharpness=sharpness)
    case.logits += offset
    stats, grad = case.run(kernels)
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm() + 1e-6


def test_maximum_that_grows_in_every_block(kernels: ModuleType) -> None:
    case = make_case(vocab=5000)
    case.logits += torch.linspace(-60, 60, 5000)
    check(kernels, case)


def test_padding_columns(kernels: ModuleType) -> None:
    case = make_case(vocab=1100, vocab_size=1037)
    case.logits[:, 1037:] = torch.nan
    check(kernels, case)


@pytest.mark.parametrize("masked", [0, 1024, 2100])
def test_masked_columns(kernels: ModuleType, masked: int) -> None:
    check_masked_columns(kernels, 3000, masked)


def test_garbage(kernels: ModuleType) -> None:
    check_garbage(kernels, 1300)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_in_place(kernels: ModuleType, dtype: torch.dtype) -> None:
    case = make_case(softcap=9.0)
    case.logits = case.logits.to(dtype)
    check_in_place(kernels, case)


def test_strided(kernels: ModuleType) -> None:
    check_strided(kernels)


def test_entropy_is_optional(kernels: ModuleType) -> None:
    case = make_case()
    case.upstream[:, 1] = 0
    both, one = case.statistics(kernels), case.statistics(kernels, with_entropy=False)
    assert one[:, 1].eq(0).all() and both[:, 1].gt(0).all()
    assert torch.equal(one[:, [0, 2, 3]], both[:, [0, 2, 3]])
    grad = torch.empty_like(case.logits)
    kernels.logprob_gradient(case.logits, grad, one, case.upstream, **case.arguments())
    assert relative_error(grad, case.truth()[1]) < 3e-6


def test_no_rows(kernels: ModuleType) -> None:
    case = make_case()
    empty = LogprobCase(case.logits[:0], case.target_ids[:0], case.upstream[:0])
    stats, grad = empty.run(kernels)
    assert stats.shape == (0, 4) and grad.shape == (0, 1300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_2_31_logits(kernels: ModuleType, dtype: torch.dtype) -> None:
    """64-bit offsets: rows so far apart that the last starts beyond element 2^31."""
    case = make_case(rows=3)
    case.target_ids[2] = 17
    case.logits = case.logits.to(dtype)
    expected, true_grad = case.truth()
    case.logits = logits = far_apart(case.logits)
    assert logits.stride(0) * 2 > 2**31
    stats = case.statistics(kernels)
    kernels.logprob_gradient(logits, logits, stats, case.upstream, **case.arguments())
    torch.testing.assert_close(stats[:, :2].double(), expected, rtol=1e-6, atol=3e-6)
    assert relative_error(logits, true_grad) < (3e-6 if dtype == torch.float32 else 4e-3)


@BUILT
def test_bitwise_equal_for_any_number_of_threads() -> None:
    case = make_case(37, 3000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.run(cpu_logprobs))
    finally:
        torch.set_num_threads(before)
    for stats, grad in results[1:]:
        assert torch.equal(stats, results[0][0]) and torch.equal(grad, results[0][1])


@BUILT
@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
def test_every_instruction_set(name: str) -> None:
    level = cpu.INSTRUCTION_SETS.index(name)
    if level > cpu.INSTRUCTION_SETS.index(cpu.instruction_set()):
        pytest.skip(f"this machine has no {name}")
    case = make_case(vocab=3000, softcap=20.0)
    ops = torch.ops.hero_kernels
    arguments = {**case.arguments(), "instruction_set": level}
    stats = ops.logprob_rows(case.logits, **arguments, with_entropy=True)
    grad = torch.empty_like(case.logits)
    ops.logprob_gradient_(case.logits, grad, stats, case.upstream, **arguments)
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
    assert relative_error(grad, true_grad) < 3e-6


@BUILT
def test_unknown_instruction_set() -> None:
    case = make_case()
    with pytest.raises(RuntimeError, match="no instruction set 9"):
        torch.ops.hero_kernels.logprob_rows(
            case.logits, **case.arguments(), with_entropy=True, instruction_set=9
        )


@BUILT
def test_opcheck() -> None:
    case = make_case(vocab=40, with_bias=True)
    ops = torch.ops.hero_kernels
    arguments = {**case.arguments(), "instruction_set": -1}
    torch.library.opcheck(
        ops.logprob_rows.default, (case.logits,), {**arguments, "with_entropy": True}
    )
    grad = torch.empty(4, 40, dtype=torch.bfloat16)
    torch.library.opcheck(
        ops.logprob_gradient_.default,
        (case.logits, grad, torch.rand(4, 4), case.upstream),
        arguments,
    )


@BUILT
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 8).double()}, "logits must be one of .* got torch.float64"),
        ({"logits": torch.zeros(8, 3).t()}, "logits must have last stride 1"),
        (
            {"grad": torch.zeros(3, 7)},
            r"grad must be \[R, V\] = \[3, 8\] like logits, got \[3, 7\]",
        ),
        ({"vocab_size": 9}, r"vocab_size must be in \[1, 8\] .* got 9"),
        ({"target_ids": torch.tensor([0, 8, 1])}, r"target_ids must be in \[0, 8\).* from 0 to 8"),
        ({"target_ids": torch.zeros(4).long()}, r"target_ids must be a contiguous \[3\] tensor"),
        ({"stats": torch.zeros(3, 8)}, r"stats must be a contiguous \[3, 4\] .* got \[3, 8\]"),
        ({"upstream": torch.zeros(3)}, r"upstream must be a contiguous \[3, 2\] .* got \[3\]"),
        ({"bias": torch.zeros(7)}, r"A bias must have shape \[8\] .* got \[7\]"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = LogprobCase(torch.zeros(3, 8), torch.zeros(3).long(), torch.zeros(3, 2))
    arguments: dict[str, Any] = {
        "logits": case.logits,
        "grad": torch.zeros(3, 8),
        "stats": torch.zeros(3, 4),
        "upstream": case.upstream,
        **case.arguments(),
    }
    with pytest.raises(ValueError, match=message):
        cpu_logprobs.logprob_gradient(**{**arguments, **change})


@BUILT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_time_of_a_chunk(dtype: torch.dtype) -> None:
    """256 rows of SmolLM2's vocabulary; prints, and fails only without vector code."""
    case = make_case(256, 49152)
    case.logits = case.logits.to(dtype)

    def fastest(run: Any) -> tuple[float, Tensor]:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            result = run()
            seconds.append(time.perf_counter() - start)
        return min(seconds), result

    forward, stats = fastest(lambda: case.statistics(cpu_logprobs))
    grad = torch.empty_like(case.logits)
    backward, _ = fastest(
        lambda: cpu_logprobs.logprob_gradient(
            case.logits, grad, stats, case.upstream, **case.arguments()
        )
    )
    setting = f"{dtype}, {torch.get_num_threads()} threads, {cpu.instruction_set()}"
    print(f"\n256 x 49152 {setting}: {forward * 1e3:.1f} ms, gradient {backward * 1e3:.1f} ms")
    assert forward + backward < 2.0
