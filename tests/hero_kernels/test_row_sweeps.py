"""The three phases over any cut of the columns, against the fp64 formulas of row_cases.py."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from row_cases import DELTA, DIVERGENCES, FLOATS, JSD, check, make_case, relative_error
from torch import Tensor

from hero_kernels import backends, phases, rows

CUTS: dict[str, list[int]] = {
    "whole": [0, 1300],
    "halves": [0, 700, 1300],
    "ragged": [0, 1, 3, 640, 1299, 1300],
    "padded": [0, 600, 1200, 1800],  # the last pieces hold padding, or nothing else
    "beyond": [0, 1300, 1310],
}


def in_phases(cuts: list[int], kernels: Any = phases) -> Any:
    """A row kernel, as `rows.divergence_rows`, that sees the columns in pieces."""

    def row_kernel(student: Tensor, teacher: Tensor, grad: Tensor | None, **given: Any) -> Tensor:
        width = student.shape[1]
        padding = (0, max(cuts[-1] - width, 0))
        student, teacher = (
            torch.nn.functional.pad(x, padding, value=7.0) for x in (student, teacher)
        )
        objective = {"divergence": given["divergence"], "beta": given["beta"]}
        pieces = []
        for first, end in zip(cuts, [*cuts[1:-1], max(cuts[-1], width)], strict=False):
            biases = [
                None if bias is None else torch.nn.functional.pad(bias, padding)[first:end].float()
                for bias in (given["student_bias"], given["teacher_bias"])
            ]
            scale = (given["inv_temperature"], given["softcap"], given["logit_scale"])
            common = {
                "delta": given["delta"],
                "scaling": phases.Scaling(*scale, *biases),
                "first_column": first,
                "vocab_size": given["vocab_size"],
            }
            pieces.append((student[:, first:end].clone(), teacher[:, first:end].clone(), common))
        parts = [
            kernels.row_statistics(s, t, target_ids=given["target_ids"], **common)
            for s, t, common in pieces
        ]
        joined = kernels.merge_statistics(torch.stack(parts))
        values = sum(
            kernels.row_values(s, t, joined, **common, **objective, with_stats=given["with_stats"])
            for s, t, common in pieces
        )
        assert isinstance(values, Tensor)
        stats = kernels.finish(
            joined, values, given["target_ids"], given["old_logprobs"], given["is_clip"]
        )
        if not given["with_stats"]:
            stats[:, rows.STUDENT_ENTROPY :] = 0
        if grad is not None:
            written = []
            for s, t, common in pieces:
                out = torch.full_like(s, float("nan"), dtype=grad.dtype)
                row_scale = given["row_weights"] * stats[:, rows.RATIO]
                kernels.row_gradient(s, t, out, joined, values, row_scale, **common, **objective)
                written.append(out)
            whole = torch.cat(written, 1)
            assert whole[:, width:].eq(0).all()
            grad.copy_(whole[:, :width])
        return stats

    return row_kernel


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("cuts", CUTS)
def test_any_cut(divergence: int, delta: bool, cuts: str) -> None:
    options = {
        "target_ids": torch.tensor([1299, -1, 2]),
        "row_weights": torch.tensor([0.3, 1.0, 0.0]),
        "old_logprobs": torch.tensor([-4.0, -1.0, -9.0]),
        "is_clip": 1.5,
        "with_stats": True,
    }
    check(in_phases(CUTS[cuts]), make_case(divergence, delta, **options))


@DIVERGENCES
@DELTA
def test_transforms_and_padding(divergence: int, delta: bool) -> None:
    biases = torch.randn(2, 1300)
    options: dict[str, Any] = {"softcap": 20.0, "logit_scale": 0.7, "inv_temperature": 1.4}
    options |= {"student_bias": biases[0], "teacher_bias": biases[0 if delta else 1]}
    case = make_case(divergence, delta, **options, beta=0.2, vocab_size=1111)
    check(in_phases(CUTS["ragged"]), case)


@DIVERGENCES
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_storage(divergence: int, dtype: torch.dtype) -> None:
    case = make_case(divergence, True)
    stored = replace(case, student=case.student.to(dtype), teacher=case.teacher.to(dtype))
    check(in_phases(CUTS["halves"]), stored, dtype)


@DIVERGENCES
@pytest.mark.parametrize("softcap", [0.0, 20.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("offset", [0.0, 1.0, 40.0])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_nearby_distributions(divergence: int, softcap: float, offset: float, scale: float) -> None:
    """KL from 1 down to 1e-9 keeps its relative accuracy under a constant that drops out."""
    if softcap and offset == 40.0:
        pytest.skip("a saturated cap is no constant")
    case = make_case(divergence, True, vocab=5000, scale=scale, softcap=softcap)
    case.student += scale * offset
    stats, grad = case.run(in_phases([0, 1000, 1024, 5000]))
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
@DELTA
def test_equal_is_exactly_zero(divergence: int, delta: bool) -> None:
    options = {"logit_scale": 0.3, "inv_temperature": 0.7, "softcap": 11.0}
    case = make_case(divergence, delta, scale=0.0, **options)
    stats, grad = case.run(in_phases(CUTS["ragged"]))
    assert stats[:, 0].eq(0).all() and grad.eq(0).all()


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("scale", [40.0, 400.0])
def test_distant_distributions(divergence: int, delta: bool, scale: float) -> None:
    """Where p_t exp(x) over- or underflows, and pieces disagree about the shift.

    The gradient is then a difference of numbers of the divergence's size, which bounds its error.
    """
    case = make_case(divergence, delta, scale=scale)
    case.student[:, :600] += 50.0
    stats, grad = case.run(in_phases(CUTS["ragged"]))
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    rounding = 2.0**-23 * true_stats[:, 0].norm()
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm() + rounding


def test_masked_columns_count_nothing() -> None:
    """A piece of -inf alone, on both sides, changes neither statistics nor gradient."""
    case = make_case(JSD, False, with_stats=True)
    expected, true_grad = case.run(in_phases(CUTS["whole"]))
    masked = replace(
        case,
        student=torch.nn.functional.pad(case.student, (0, 50), value=-torch.inf),
        teacher=torch.nn.functional.pad(case.teacher, (0, 50), value=-torch.inf),
    )
    stats, grad = masked.run(in_phases([0, 1300, 1350]))
    torch.testing.assert_close(stats, expected)
    torch.testing.assert_close(grad[:, :1300], true_grad)
    assert grad[:, 1300:].eq(0).all()


def test_one_sided_mask() -> None:
    """A token that the teacher excludes keeps the student's probability."""
    case = make_case(JSD, False, rows=2, vocab=40)
    case.teacher[:, 7] = -1e4  # what remains of it in fp64 is 0 too
    expected, true_grad = case.truth()
    case.teacher[:, 7] = -torch.inf
    stats, grad = case.run(in_phases([0, 20, 40]))
    torch.testing.assert_close(stats[:, 0].double(), expected[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


def test_merging_is_associative_and_ignores_empty_pieces() -> None:
    case = make_case(JSD, True, scale=3.0)
    case.student[:, 900:] += 5.0  # two shifts
    common: dict[str, Any] = {"delta": True, "scaling": phases.Scaling(1.0, 0.0, 1.0, None, None)}
    cuts = [0, 300, 900, 1300, 1400]
    student, teacher = (torch.nn.functional.pad(x, (0, 100)) for x in (case.student, case.teacher))
    parts = [
        phases.row_statistics(
            student[:, a:b].double(),
            teacher[:, a:b].double(),
            first_column=a,
            vocab_size=1300,
            **common,
        )
        for a, b in itertools.pairwise(cuts)
    ]
    assert len({float(part[0, phases.SHIFT]) for part in parts}) > 1
    merge = phases.merge_statistics

    def shifted(statistics: Tensor) -> Tensor:
        return statistics[:, phases.SHIFT] + phases.log_offset(statistics)

    whole = merge(torch.stack(parts))
    left = merge(torch.stack([merge(torch.stack(parts[:2])), merge(torch.stack(parts[2:]))]))
    running = parts[0]
    for part in parts[1:]:
        running = merge(torch.stack([running, part]))
    exact = [phases.MAX_T, phases.MAX_S, phases.TOP_T, phases.TOP_S]
    for other in (left, running):
        torch.testing.assert_close(shifted(other), shifted(whole))
        assert torch.equal(other[:, exact], whole[:, exact])
        torch.testing.assert_close(
            other[:, phases.MEAN] / other[:, phases.SUM_S] - phases.log_offset(other),
            whole[:, phases.MEAN] / whole[:, phases.SUM_S] - phases.log_offset(whole),
        )
    direct = phases.row_statistics(
        case.student.double(), case.teacher.double(), vocab_size=1300, **common
    )
    torch.testing.assert_close(shifted(whole), shifted(direct))


def test_mean_log_ratio_is_the_reverse_kl() -> None:
    """What a kernel without a values pass centres the reverse KL's gradient with."""
    case = make_case(2, True)
    scaling = phases.Scaling(1.0, 0.0, 1.0, None, None)
    statistics = phases.row_statistics(
        case.student, case.teacher, delta=True, scaling=scaling, vocab_size=1300
    )
    mean = statistics[:, phases.MEAN] / statistics[:, phases.SUM_S]
    kl = mean - phases.log_offset(statistics)
    torch.testing.assert_close(kl.double(), case.truth()[0][:, 0], rtol=1e-4, atol=1e-7)


def test_gradient_may_overwrite_its_input() -> None:
    case = make_case(JSD, True)
    common: dict[str, Any] = {
        "delta": True,
        "scaling": phases.Scaling(1.0, 0.0, 1.0, None, None),
        "vocab_size": 1300,
    }
    objective: dict[str, Any] = {"divergence": JSD, "beta": 0.5}
    statistics = phases.row_statistics(case.student, case.teacher, **common)
    values = phases.row_values(
        case.student, case.teacher, statistics, with_stats=False, **common, **objective
    )
    apart = torch.empty_like(case.student)
    rest = (statistics, values, torch.ones(3))
    phases.row_gradient(case.student, case.teacher, apart, *rest, **common, **objective)
    for place in ("student", "teacher"):
        copy = replace(case, student=case.student.clone(), teacher=case.teacher.clone())
        out = getattr(copy, place)
        phases.row_gradient(copy.student, copy.teacher, out, *rest, **common, **objective)
        assert torch.equal(out, apart)


def test_rows_of_scale_zero_may_hold_anything() -> None:
    case = make_case(JSD, False)
    case.student[1], case.teacher[2] = torch.nan, torch.inf
    case = replace(case, row_weights=torch.tensor([1.0, 0.0, 0.0]))
    _, grad = case.run(in_phases(CUTS["ragged"]))
    assert grad[1:].eq(0).all() and grad[0].isfinite().all()


def test_who_has_phases() -> None:
    request = backends.Request(torch.device("cpu"), torch.float64, "full", False)
    assert backends.phases_of("auto", request) is phases
    assert backends.phases_of("torch", request) is phases
    with pytest.raises(ValueError, match=r"impl='cpu' cannot serve.*does not take torch\.float64"):
        backends.phases_of("cpu", request)
    with pytest.raises(ValueError, match=r"cpu: it sees whole rows only.*implemented by 'torch', "):
        backends.phases_of("cpu", request._replace(dtype=torch.float32))
    with pytest.raises(ValueError, match="triton: it runs on cuda, the tensors are on cpu"):
        backends.phases_of("triton", request)


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("constant", [2e4, -2e4])
def test_far_maxima(divergence: int, delta: bool, constant: float) -> None:
    """A softmax ignores a constant, however large; the numbers are exact in fp32."""
    case = make_case(divergence, delta)
    case.student = (case.student * 256).round() / 256
    case.teacher = (case.teacher * 256).round() / 256
    true_stats, true_grad = case.truth()
    case.student += constant
    stats, grad = case.run(in_phases(CUTS["ragged"]))
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=5e-3, atol=0)
    assert relative_error(grad, true_grad) < 5e-3
