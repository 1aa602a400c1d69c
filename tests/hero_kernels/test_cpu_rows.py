"""The C++ row kernel against textbook formulas in fp64 (row_cases.py)."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from row_cases import (
    DELTA,
    DIVERGENCES,
    FLOATS,
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    Case,
    check,
    far_apart,
    make_case,
    relative_error,
)
from torch import Tensor

from hero_kernels import cpu, rows
from hero_kernels.cpu import divergence_rows

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))


@DIVERGENCES
@DELTA
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(FLOATS, FLOATS)), ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:]
)
def test_every_pair_of_dtypes(
    divergence: int, delta: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = make_case(divergence, delta)
    check(
        divergence_rows,
        replace(case, student=case.student.to(dtypes[0]), teacher=case.teacher.to(dtypes[1])),
    )


@DIVERGENCES
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_every_gradient_dtype(divergence: int, grad_dtype: torch.dtype) -> None:
    check(divergence_rows, make_case(divergence, True), grad_dtype)


@DIVERGENCES
@pytest.mark.parametrize("vocab", [1, 2, 15, 123, 1024, 1025, 32769])
def test_every_length_of_row(divergence: int, vocab: int) -> None:
    case = make_case(divergence, True, vocab=vocab)
    if vocab > 1:
        return check(divergence_rows, case)
    stats, grad = case.run(divergence_rows)
    assert stats[:, 0].eq(0).all() and grad.eq(0).all()


@DIVERGENCES
@DELTA
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 6.0},
        {"softcap": 30.0, "logit_scale": 0.7, "inv_temperature": 1.4, "bias": True},
        {"logit_scale": 0.7, "inv_temperature": 0.5, "beta": 0.2, "bias": True},
        {"beta": 0.9},
    ],
    ids=lambda options: "-".join(options),
)
def test_transforms(divergence: int, delta: bool, options: dict[str, Any]) -> None:
    options = dict(options)
    if options.pop("bias", False):
        options["student_bias"], options["teacher_bias"] = torch.randn(2, 1300).bfloat16()
    check(divergence_rows, make_case(divergence, delta, **options))


@DIVERGENCES
@pytest.mark.parametrize("softcap", [0.0, 20.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 5e-5])
def test_nearby_distributions_keep_relative_accuracy(
    divergence: int, softcap: float, scale: float
) -> None:
    """KL from 1 down to 1e-9, with a constant offset of delta and large logits."""
    case = make_case(divergence, True, vocab=5000, scale=scale, softcap=softcap)
    case.student += scale
    stats, grad = case.run(divergence_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
@DELTA
def test_equal_distributions_are_exactly_zero(divergence: int, delta: bool) -> None:
    case = make_case(
        divergence, delta, scale=0.0, logit_scale=0.3, inv_temperature=0.7, softcap=11.0
    )
    stats, grad = case.run(divergence_rows)
    assert stats[:, 0].eq(0).all()
    assert grad.eq(0).all()


@DIVERGENCES
@DELTA
def test_distant_distributions(divergence: int, delta: bool) -> None:
    """Log ratios beyond 30, where p_t e^x over- or underflows, and a student offset by a constant.

    Where the supports hardly meet, the JSD is flat and its gradient a difference of equal numbers.
    """
    case = make_case(divergence, delta, scale=40.0)
    case.student += 50.0
    stats, grad = case.run(divergence_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert (grad - true_grad).norm() < 1e-5 * (true_grad.norm() + 1e-2)
    if divergence == JSD:
        assert stats[:, 0].max() <= 0.6931472


@DIVERGENCES
@DELTA
def test_masked_vocabulary(divergence: int, delta: bool) -> None:
    """-inf on both sides: as if the columns were not there."""
    case = make_case(divergence, delta, vocab=500)
    kept = torch.rand(500) < 0.6
    shorter = replace(case, student=case.student[:, kept], teacher=case.teacher[:, kept])
    case.teacher[:, ~kept] = -torch.inf
    case.student[:, ~kept] = torch.nan if delta else -torch.inf  # -inf - -inf
    stats, grad = case.run(divergence_rows)
    true_stats, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad[:, kept], true_grad) < 1e-5
    assert grad[:, ~kept].eq(0).all()


def test_masks_that_differ_are_finite_for_jsd() -> None:
    case = make_case(JSD, False, vocab=200)
    case.teacher[:, :50] = -torch.inf
    case.student[:, 150:] = -torch.inf
    stats, grad = case.run(divergence_rows)
    finite = replace(
        case, student=case.student.clamp(min=-300), teacher=case.teacher.clamp(min=-300)
    )
    true_stats, true_grad = finite.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
@DELTA
def test_padding_columns_are_ignored(divergence: int, delta: bool) -> None:
    case = make_case(divergence, delta, vocab=1100, vocab_size=1037)
    case.student[:, 1037:] = torch.nan
    case.teacher[:, 1037:] = 1e30
    check(divergence_rows, case)
    assert case.run(divergence_rows)[1][:, 1037:].eq(0).all()


@DIVERGENCES
@DELTA
def test_statistics(divergence: int, delta: bool) -> None:
    case = make_case(divergence, delta, rows=40, vocab=50, scale=1.5, with_stats=True)
    case.target_ids = torch.randint(-1, 50, (40,))
    agree = case.truth()[0][:, 6].mean()
    assert 0 < agree < 1
    check(divergence_rows, case)


@DIVERGENCES
@pytest.mark.parametrize("is_clip", [0.0, 1.1], ids=["unclipped", "clipped"])
def test_row_weights_and_importance_ratio(divergence: int, is_clip: float) -> None:
    case = make_case(divergence, True, rows=30, vocab=50, is_clip=is_clip)
    case.row_weights = torch.rand(30)
    case.target_ids = torch.randint(-1, 50, (30,))
    case.old_logprobs = case.truth()[0][:, 2].float() + 0.3 * torch.randn(30)
    ratio = case.truth()[0][:, 1]
    assert ratio.min() < 1 < ratio.max()
    check(divergence_rows, case)


@DIVERGENCES
def test_weight_zero_hides_garbage(divergence: int) -> None:
    case = make_case(divergence, False, rows=4)
    case.row_weights = torch.tensor([1.0, 0.0, 0.0, 1.0])
    case.student[1] = torch.nan
    case.teacher[3, 7] = torch.nan
    stats, grad = case.run(divergence_rows)
    truth, _ = make_case(divergence, False, rows=4).truth()
    assert grad[1:3].eq(0).all()
    assert stats[1].eq(0).all()
    assert stats[2, 0].item() == pytest.approx(truth[2, 0].item(), rel=1e-5)
    assert stats[3, 0].isnan() and grad[3].isnan().all()


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target", ["student", "teacher"])
def test_gradient_in_place(divergence: int, delta: bool, dtype: torch.dtype, target: str) -> None:
    case = make_case(divergence, delta)
    case = replace(case, student=case.student.to(dtype), teacher=case.teacher.to(dtype))
    stats, grad = case.run(divergence_rows, dtype)
    inputs = {"student": case.student, "teacher": case.teacher}
    in_place = divergence_rows(case.student, case.teacher, inputs[target], **case.options())
    assert torch.equal(in_place, stats)
    assert torch.equal(inputs[target], grad)


@DELTA
def test_more_than_2_31_logits(delta: bool) -> None:
    """64-bit offsets: rows so far apart that the last starts beyond element 2^31."""
    case = make_case(JSD, delta)
    far = replace(case, student=far_apart(case.student), teacher=far_apart(case.teacher))
    assert far.student.stride(0) * 2 > 2**31
    stats = divergence_rows(far.student, far.teacher, far.student, **far.options())
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(far.student, true_grad) < 1e-5


@DIVERGENCES
def test_rows_that_hold_logits_among_differences(divergence: int) -> None:
    """`absolute_rows`: what `chunked.difference_operand` leaves where delta would be rounded."""
    case = make_case(divergence, True, scale=2.0, vocab=300, softcap=20.0)
    case.student_bias = case.teacher_bias = torch.randn(300)
    case.student[1] += case.teacher[1]
    case.absolute_rows = torch.tensor([False, True, False])
    check(divergence_rows, case)


def test_no_gradient_wanted() -> None:
    case = make_case(JSD, True)
    before = case.student.clone()
    stats = divergence_rows(case.student, case.teacher, None, **case.options())
    assert torch.equal(stats, case.run(divergence_rows)[0])
    assert torch.equal(case.student, before)


@DELTA
def test_strided_and_expanded_rows(delta: bool) -> None:
    case = make_case(FORWARD_KL, delta, rows=6)
    expanded = replace(
        case, student=case.student[::2, 100:900], teacher=case.teacher[:1, 100:900].expand(3, 800)
    )
    workspace = torch.full((3, 2, 800), 7.0)
    stats = divergence_rows(
        expanded.student, expanded.teacher, workspace[:, 0], **expanded.options()
    )
    true_stats, true_grad = expanded.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(workspace[:, 0], true_grad) < 1e-5
    assert workspace[:, 1].eq(7.0).all()


@DIVERGENCES
def test_bitwise_equal_for_any_number_of_threads(divergence: int) -> None:
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
def test_every_instruction_set(divergence: int, name: str) -> None:
    level = cpu.INSTRUCTION_SETS.index(name)
    if level > cpu.INSTRUCTION_SETS.index(cpu.instruction_set()):
        pytest.skip(f"this machine has no {name}")
    case = make_case(divergence, True, vocab=3000, with_stats=True)
    grad = torch.empty(case.student.shape)
    options = case.options()
    op = torch.ops.hero_kernels.divergence_rows_
    stats = op(case.student, case.teacher, grad, **options, instruction_set=level)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DELTA
def test_opcheck(delta: bool) -> None:
    case = make_case(JSD, delta, vocab=40, target_ids=torch.tensor([1, -1, 39]))
    op = torch.ops.hero_kernels.divergence_rows_.default
    for grad in (None, torch.empty(3, 40, dtype=torch.bfloat16)):
        arguments = (case.student, case.teacher, grad)
        torch.library.opcheck(op, arguments, {**case.options(), "instruction_set": -1})


def test_compiled_equals_eager() -> None:
    case = make_case(REVERSE_KL, True, vocab=200)

    def loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(student)
        stats = divergence_rows(2 * student, teacher, grad, **case.options())
        return stats[:, 0].sum(), grad + 1

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        compiled(case.student, case.teacher), loss(case.student, case.teacher), strict=True
    ):
        assert torch.equal(ours, eager)


def test_no_rows() -> None:
    case = make_case(JSD, True)
    case = replace(case, student=case.student[:0], teacher=case.teacher[:0])
    assert case.run(divergence_rows)[0].shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": torch.zeros(3, 7)},
            r"teacher must be \[R, V\] = \[3, 8\] like student, got \[3, 7\]",
        ),
        ({"student": torch.zeros(3, 8).double()}, "student must be one of .* got torch.float64"),
        ({"teacher": torch.zeros(8, 3).t()}, "teacher must have last stride 1"),
        ({"vocab_size": 9}, r"vocab_size must be in \[1, 8\] .* got 9"),
        ({"target_ids": torch.tensor([0, 8, 1])}, r"target_ids must be in \[0, 8\).* from 0 to 8"),
        (
            {"target_ids": torch.tensor([0, -2, 1])},
            r"target_ids must be in \[0, 8\).* from -2 to 1",
        ),
        ({"row_weights": torch.ones(4)}, r"row_weights must be a contiguous \[3\] tensor"),
        ({"old_logprobs": torch.ones(3).double()}, "old_logprobs must be .* of torch.float32"),
        ({"student_bias": torch.zeros(7)}, r"A bias must have shape \[8\] .* got \[7\]"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = replace(Case(torch.zeros(3, 8), torch.zeros(3, 8), True, JSD), **change)
    with pytest.raises(ValueError, match=message):
        divergence_rows(case.student, case.teacher, None, **case.options())


def test_gradient_that_half_overlaps_its_input_is_refused() -> None:
    case = make_case(JSD, True, vocab=8)
    with pytest.raises(ValueError, match="grad shares the memory of student"):
        divergence_rows(
            case.student, case.teacher, case.student.view(torch.bfloat16)[:, :8], **case.options()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_time_of_a_chunk(dtype: torch.dtype) -> None:
    """256 rows of SmolLM2's vocabulary; prints, and fails only without vector code."""
    case = make_case(JSD, True, rows=256, vocab=49152)
    case = replace(case, student=case.student.to(dtype), teacher=case.teacher.to(dtype))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        divergence_rows(case.student, case.teacher, case.student, **case.options())
        seconds.append(time.perf_counter() - start)
    setting = f"{dtype}, {torch.get_num_threads()} threads, {cpu.instruction_set()}"
    print(f"\n256 x 49152 {setting}: {min(seconds) * 1e3:.1f} ms")
    assert min(seconds) < 2.0


@DIVERGENCES
def test_columns_that_the_teacher_alone_masks(divergence: int) -> None:
    """The torch and the C++ kernel agree with p_t = 0 there; for the KL(p_s | p_t), which is
    infinite, a log ratio of 1e4 takes infinity's place."""
    case = make_case(divergence, False, vocab=200)
    case.teacher[:, :50] = -torch.inf
    stats, grad = case.run(divergence_rows)
    in_torch, torch_grad = case.run(rows.divergence_rows)
    assert stats[:, 0].isfinite().all() and in_torch[:, 0].isfinite().all()
    # Of 1e4 one kernel takes log ratios before, the other after their normaliser is subtracted.
    tolerance = 1e-3 if divergence == REVERSE_KL else 1e-5
    torch.testing.assert_close(in_torch[:, 0], stats[:, 0], rtol=tolerance, atol=0)
    assert relative_error(torch_grad, grad.double()) < tolerance
    if divergence != REVERSE_KL:
        lower = replace(case, teacher=case.teacher.clamp(min=-300))
        torch.testing.assert_close(stats[:, 0].double(), lower.truth()[0][:, 0], rtol=1e-5, atol=0)
