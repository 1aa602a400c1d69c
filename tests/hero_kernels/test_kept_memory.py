"""What stays of a call on the CPU for the next one. Oracles: addresses, fresh memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from problems import Problem, make_problem

from hero_kernels import cpu, fused_linear_divergence, linear_logprobs, release_memory

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    release_memory()
    yield
    release_memory()


def gradients(problem: Problem) -> tuple[torch.Tensor, ...]:
    loss = fused_linear_divergence(*problem.positional())
    assert isinstance(loss, torch.Tensor)
    return torch.autograd.grad(loss, [problem.student_hidden, problem.student_weight])


def test_memory_is_taken_again_until_it_is_released() -> None:
    large, small = 3 * MEBIBYTE, 2 * MEBIBYTE
    first = cpu.take_memory(large)
    cpu.keep_memory(first)
    again = cpu.take_memory(small)
    assert again.data_ptr() == first.data_ptr()
    assert cpu.take_memory(small).data_ptr() != first.data_ptr()  # it is in use
    cpu.keep_memory(again)
    assert cpu.take_memory(4 * MEBIBYTE).numel() == 4 * MEBIBYTE
    assert cpu.take_memory(small).numel() == small  # what was too small is gone
    cpu.keep_memory(again)
    release_memory()
    assert cpu.take_memory(small).numel() == small


def test_little_and_much_are_not_kept() -> None:
    gradients(make_problem(7, 32, 300))
    cpu.keep_memory(torch.empty(cpu.KEPT_BYTES + 1, dtype=torch.uint8))
    assert not cpu._kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_the_memory_holds(dtype: torch.dtype) -> None:
    """After a larger call, and full of NaNs. Oracle: fresh memory."""
    problem = make_problem(70, 32, 3000, dtype=dtype)
    expected = gradients(problem)
    release_memory()
    gradients(make_problem(90, 32, 3100))
    [kept] = cpu._kept
    kept.fill_(255)  # as fp32, bf16 and fp16 a NaN
    for found, wanted in zip(gradients(problem), expected, strict=True):
        assert torch.equal(found, wanted)
    assert cpu._kept[0].data_ptr() == kept.data_ptr()


def test_results_outlive_the_next_call() -> None:
    problem = make_problem(70, 32, 3000)
    ids = torch.arange(70)

    def everything() -> tuple[torch.Tensor, ...]:
        logprobs = linear_logprobs(problem.student_hidden, problem.student_weight, ids)
        (gradient,) = torch.autograd.grad(logprobs.sum(), problem.student_weight)
        return (*gradients(problem), logprobs, gradient)

    results = everything()
    copies = [result.clone() for result in results]
    cpu._kept[0].fill_(255)
    for result, copy in zip(results, copies, strict=True):
        assert torch.equal(result, copy)


def test_memory_of_inference_serves_training() -> None:
    problem = make_problem(70, 32, 3000)
    expected = gradients(problem)
    release_memory()
    with torch.inference_mode():
        fused_linear_divergence(*problem.positional())
    assert cpu._kept
    assert torch.equal(gradients(problem)[1], expected[1])


def test_two_threads_do_not_share_memory() -> None:
    """Oracle: one after the other."""
    problems = [make_problem(70, 32, 3000, sharpness=sharpness) for sharpness in (1.0, 2.0)]
    expected = [gradients(problem)[1] for problem in problems]
    together = Barrier(2)

    def many(problem: Problem) -> list[torch.Tensor]:
        together.wait()
        return [gradients(problem)[1] for _ in range(10)]

    with ThreadPoolExecutor(2) as threads:
        for found, wanted in zip(threads.map(many, problems), expected, strict=True):
            for gradient in found:
                torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)
