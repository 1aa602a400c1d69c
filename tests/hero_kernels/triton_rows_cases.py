"""Cases of the Triton row kernels against textbook formulas in fp64 (tile_cases.py).

Run by test_triton_cases.py, in Triton's interpreter or on a GPU. Whole rows by `divergence_rows`,
and column tiles by the functions it is made of. In the interpreter blocks have 128 columns, so that
rows of 200 have two.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tile_cases import (
    DELTA,
    DIVERGENCES,
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    Case,
    RowKernel,
    check,
    make_case,
    relative_error,
    swept,
)
from torch import Tensor
from triton_tools import DEVICE, mend_interpreter, to_device

from hero_kernels import reference
from hero_kernels.objective import Objective
from hero_kernels.triton import rows as kernels
from hero_kernels.types import RowTensors, Tile

if DEVICE == "cpu":
    mend_interpreter()


def whole_rows(tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool) -> Tensor:
    ours = to_device(tile)
    if tile.grad is not None and tile.grad is tile.student:
        ours = ours._replace(grad=ours.student)
    stats = kernels.divergence_rows(ours, to_device(rows), objective, with_stats)
    if tile.grad is not None:
        tile.grad.copy_(ours.grad)
    return stats.cpu()


def in_tiles(*cuts: int) -> RowKernel:
    return swept(kernels, *cuts, at=to_device)


KERNELS = pytest.mark.parametrize(
    "kernel", [whole_rows, in_tiles(100, 230, 350)], ids=["whole", "tiles"]
)


@DIVERGENCES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(divergence: str, dtype: torch.dtype) -> None:
    case = make_case(divergence, True, rows=1, vocab=200)
    check(whole_rows, replace(case, student=case.student.to(dtype)), dtype)


@KERNELS
@DIVERGENCES
@DELTA
def test_everything_a_tile_may_have(kernel: RowKernel, divergence: str, delta: bool) -> None:
    """Biases, scale, soft cap, temperatures, targets, a clipped ratio, padding with NaN, rows that
    are not adjacent, and rows that hold raw logits among differences."""
    case = make_case(divergence, delta, rows=8, vocab=300, scale=0.5, with_stats=True)
    case.student, case.teacher = case.student[::2], case.teacher[1::2]
    case.beta, case.softcap, case.logit_scale = 0.3, 9.0, 0.8
    case.student_bias = case.teacher_bias = torch.randn(300)
    if delta:
        case.absolute_rows = torch.tensor([False, True, False, False])
        case.student[1] += case.teacher[1]
    else:
        case.teacher_bias = torch.randn(300)
    case.temperatures = torch.tensor([0.7, 1.0, 1.3, 2.0])
    case.target_ids = torch.tensor([0, 279, -1, 130])
    case.num_real = 280
    case.student[:, 280:] = case.teacher[:, 280:] = torch.nan
    case.old_logprobs = case.truth()[0][:, 2].float() + torch.tensor([0.3, -0.3, 0.0, -0.1])
    case.row_weights, case.is_clip = torch.rand(4), 1.2
    check(kernel, case)


def test_a_ratio_without_a_bound() -> None:
    case = make_case(FORWARD_KL, True, rows=2, vocab=200, temperature=0.8)
    case.target_ids, case.old_logprobs = torch.tensor([0, 199]), torch.tensor([-9.0, -1.0])
    check(whole_rows, case)


@DIVERGENCES
@pytest.mark.parametrize(
    ("scale", "constant", "softcap"),
    [(1.0, 1.0, None), (1e-2, 0.2, 20.0), (1e-4, 1e-4, None), (1e-4, 3.0, None)],
)
def test_nearby_distributions_keep_relative_accuracy(
    divergence: str, scale: float, constant: float, softcap: float | None
) -> None:
    """Also where the logits of the student are all higher, which the distribution ignores."""
    case = make_case(divergence, True, rows=1, vocab=200, scale=scale, softcap=softcap)
    # The sum of the two is what is stored: it must not be rounded in fp32 of a large number.
    case.student = (case.student * 2**20).round() / 2**20 + constant
    case.teacher = (case.teacher * 2**10).round() / 2**10
    stats, grad = case.run(whole_rows)
    true_stats, true_grad = case.truth()
    error = 2e-5 if constant < 3 else 5e-3
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=error, atol=0)
    assert relative_error(grad, true_grad) < error


@DIVERGENCES
@DELTA
def test_equal_distributions_are_exactly_zero(divergence: str, delta: bool) -> None:
    case = make_case(divergence, delta, rows=1, vocab=200, scale=0.0, softcap=11.0)
    case.student_bias = case.teacher_bias = torch.randn(200)
    stats, grad = case.run(whole_rows)
    assert stats[:, 0].eq(0).all() and grad.eq(0).all()


@DIVERGENCES
@DELTA
def test_distant_distributions(divergence: str, delta: bool) -> None:
    """Log ratios for which p_t exp(x) over- or underflows, and a student offset by a constant."""
    case = make_case(divergence, delta, rows=2, vocab=200, scale=40.0)
    case.student += 50.0
    stats, grad = case.run(in_tiles(100))
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert (grad - true_grad).norm() < 1e-5 * (true_grad.norm() + 1e-2)


@DIVERGENCES
@pytest.mark.parametrize(("delta", "constant"), [(True, 2e4), (False, -2e4)])
def test_far_maxima(divergence: str, delta: bool, constant: float) -> None:
    """A softmax ignores a constant, however large; the numbers are exact in fp32."""
    case = make_case(divergence, delta, rows=1, vocab=200)
    case.student = (case.student * 256).round() / 256
    case.teacher = (case.teacher * 256).round() / 256
    true_stats, true_grad = case.truth()
    case.student += constant
    stats, grad = case.run(whole_rows)
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=5e-3, atol=0)
    assert relative_error(grad, true_grad) < 5e-3


def in_plain_torch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Values, the student's entropies and gradients of textbook formulas in fp32."""
    raw_s = (case.student + case.teacher if case.delta else case.student).requires_grad_()
    log_s, log_t = raw_s.log_softmax(-1), case.teacher.log_softmax(-1)
    objective = Objective(divergence=case.divergence, beta=case.beta)
    values = reference.divergence(log_s, log_t, objective)
    (grad,) = torch.autograd.grad(values.sum(), raw_s)
    return values.detach(), reference.entropy(log_s).detach(), grad


