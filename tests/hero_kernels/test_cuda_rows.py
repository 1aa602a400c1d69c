"""The CUDA row kernel on a GPU against textbook formulas in fp64 (tile_cases.py).

What runs without one: test_cuda_emulator.py, test_cuda_compile.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_tools import on_cuda, random_case
from tile_cases import DELTA, DIVERGENCES, JSD, check, make_case, relative_error

from hero_kernels import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.available() is not None, reason=str(cuda.available())),
]


@pytest.mark.parametrize("seed", range(200))
def test_random_problems(seed: int) -> None:
    case, grad_dtype = random_case(seed)
    check(on_cuda, case, grad_dtype)


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("vocab", [32769, 49152, 128256, 151936, 500_000, 1_200_000])
def test_long_rows(divergence: str, delta: bool, vocab: int) -> None:
    """Clusters of every size, and rows that no cluster holds; more rows than run at once."""
    case = make_case(divergence, delta, rows=8, vocab=vocab, scale=0.5, with_stats=True)
    case.target_ids = torch.tensor([0, vocab - 1, -1, 1, 2, 3, 4, 5])
    check(on_cuda, case, torch.float32)


@DIVERGENCES
def test_many_rows_have_the_bits_of_few(divergence: str) -> None:
    case = make_case(divergence, True, rows=16, vocab=49152)
    stats, grad = case.run(on_cuda)
    student, teacher = (t.cuda().repeat(64, 1) for t in (case.student, case.teacher))
    many = replace(
        case, student=student, teacher=teacher, row_weights=torch.ones(1024, device="cuda")
    )
    for _ in range(3):
        out = torch.empty_like(student)
        assert torch.equal(many.call(cuda.divergence_rows, out).cpu(), stats.repeat(64, 1))
        assert torch.equal(out.cpu(), grad.repeat(64, 1))


@DIVERGENCES
@pytest.mark.parametrize("vocab", [50257, 151936])
@pytest.mark.parametrize("target", ["student", "teacher"])
def test_gradient_in_place(divergence: str, vocab: int, target: str) -> None:
    case = make_case(divergence, True, rows=300, vocab=vocab)
    case = replace(case, student=case.student.bfloat16(), teacher=case.teacher.bfloat16())
    stats, grad = case.run(on_cuda, torch.bfloat16)
    inputs = {"student": case.student, "teacher": case.teacher}
    in_place = case.call(on_cuda, inputs[target])
    assert torch.equal(in_place, stats)
    assert torch.equal(inputs[target], grad)


def test_runs_on_the_current_stream() -> None:
    case = make_case(JSD, True, rows=64, vocab=49152)
    stats, _ = case.run(on_cuda)
    weights = torch.ones(64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what comes before must have been waited for
        student, teacher = (tensor.cuda() for tensor in (case.student, case.teacher))
        moved = replace(case, student=student, teacher=teacher, row_weights=weights)
        late = moved.call(cuda.divergence_rows, student)
    stream.synchronize()
    assert torch.equal(late.cpu(), stats)


@DIVERGENCES
def test_more_than_2_31_logits(divergence: str) -> None:
    """64-bit offsets: the last rows of a tensor with more elements than an int32 counts."""
    total, vocab = 16_400, 131_072
    student = torch.zeros(total, vocab, dtype=torch.bfloat16, device="cuda")
    teacher = student.new_zeros(1, vocab).expand(total, vocab)
    case = make_case(divergence, True, rows=2, vocab=vocab)
    case = replace(case, student=case.student.bfloat16())
    student[-2:] = case.student.cuda()
    weights = torch.ones(total, device="cuda")
    many = replace(case, student=student, teacher=teacher, row_weights=weights)
    stats = many.call(cuda.divergence_rows, student)
    zero = replace(case, teacher=torch.zeros(2, vocab))
    true_stats, true_grad = zero.truth()
    torch.testing.assert_close(stats[-2:, 0].double().cpu(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(student[-2:].cpu(), true_grad) < 4e-3
    assert not stats[:-2, 0].any() and not student[:-2].any()
