"""The C++ row kernel against textbook formulas in fp64 (tile_cases.py)."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tile_cases import (
    DELTA,
    DIVERGENCES,
    FLOATS,
    FORWARD_KL,
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
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 6.0},
        {"softcap": 30.0, "logit_scale": 0.7, "temperature": 0.7, "bias": True},
        {"logit_scale": 0.7, "temperature": 2.0, "beta": 0.2, "bias": True},
        {"beta": 0.9},
    ],
    ids=lambda options: "-".join(options),
)
def test_transforms(divergence: str, delta: bool, options: dict[str, Any]) -> None:
    options = dict(options)
    if options.pop("bias", False):
        options["student_bias"], options["teacher_bias"] = torch.randn(2, 1300)
    check(divergence_rows, make_case(divergence, delta, **options))


@DIVERGENCES
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 5e-5])
def test_nearby_distributions_keep_relative_accuracy(
    divergence: str, softcap: float, scale: float
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
def test_equal_distributions_are_exactly_zero(divergence: str, delta: bool) -> None:
    case = make_case(divergence, delta, scale=0.0, logit_scale=0.3, temperature=1.4, softcap=11.0)
    stats, grad = case.run(divergence_rows)
    assert stats[:, 0].eq(0).all()
    assert grad.eq(0).all()


@DIVERGENCES
@DELTA
def test_distant_distributions(divergence: str, delta: bool) -> None:
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
def test_masked_vocabulary(divergence: str, delta: bool) -> None:
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
def test_padding_columns_are_ignored(divergence: str, delta: bool) -> None:
    case = make_case(divergence, delta, vocab=1100, num_real=1037)
    case.student[:, 1037:] = torch.nan
    case.teacher[:, 1037:] = 1e30
    check(divergence_rows, case)
    assert case.run(divergence_rows)[1][:, 1037:].eq(0).all()


@DIVERGENCES
@DELTA
def test_statistics(divergence: str, delta: bool) -> None:
    case = make_case(divergence, delta, rows=40, vocab=50, scale=1.5, with_stats=True)
    case.target_ids = torch.randint(-1, 50, (40,))
    agree = case.truth()[0][:, 6].mean()
    assert 0 < agree < 1
    check(divergence_rows, case)


@DIVERGENCES
@pytest.mark.parametrize("is_clip", [None, 1.1], ids=["unclipped", "clipped"])
def test_row_weights_and_importance_ratio(divergence: str, is_clip: float | None) -> None:
    case = make_case(divergence, True, rows=30, vocab=50, is_clip=is_clip)
    case.row_weights = torch.rand(30)
    case.target_ids = torch.randint(-1, 50, (30,))
    case.old_logprobs = case.truth()[0][:, 2].float() + 0.3 * torch.randn(30)
    ratio = case.truth()[0][:, 1]
    assert ratio.min() < 1 < ratio.max()
    check(divergence_rows, case)


@DIVERGENCES
def test_weight_zero_hides_garbage(divergence: str) -> None:
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
def test_rows_that_hold_logits_among_differences(divergence: str) -> None:
    """`absolute_rows`: what `tiles.py` leaves where delta would be rounded."""
    case = make_case(divergence, True, scale=2.0, vocab=300, softcap=20.0)
    case.student_bias = case.teacher_bias = torch.randn(300)
    case.student[1] += case.teacher[1]
    case.absolute_rows = torch.tensor([False, True, False])
    check(divergence_rows, case)


def test_no_gradient_wanted() -> None:
    case = make_case(JSD, True)
    before = case.student.clone()
    stats = case.call(divergence_rows, None)
    assert torch.equal(stats, case.run(divergence_rows)[0])
    assert torch.equal(case.student, before)


@DELTA
def test_strided_and_expanded_rows(delta: bool) -> None:
    case = make_case(FORWARD_KL, delta, rows=6)
    expanded = replace(
        case, student=case.student[::2, 100:900], teacher=case.teacher[:1, 100:900].expand(3, 800)
    )
    workspace = torch.full((3, 2, 800), 7.0)
    stats = expanded.call(divergence_rows, workspace[:, 0])
    true_stats, true_grad = expanded.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(workspace[:, 0], true_grad) < 1e-5
    assert workspace[:, 1].eq(7.0).all()


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
