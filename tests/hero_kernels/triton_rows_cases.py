"""Cases of the Triton row kernel against textbook formulas in fp64 (row_cases.py).

test_triton_rows.py runs this file in a process of its own: with TRITON_INTERPRET=1, which must be
set before triton is imported, or on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from row_cases import (
    DELTA,
    DIVERGENCES,
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    check,
    make_case,
    relative_error,
)
from torch import Tensor
from triton_tools import mend_interpreter

from hero_kernels.triton import rows
from hero_kernels.triton.configs import RowConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    mend_interpreter()
SMALL_BLOCKS = RowConfig(block_v=256, num_warps=4)


def divergence_rows(
    student: Tensor, teacher: Tensor, grad: Tensor | None, **options: Any
) -> Tensor:
    """The kernel in the interpreter or on the GPU, with blocks so small that rows have several."""
    run = partial(rows.divergence_rows, config=SMALL_BLOCKS)
    if INTERPRETED:
        return run(student, teacher, grad, **options)
    options = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    inputs = {id(t): t.cuda() for t in (student, teacher, grad) if t is not None}
    stats = run(
        inputs[id(student)],
        inputs[id(teacher)],
        None if grad is None else inputs[id(grad)],
        **options,
    )
    if grad is not None:
        grad.copy_(inputs[id(grad)])
    return stats.cpu()


@DIVERGENCES
@pytest.mark.parametrize(
    ("delta", "dtype"), [(True, torch.bfloat16), (True, torch.float16), (False, torch.float32)]
)
def test_dtypes(divergence: int, delta: bool, dtype: torch.dtype) -> None:
    case = make_case(divergence, delta, rows=2, vocab=300)
    check(divergence_rows, replace(case, student=case.student.to(dtype)), dtype)


@DIVERGENCES
@DELTA
def test_transforms_targets_ratio_and_statistics(divergence: int, delta: bool) -> None:
    case = make_case(divergence, delta, rows=4, vocab=300, scale=0.5, with_stats=True)
    case.beta, case.softcap, case.logit_scale, case.inv_temperature = 0.3, 9.0, 0.8, 1.25
    case.student_bias, case.teacher_bias = torch.randn(2, 300)
    case.target_ids = torch.tensor([0, 299, -1, 130])
    case.old_logprobs = case.truth()[0][:, 2].float() + torch.tensor([0.3, -0.3, 0.0, -0.1])
    case.row_weights, case.is_clip = torch.rand(4), 1.2
    check(divergence_rows, case)


@DIVERGENCES
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (1e-2, 20.0), (1e-4, 0.0)])
def test_nearby_distributions_keep_relative_accuracy(
    divergence: int, scale: float, softcap: float
) -> None:
    case = make_case(divergence, True, rows=2, vocab=500, scale=scale, softcap=softcap)
    case.student += scale
    stats, grad = case.run(divergence_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=2e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
@DELTA
def test_equal_distributions_are_exactly_zero(divergence: int, delta: bool) -> None:
    case = make_case(divergence, delta, rows=2, vocab=300, scale=0.0, softcap=11.0)
    case.student_bias = case.teacher_bias = torch.randn(300)
    stats, grad = case.run(divergence_rows)
    assert stats[:, 0].eq(0).all()
    assert grad.eq(0).all()


@DIVERGENCES
@DELTA
def test_distant_distributions(divergence: int, delta: bool) -> None:
    """Log ratios for which p_t exp(x) over- or underflows, and a student offset by a constant."""
    case = make_case(divergence, delta, rows=2, vocab=300, scale=40.0)
    case.student += 50.0
    stats, grad = case.run(divergence_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert (grad - true_grad).norm() < 1e-5 * (true_grad.norm() + 1e-2)


@DIVERGENCES
@DELTA
def test_masked_and_padding_columns(divergence: int, delta: bool) -> None:
    case = make_case(divergence, delta, rows=2, vocab=300)
    kept = torch.rand(300) < 0.6
    kept[280:] = False
    shorter = replace(case, student=case.student[:, kept], teacher=case.teacher[:, kept])
    case.teacher[:, ~kept] = -torch.inf
    case.student[:, ~kept] = torch.nan if delta else -torch.inf
    case.teacher[:, 280:] = torch.nan
    stats, grad = replace(case, vocab_size=280).run(divergence_rows)
    true_stats, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad[:, kept], true_grad) < 1e-5
    assert grad[:, ~kept].eq(0).all()


@pytest.mark.parametrize("divergence", [JSD, FORWARD_KL], ids=["jsd", "forward"])
def test_columns_that_only_the_teacher_masks(divergence: int) -> None:
    """The student's mass there counts; the oracle has a teacher who gives them exp(-150)."""
    case = make_case(divergence, False, rows=2, vocab=300)
    case.teacher[:, 100:130] = -150.0
    true_stats, true_grad = case.truth()
    case.teacher[:, 100:130] = -torch.inf
    stats, grad = case.run(divergence_rows)
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
def test_weight_zero_hides_garbage(divergence: int) -> None:
    case = make_case(divergence, False, rows=3, vocab=300)
    case.row_weights = torch.tensor([0.0, 0.0, 1.0])
    case.student[0] = torch.nan
    case.teacher[2, 7] = torch.nan
    stats, grad = case.run(divergence_rows)
    truth, _ = make_case(divergence, False, rows=3, vocab=300).truth()
    assert grad[:2].eq(0).all()
    assert stats[0].eq(0).all()
    assert stats[1, 0].item() == pytest.approx(truth[1, 0].item(), rel=1e-5)
    assert stats[2, 0].isnan() and grad[2].isnan().all()


