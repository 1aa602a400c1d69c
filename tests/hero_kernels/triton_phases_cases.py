"""Cases of the Triton phases against textbook formulas in fp64 (row_cases.py).

test_triton_phases.py runs this file in a process of its own, see triton_phases_tools.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from row_cases import (
    DELTA,
    DIVERGENCES,
    JSD,
    REVERSE_KL,
    Case,
    check,
    make_case,
    relative_error,
)
from torch import Tensor
from triton_phases_tools import (
    DEVICE,
    SMALL_BLOCKS,
    offsets,
    on_device,
    phased_rows,
    true_statistics,
)

from hero_kernels import phases
from hero_kernels.phases import Scaling
from hero_kernels.triton.configs import RowConfig
from hero_kernels.triton.phases import pieces, row_statistics, row_values
from hero_kernels.triton.statistics import merge_statistics


@DIVERGENCES
@pytest.mark.parametrize(
    ("delta", "dtype"), [(True, torch.bfloat16), (True, torch.float16), (False, torch.float32)]
)
def test_dtypes(divergence: int, delta: bool, dtype: torch.dtype) -> None:
    case = make_case(divergence, delta, rows=2, vocab=300)
    check(phased_rows, replace(case, student=case.student.to(dtype)), dtype)


@DIVERGENCES
@DELTA
def test_transforms_targets_ratio_and_statistics(divergence: int, delta: bool) -> None:
    case = make_case(divergence, delta, rows=4, vocab=300, scale=0.5, with_stats=True)
    case.beta, case.softcap, case.logit_scale, case.inv_temperature = 0.3, 9.0, 0.8, 1.25
    case.student_bias, case.teacher_bias = torch.randn(2, 300)
    case.target_ids = torch.tensor([0, 299, -1, 130])
    case.old_logprobs = case.truth()[0][:, 2].float() + torch.tensor([0.3, -0.3, 0.0, -0.1])
    case.row_weights, case.is_clip = torch.rand(4), 1.2
    check(phased_rows, case)


@DELTA
@pytest.mark.parametrize("divergence", [1, REVERSE_KL], ids=["forward", "reverse"])
def test_values_and_gradient_in_one_sweep(divergence: int, delta: bool) -> None:
    def fused(*tensors: Tensor, **options: Any) -> Tensor:
        return phased_rows(*tensors, cuts=(100,), fused=True, **options)

    case = make_case(divergence, delta, rows=3, vocab=300, with_stats=True, softcap=12.0)
    check(fused, case)


def test_jsd_has_no_fused_sweep() -> None:
    case = make_case(JSD, True, rows=1, vocab=200)
    grad = torch.empty(1, 200)
    with pytest.raises(ValueError, match="forward or reverse KL, got the JSD"):
        phased_rows(case.student, case.teacher, grad, fused=True, **case.options())


@DIVERGENCES
@pytest.mark.parametrize(
    ("scale", "constant", "softcap"), [(1e-2, 0.2, 20.0), (1e-4, 1e-4, 0.0), (1e-4, 3.0, 0.0)]
)
def test_nearby_distributions_keep_relative_accuracy(
    divergence: int, scale: float, constant: float, softcap: float
) -> None:
    """Also where the logits of the student are all higher, which the distribution ignores."""
    case = make_case(divergence, True, rows=2, vocab=500, scale=scale, softcap=softcap)
    # The sum of the two is what is stored: it must not be rounded in fp32 of a large number.
    case.student = (case.student * 2**20).round() / 2**20 + constant
    case.teacher = (case.teacher * 2**10).round() / 2**10
    stats, grad = case.run(phased_rows)
    true_stats, true_grad = case.truth()
    error = 2e-5 if constant < 1 else 5e-3
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=error, atol=0)
    assert relative_error(grad, true_grad) < error


@DIVERGENCES
@DELTA
def test_equal_distributions_are_exactly_zero(divergence: int, delta: bool) -> None:
    case = make_case(divergence, delta, rows=2, vocab=300, scale=0.0, softcap=11.0)
    case.student_bias = case.teacher_bias = torch.randn(300)
    stats, grad = case.run(phased_rows)
    assert stats[:, 0].eq(0).all()
    assert grad.eq(0).all()


@DIVERGENCES
@DELTA
def test_distant_distributions(divergence: int, delta: bool) -> None:
    """Log ratios for which p_t exp(x) over- or underflows, and a student offset by a constant."""
    case = make_case(divergence, delta, rows=2, vocab=300, scale=40.0)
    case.student += 50.0
    stats, grad = case.run(phased_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert (grad - true_grad).norm() < 1e-5 * (true_grad.norm() + 1e-2)


@DIVERGENCES
@DELTA
def test_masked_and_padding_columns(divergence: int, delta: bool) -> None:
    """Whole pieces of them too: 100 to 230 is masked, 260 on is padding."""
    case = make_case(divergence, delta, rows=2, vocab=420, softcap=0.0 if delta else 30.0)
    kept = torch.rand(420) < 0.6
    kept[100:230], kept[260:] = False, False
    shorter = replace(case, student=case.student[:, kept], teacher=case.teacher[:, kept])
    case.softcap, shorter.softcap = 0.0, 0.0
    case.teacher[:, ~kept] = -torch.inf
    case.student[:, ~kept] = torch.nan if delta else -torch.inf
    case.teacher[:, 260:] = torch.nan

    def in_four_pieces(*tensors: Tensor, **options: Any) -> Tensor:
        return phased_rows(*tensors, cuts=(100, 230, 350), **options)

    stats, grad = replace(case, vocab_size=260).run(in_four_pieces)
    true_stats, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad[:, kept], true_grad) < 1e-5
    assert grad[:, ~kept].eq(0).all()


def test_nan_in_padding_stays_there_under_a_soft_cap() -> None:
    case = make_case(REVERSE_KL, True, rows=2, vocab=300, softcap=9.0, vocab_size=260)
    case.student[:, 260:] = case.teacher[:, 260:] = torch.nan
    check(phased_rows, case)


@DIVERGENCES
def test_a_piece_that_only_the_teacher_masks(divergence: int) -> None:
    """The student's mass there is missing from sum p_t exp(gap): the normalisers must serve."""
    case = make_case(divergence, False, rows=2, vocab=300)
    case.teacher[:, 100:230] = -150.0
    stats, grad = case.run(phased_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5
    if divergence != REVERSE_KL:  # which would be infinite
        case.teacher[:, 100:230] = -torch.inf
        stats, grad = case.run(phased_rows)
        torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
        assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
def test_scale_zero_hides_garbage(divergence: int) -> None:
    case = make_case(divergence, False, rows=2, vocab=300)
    case.row_weights = torch.tensor([0.0, 1.0])
    case.student[0] = torch.nan
    stats, grad = case.run(phased_rows)
    assert grad[0].eq(0).all()
    assert stats[0, 0].isnan() and stats[1].isfinite().all() and grad[1].ne(0).any()


@pytest.mark.parametrize("divergence", [JSD, REVERSE_KL], ids=["jsd", "reverse"])
@pytest.mark.parametrize("target", ["student", "teacher"])
def test_gradient_in_place(divergence: int, target: str) -> None:
    case = make_case(divergence, True, rows=2, vocab=300)
    stats, grad = case.run(phased_rows)
    inputs = {"student": case.student, "teacher": case.teacher}
    in_place = phased_rows(case.student, case.teacher, inputs[target], **case.options())
    assert torch.equal(in_place, stats)
    assert torch.equal(inputs[target], grad)


@DELTA
def test_statistics_follow_their_definition(delta: bool) -> None:
    case = make_case(0, delta, rows=3, vocab=300)
    case.target_ids = torch.tensor([299, -1, 7])
    scaling = Scaling(1.0, 0.0, 1.0, None, None)
    statistics = row_statistics(
        case.student.to(DEVICE),
        case.teacher.to(DEVICE),
        delta=delta,
        scaling=scaling,
        target_ids=on_device(case.target_ids),
        vocab_size=300,
        config=SMALL_BLOCKS,
    )
    ours, truth = statistics.double().cpu(), true_statistics(case)
    shift = ours[:, phases.SHIFT].clone()
    far = (truth[:, phases.MAX_S] - truth[:, phases.MAX_T]).abs() > 0.25
    assert shift[~far].eq(0).all()
    truth[:, phases.SHIFT] = shift
    truth[:, phases.MEAN] -= shift * truth[:, phases.SUM_S]
    truth[:, phases.GROWTH] = (-shift).exp() * truth[:, phases.GROWTH] + torch.expm1(
        -shift
    ) * truth[:, phases.SUM_T]
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_merging_is_associative_up_to_rounding() -> None:
    case = make_case(0, True, rows=3, vocab=600, scale=3.0)
    scaling = Scaling(1.0, 0.0, 1.0, None, None)
    parts = torch.stack(
        [
            row_statistics(
                case.student[:, begin : begin + 60].to(DEVICE),
                case.teacher[:, begin : begin + 60].to(DEVICE),
                delta=True,
                scaling=scaling,
                first_column=begin,
                vocab_size=600,
                config=SMALL_BLOCKS,
            )
            for begin in range(0, 600, 60)
        ]
    )
    at_once = merge_statistics(parts)
    nested = merge_statistics(
        torch.stack([merge_statistics(parts[:3]), merge_statistics(parts[3:])])
    )
    torch.testing.assert_close(at_once, nested, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.stack(offsets(at_once.double().cpu())),
        torch.stack(offsets(true_statistics(case))),
        rtol=1e-5,
        atol=1e-6,
    )


def test_more_parts_than_a_block_of_the_merge() -> None:
    """150 parts of two blocks and a bit, in the layout the GEMM leaves them in."""
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(11, 150, generator=generator).double()
    gap = torch.randn(11, 150, generator=generator).double()
    parts = torch.zeros(150, 12, 11)
    parts[:, phases.MAX_T], parts[:, phases.MAX_S] = z.t().float(), (z + gap).t().float()
    parts[:, phases.SUM_T] = parts[:, phases.SUM_S] = 1.0
    parts[:, phases.SHIFT] = gap.t().float()  # each part is a single column
    parts[:, phases.TOP_T] = parts[:, phases.TOP_S] = torch.arange(150.0)[:, None]
    merged = merge_statistics(parts.transpose(1, 2).to(DEVICE)).double().cpu()
    truth = true_statistics(Case(gap, z, True, 0))
    for column in (phases.MAX_T, phases.SUM_T, phases.MAX_S, phases.SUM_S):
        torch.testing.assert_close(merged[:, column], truth[:, column], rtol=1e-5, atol=0)
    assert torch.equal(merged[:, phases.TOP_T], truth[:, phases.TOP_T])
    assert torch.equal(merged[:, phases.TOP_S], truth[:, phases.TOP_S])
    for ours, expected in zip(offsets(merged), offsets(truth), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_few_long_rows_are_cut_into_pieces() -> None:
    case = make_case(JSD, True, rows=1, vocab=16_500, with_stats=True)
    case.target_ids = torch.tensor([16_499])
    blocks = RowConfig(block_v=1024, num_warps=4)
    assert pieces(1, 16_500, blocks.block_v)[0] > 1

    def in_one(*tensors: Tensor, **options: Any) -> Tensor:
        return phased_rows(*tensors, cuts=(), config=blocks, **options)

    check(in_one, case)


def test_pieces_cover_the_columns_in_whole_blocks() -> None:
    for rows, columns in ((1, 151_936), (7, 49_152), (1023, 151_936), (5000, 151_936), (3, 100)):
        parts, piece = pieces(rows, columns, 1024)
        assert piece % 1024 == 0 and (parts - 1) * piece < columns <= parts * piece
    assert pieces(1024, 151_936, 1024)[0] == 1


def test_no_rows() -> None:
    case = make_case(REVERSE_KL, True, rows=2, vocab=300)
    empty = replace(case, student=case.student[:0], teacher=case.teacher[:0])
    assert empty.run(phased_rows)[0].shape == (0, 8)


def test_errors_name_what_was_got_and_expected() -> None:
    tensor = torch.zeros(2, 64, device=DEVICE)
    scaling = Scaling(1.0, 0.0, 1.0, None, None)
    common: dict[str, Any] = {"delta": True, "vocab_size": 64, "config": SMALL_BLOCKS}
    with pytest.raises(ValueError, match=r"first_column must be at least 0 .* got -1"):
        row_statistics(tensor, tensor, scaling=scaling, first_column=-1, **common)
    with pytest.raises(ValueError, match=r"teacher_bias must be a contiguous \[64\]"):
        bias = torch.zeros(65, device=DEVICE)
        row_statistics(tensor, tensor, scaling=scaling._replace(teacher_bias=bias), **common)
    with pytest.raises(ValueError, match=r"statistics must be a contiguous \[2, 12\]"):
        row_values(
            tensor,
            tensor,
            tensor,
            scaling=scaling,
            divergence=0,
            beta=0.5,
            with_stats=False,
            **common,
        )
    with pytest.raises(ValueError, match=r"parts must be \[P, R, 12\]"):
        merge_statistics(tensor)


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
    stats, grad = case.run(phased_rows)
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=5e-3, atol=0)
    assert relative_error(grad, true_grad) < 5e-3
