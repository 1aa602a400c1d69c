"""The torch row kernels over any cut of the columns. Oracle: the fp64 formulas of tile_cases.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tile_cases import (
    DELTA,
    DIVERGENCES,
    FLOATS,
    JSD,
    REVERSE_KL,
    Case,
    RowKernel,
    check,
    make_case,
    pieces_of,
    relative_error,
    swept,
)
from torch import Tensor

from hero_kernels import constants as c
from hero_kernels import rows as kernels
from hero_kernels.objective import Objective
from hero_kernels.types import RowTensors, Tile

WAYS: dict[str, RowKernel] = {
    "whole": swept(kernels),
    "ragged": swept(kernels, 1, 3, 640, 1299),
    "padded": swept(kernels, 600, 1200, width=1800),  # the last pieces hold padding, or only that
    "beyond": swept(kernels, 1300, width=1310),
    "uneven": swept(kernels, 1000, 1024, width=5000),
    "at_once": kernels.divergence_rows,
}


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("way", ["at_once", "whole", "ragged", "padded", "beyond"])
def test_any_cut(divergence: str, delta: bool, way: str) -> None:
    options = {
        "target_ids": torch.tensor([1299, -1, 2]),
        "row_weights": torch.tensor([0.3, 1.0, 0.0]),
        "old_logprobs": torch.tensor([-4.0, -1.0, -9.0]),
        "temperatures": torch.tensor([0.8, 1.0, 3.0]),
        "is_clip": 1.5,
        "with_stats": True,
    }
    check(WAYS[way], make_case(divergence, delta, **options))


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_transforms_and_padding(divergence: str, delta: bool, way: str) -> None:
    biases = torch.randn(2, 1300)
    options: dict[str, Any] = {"softcap": 20.0, "logit_scale": 0.7, "temperature": 0.7}
    options |= {"student_bias": biases[0], "teacher_bias": biases[0 if delta else 1]}
    check(WAYS[way], make_case(divergence, delta, **options, beta=0.2, num_real=1111))


@DIVERGENCES
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_storage(divergence: str, dtype: torch.dtype, way: str) -> None:
    case = make_case(divergence, True)
    stored = replace(case, student=case.student.to(dtype), teacher=case.teacher.to(dtype))
    check(WAYS[way], stored, dtype)


@DIVERGENCES
@pytest.mark.parametrize(
    ("softcap", "offset"), [(None, 0.0), (None, 1.0), (None, 40.0), (20.0, 1.0)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("way", ["at_once", "uneven"])
def test_nearby_distributions(
    divergence: str, softcap: float | None, offset: float, scale: float, way: str
) -> None:
    """KL from 1 down to 1e-9 keeps its relative accuracy under a constant that drops out."""
    case = make_case(divergence, True, vocab=5000, scale=scale, softcap=softcap)
    case.student += scale * offset
    stats, grad = case.run(WAYS[way])
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_equal_is_exactly_zero(divergence: str, delta: bool, way: str) -> None:
    options = {"logit_scale": 0.3, "temperature": 1.4, "softcap": 11.0}
    stats, grad = make_case(divergence, delta, scale=0.0, **options).run(WAYS[way])
    assert stats[:, 0].eq(0).all() and grad.eq(0).all()


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("scale", [40.0, 400.0])
@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_distant_distributions(divergence: str, delta: bool, scale: float, way: str) -> None:
    """Where p_t exp(x) over- or underflows, and pieces disagree about the shift.

    The gradient is then a difference of numbers of the divergence's size, which bounds its error.
    """
    case = make_case(divergence, delta, scale=scale)
    case.student[:, :600] += 50.0
    stats, grad = case.run(WAYS[way])
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    rounding = 2.0**-23 * true_stats[:, 0].norm()
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm() + rounding


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_masked_columns_count_nothing(divergence: str, delta: bool, way: str) -> None:
    """-inf on both sides: as if the columns were not there. Entropies are finite and right."""
    case = make_case(divergence, delta, with_stats=True)
    kept = torch.rand(1300) < 0.6
    kept[640:1299] = False  # a piece of the cut, masked throughout
    shorter = replace(case, student=case.student[:, kept], teacher=case.teacher[:, kept])
    case.teacher[:, ~kept] = -torch.inf
    case.student[:, ~kept] = torch.nan if delta else -torch.inf  # -inf - -inf
    stats, grad = case.run(WAYS[way])
    true_stats, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(stats[:, 4:].double(), true_stats[:, 4:], rtol=2e-6, atol=5e-6)
    assert relative_error(grad[:, kept], true_grad) < 1e-5
    assert grad[:, ~kept].eq(0).all()


@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_one_sided_mask(way: str) -> None:
    """A token that the teacher excludes keeps the student's probability."""
    case = make_case(JSD, False)
    case.teacher[:, 7] = -1e4  # what remains of it in fp64 is 0 too
    expected, true_grad = case.truth()
    case.teacher[:, 7] = -torch.inf
    stats, grad = case.run(WAYS[way])
    torch.testing.assert_close(stats[:, 0].double(), expected[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_a_row_without_a_distribution(divergence: str, side: str, way: str) -> None:
    """All of it -inf: NaN for this row where it has weight, a gradient of 0 where it has none."""
    case = make_case(divergence, False)
    expected, true_grad = case.run(WAYS[way])
    for name in ("student", "teacher"):
        if side in (name, "both"):
            getattr(case, name)[1] = -torch.inf
    stats, grad = case.run(WAYS[way])
    assert stats[1, 0].isnan() and grad[1].isnan().all()
    assert torch.equal(stats[[0, 2]], expected[[0, 2]])
    assert torch.equal(grad[[0, 2]], true_grad[[0, 2]])
    _, masked = replace(case, row_weights=torch.tensor([1.0, 0.0, 1.0])).run(WAYS[way])
    assert masked[1].eq(0).all() and torch.equal(masked[[0, 2]], true_grad[[0, 2]])


@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_rows_of_weight_zero_may_hold_anything(way: str) -> None:
    case = make_case(JSD, False)
    case.student[1], case.teacher[2] = torch.nan, torch.inf
    _, grad = replace(case, row_weights=torch.tensor([1.0, 0.0, 0.0])).run(WAYS[way])
    assert grad[1:].eq(0).all() and grad[0].isfinite().all()


def statistics_of(case: Case, edges: list[int]) -> list[Tensor]:
    tile = Tile(
        case.student.double(), case.teacher.double(), None, case.delta,
        num_real=case.student.shape[1],
    )  # fmt: skip
    rows, objective = RowTensors(torch.ones(3).double()), Objective(case.divergence)
    return [kernels.row_statistics(piece, rows, objective) for piece in pieces_of(tile, edges)]


def test_merging_is_associative_and_ignores_empty_pieces() -> None:
    case = make_case(JSD, True, scale=3.0)
    case.student[:, 900:] += 5.0  # two shifts
    parts = statistics_of(case, [0, 300, 900, 1300, 1400])
    assert len({float(part[0, c.SHIFT]) for part in parts}) > 1
    merge = kernels.merge_statistics

    def shifted(statistics: Tensor) -> Tensor:
        """log(sum of exp(z_s) / sum of exp(z_t)), from the growth."""
        growth = statistics[:, c.GROWTH] / statistics[:, c.SUM_T]
        return statistics[:, c.SHIFT] + growth.log1p()

    whole = merge(torch.stack(parts))
    left = merge(torch.stack([merge(torch.stack(parts[:2])), merge(torch.stack(parts[2:]))]))
    running = parts[0]
    for part in parts[1:]:
        running = merge(torch.stack([running, part]))
    [direct] = statistics_of(case, [0, 1300])
    exact = [c.MAX_T, c.MAX_S, c.TOP_T, c.TOP_S]
    for other in (left, running, direct):
        torch.testing.assert_close(shifted(other), shifted(whole))
        torch.testing.assert_close(other[:, [c.SUM_T, c.SUM_S]], whole[:, [c.SUM_T, c.SUM_S]])
        assert torch.equal(other[:, exact], whole[:, exact])


def test_gradient_may_overwrite_its_input() -> None:
    case = make_case(REVERSE_KL, True)
    rows, objective = RowTensors(torch.ones(3)), Objective(REVERSE_KL)
    tile = Tile(case.student, case.teacher, torch.empty_like(case.student), True, num_real=1300)
    statistics = kernels.row_statistics(tile, rows, objective)
    rest = statistics, kernels.row_values(tile, rows, objective, statistics, False), torch.ones(3)
    kernels.row_gradient(tile, rows, objective, *rest)
    for place in ("student", "teacher"):
        copies = {name: getattr(case, name).clone() for name in ("student", "teacher")}
        over = tile._replace(**copies, grad=copies[place])
        kernels.row_gradient(over, rows, objective, *rest)
        assert torch.equal(copies[place], tile.grad)
    copies = {name: getattr(case, name).clone() for name in ("student", "teacher")}
    over = tile._replace(**copies, grad=copies["student"])
    kernels.divergence_rows(over, rows, objective, False)
    torch.testing.assert_close(copies["student"], tile.grad, rtol=1e-4, atol=1e-7)


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("constant", [2e4, -2e4])
@pytest.mark.parametrize("way", ["at_once", "ragged"])
def test_far_maxima(divergence: str, delta: bool, constant: float, way: str) -> None:
    """A softmax ignores a constant, however large; the numbers are exact in fp32."""
    case = make_case(divergence, delta)
    case.student = (case.student * 256).round() / 256
    case.teacher = (case.teacher * 256).round() / 256
    true_stats, true_grad = case.truth()
    case.student += constant
    stats, grad = case.run(WAYS[way])
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=5e-3, atol=0)
    assert relative_error(grad, true_grad) < 5e-3