@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6, 1e-3, 1 - 1e-3])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 20.0])
def test_beta_near_its_ends(beta: float, scale: float) -> None:
    case = make_case(JSD, scale < 1, rows=2, vocab=300, scale=scale, beta=beta)
    stats, grad = case.run(whole_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    # At scale 20 the students are certain but for 1e-5, which is where fp32 ends.
    plain = 0.0 if scale < 20 else relative_error(in_plain_torch(case)[2], true_grad)
    assert relative_error(grad, true_grad) <= max(1e-5, plain)


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("rest", [1e-2, 1e-4])
def test_confident_students(divergence: str, delta: bool, rest: float) -> None:
    """p = 1 - rest: at least as exact as plain torch in fp32."""
    case = make_case(divergence, delta, rows=2, vocab=200, scale=0.5, with_stats=True)
    logits = case.teacher + case.student if delta else case.student
    certain = logits[:, 1:].logsumexp(-1) + math.log((1 - rest) / rest)
    case.teacher[:, 0] = certain - (case.student[:, 0] if delta else 0.3)
    if not delta:
        case.student[:, 0] = certain
    stats, grad = case.run(whole_rows)
    true_stats, true_grad = case.truth()
    values, entropies, plain_grad = in_plain_torch(case)
    assert relative_error(grad, true_grad) <= relative_error(plain_grad, true_grad) + 1e-6
    # An entropy is a sum of terms up to 1, of which each may be rounded.
    for column, plain, rounding in ((0, values, 0.0), (4, entropies, 2e-7)):
        truth = true_stats[:, column]
        allowed = (plain - truth).norm() + 1e-6 * truth.norm() + rounding
        assert (stats[:, column] - truth).norm() <= allowed


@KERNELS
@DIVERGENCES
@DELTA
def test_masked_and_padding_columns(kernel: RowKernel, divergence: str, delta: bool) -> None:
    """Whole tiles of them too: 100 to 230 is masked, 260 on is padding, in tiles also from 350."""
    case = make_case(divergence, delta, rows=1, vocab=420, with_stats=True)
    kept = torch.rand(420) < 0.6
    kept[100:230], kept[260:] = False, False
    shorter = replace(case, student=case.student[:, kept], teacher=case.teacher[:, kept])
    case.teacher[:, ~kept] = -torch.inf
    case.student[:, ~kept] = torch.nan if delta else -torch.inf
    case.teacher[:, 260:] = torch.nan
    case.num_real = 260
    stats, grad = case.run(kernel)
    true_stats, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(stats[:, 4:].double(), true_stats[:, 4:], rtol=2e-6, atol=5e-6)
    assert relative_error(grad[:, kept], true_grad) < 1e-5
    assert grad[:, ~kept].eq(0).all()


@DIVERGENCES
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_columns_that_one_side_alone_masks(divergence: str, side: str) -> None:
    """The oracle gives them exp(-150) on that side. Where the divergence is infinite, statistics
    are not."""
    case = make_case(divergence, False, rows=3, vocab=300, with_stats=True)
    case.target_ids = torch.tensor([7, 110, 299])
    logits = getattr(case, side)
    logits[:, 100:230] = -150.0
    true_stats, true_grad = case.truth()
    logits[:, 100:230] = -torch.inf
    stats, grad = case.run(in_tiles(100, 230))
    if divergence != (REVERSE_KL if side == "teacher" else FORWARD_KL):  # else infinite
        torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
        assert relative_error(grad, true_grad) < 1e-5
    assert stats[:, 2:6].isfinite().all()
    assert stats[:, 2:4].le(0).all() and stats[:, 4:6].ge(0).all()
    torch.testing.assert_close(stats[:, 4:].double(), true_stats[:, 4:], rtol=2e-6, atol=5e-6)
    known = torch.tensor([True, False, True])  # the second target's log p is -inf on one side
    torch.testing.assert_close(
        stats[known, 2:4].double(), true_stats[known, 2:4], rtol=2e-6, atol=5e-6
    )


@KERNELS
@DELTA
def test_certain_rows(kernel: RowKernel, delta: bool) -> None:
    """One column that is not masked: nothing to be uncertain about."""
    case = make_case(JSD, delta, rows=2, vocab=300, with_stats=True)
    case.target_ids = torch.tensor([150, 150])
    others = torch.arange(300) != 150
    case.teacher[:, others] = -torch.inf
    case.student[:, others] = 0.0 if delta else -torch.inf
    stats, grad = case.run(kernel)
    expected = torch.tensor([0.0, 1, 0, 0, 0, 0, 1]).expand(2, 7)
    torch.testing.assert_close(stats[:, :7], expected, rtol=0, atol=1e-7)
    assert stats[:, 2:4].le(0).all() and stats[:, 4:6].ge(0).all()
    assert grad.abs().max() < 1e-7


@DIVERGENCES
def test_weight_zero_hides_garbage(divergence: str) -> None:
    case = make_case(divergence, False, rows=3, vocab=200)
    truth, _ = case.truth()
    case.row_weights = torch.tensor([0.0, 1.0, 1.0])
    case.student[0] = torch.nan
    case.teacher[2, 7] = torch.nan
    stats, grad = case.run(whole_rows)
    assert grad[0].eq(0).all() and grad[1].isfinite().all() and grad[2].isnan().all()
    assert stats[1, 0].item() == pytest.approx(truth[1, 0].item(), rel=1e-5)
    assert stats[2, 0].isnan()


@pytest.mark.parametrize("divergence", [JSD, REVERSE_KL])
def test_gradient_in_place(divergence: str) -> None:
    case = make_case(divergence, True, rows=2, vocab=200)
    stats, grad = case.run(whole_rows)
    assert torch.equal(case.call(whole_rows, case.student), stats)
    assert torch.equal(case.student, grad)


def test_more_tiles_than_the_merge_takes_at_once() -> None:
    case = make_case(JSD, True, rows=1, vocab=130, scale=2.0, with_stats=True)
    case.target_ids = torch.tensor([129])
    check(in_tiles(*range(4, 130, 4)), case)  # 33, and it takes 32


def test_few_long_rows_are_cut_into_pieces() -> None:
    case = make_case(JSD, True, rows=1, vocab=16_500, with_stats=True)
    case.target_ids = torch.tensor([16_499])
    assert kernels.pieces(1, 16_500, 128)[0] > 1
    check(whole_rows, case)


def test_no_gradient_no_rows_no_columns() -> None:
    case = make_case(REVERSE_KL, True, rows=2, vocab=200)
    assert torch.equal(case.call(whole_rows, None), case.run(whole_rows)[0])
    empty = replace(
        case, student=case.student[:0], teacher=case.teacher[:0], row_weights=torch.ones(0)
    )
    assert empty.run(whole_rows)[0].shape == (0, 8)
    check(in_tiles(0, 120), case)  # the first tile has no columns


@pytest.mark.skipif(DEVICE == "cpu", reason="would take hours in the interpreter")
@DIVERGENCES
def test_more_than_2_31_logits(divergence: str) -> None:
    """64-bit offsets: the last rows of a tensor with more elements than an int32 counts."""
    total, vocab = 16_400, 131_072
    student = torch.zeros(total, vocab, dtype=torch.bfloat16, device="cuda")
    case = make_case(divergence, True, rows=2, vocab=vocab)
    case = Case(case.student.bfloat16(), torch.zeros(2, vocab), True, divergence)
    student[-2:] = case.student.cuda()
    teacher = student.new_zeros(1, vocab).expand(total, vocab)
    tile = Tile(student, teacher, student, True, num_real=vocab)
    rows = RowTensors(torch.ones(total, device="cuda"))
    stats = kernels.divergence_rows(tile, rows, Objective(divergence=divergence), False)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[-2:, 0].double().cpu(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(student[-2:].cpu(), true_grad) < 4e-3
    assert not stats[:-2, 0].any() and not student[:-2].any()