@pytest.mark.parametrize("divergence", [JSD, REVERSE_KL], ids=["jsd", "reverse"])
@pytest.mark.parametrize("target", ["student", "teacher"])
def test_gradient_in_place(divergence: int, target: str) -> None:
    case = make_case(divergence, True, rows=2, vocab=300)
    stats, grad = case.run(divergence_rows)
    inputs = {"student": case.student, "teacher": case.teacher}
    in_place = divergence_rows(case.student, case.teacher, inputs[target], **case.options())
    assert torch.equal(in_place, stats)
    assert torch.equal(inputs[target], grad)


@DIVERGENCES
def test_rows_that_hold_logits_among_differences(divergence: int) -> None:
    """`absolute_rows`: what `chunked.difference_operand` leaves where delta would be rounded."""
    case = make_case(divergence, True, scale=2.0, vocab=300, softcap=20.0)
    case.student_bias = case.teacher_bias = torch.randn(300)
    case.student[1] += case.teacher[1]
    case.absolute_rows = torch.tensor([False, True, False])
    check(divergence_rows, case)


def test_strided_rows_and_short_rows() -> None:
    case = make_case(JSD, False, rows=4, vocab=300)
    part = replace(
        case, student=case.student[::2, 3:80], teacher=case.teacher[:1, 3:80].expand(2, 77)
    )
    check(divergence_rows, part)


def test_no_gradient_wanted_and_no_rows() -> None:
    case = make_case(REVERSE_KL, True, rows=2, vocab=300)
    stats = divergence_rows(case.student, case.teacher, None, **case.options())
    assert torch.equal(stats, case.run(divergence_rows)[0])
    empty = replace(case, student=case.student[:0], teacher=case.teacher[:0])
    assert empty.run(divergence_rows)[0].shape == (0, 8)


@pytest.mark.skipif(INTERPRETED, reason="would take hours in the interpreter")
@DIVERGENCES
def test_more_than_2_31_logits(divergence: int) -> None:
    """64-bit offsets: the last rows of a tensor with more elements than an int32 counts."""
    total, vocab = 16_400, 131_072
    student = torch.zeros(total, vocab, dtype=torch.bfloat16, device="cuda")
    teacher = student.new_zeros(1, vocab).expand(total, vocab)
    case = make_case(divergence, True, rows=2, vocab=vocab)
    case = replace(case, student=case.student.bfloat16())
    student[-2:] = case.student.cuda()
    options = {**case.options(), "row_weights": torch.ones(total, device="cuda")}
    stats = rows.divergence_rows(student, teacher, student, **options)
    zero = replace(case, teacher=torch.zeros(2, vocab))
    true_stats, true_grad = zero.truth()
    torch.testing.assert_close(stats[-2:, 0].double().cpu(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(student[-2:].cpu(), true_grad) < 4e-3
    assert not stats[:-2].any() and not student[:-2].any()


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("constant", [2e4, -2e4])
def test_far_maxima(divergence: int, delta: bool, constant: float) -> None:
    """A softmax ignores a constant, however large; the numbers are exact in fp32."""
    case = make_case(divergence, delta, rows=2, vocab=300)
    case.student = (case.student * 256).round() / 256
    case.teacher = (case.teacher * 256).round() / 256
    true_stats, true_grad = case.truth()
    case.student += constant
    stats, grad = case.run(divergence_rows)
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=5e-3, atol=0)
    assert relative_error(grad, true_grad) < 5e-3
