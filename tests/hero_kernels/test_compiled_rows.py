"""What the compiled row kernels owe, on each machine: C++ here and on ARM, CUDA's text on a CPU,
CUDA on a GPU.

The oracle is textbook formulas in fp64 (tile_cases.py).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import arm
import pytest
import torch
from cuda_tools import Emulator, on_cuda
from tile_cases import (
    DELTA,
    DIVERGENCES,
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    Case,
    RowKernel,
    check,
    confident_case,
    make_case,
    relative_error,
)

from hero_kernels import cpu, cuda


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param("arm", marks=pytest.mark.slow),
        "emulated",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowKernel:
    """`divergence_rows` of one machine."""
    if request.param == "arm":
        if reason := arm.missing():
            pytest.skip(reason)
        return arm.Arm(tmp_path_factory.mktemp("arm")).divergence_rows
    if request.param == "emulated":
        if shutil.which("g++") is None:
            pytest.skip("there is no g++")
        return Emulator(tmp_path_factory.mktemp("emulator") / "sound").divergence_rows
    module = {"cpu": cpu, "cuda": cuda}[request.param]
    if reason := module.available():
        pytest.skip(reason)
    return cpu.divergence_rows if module is cpu else on_cuda


@DIVERGENCES
@pytest.mark.parametrize(
    ("scale", "softcap"), [(1.0, None), (1e-2, 20.0), (1e-4, None), (5e-5, None)]
)
def test_nearby_distributions_keep_relative_accuracy(
    kernel: RowKernel, divergence: str, scale: float, softcap: float | None
) -> None:
    """KL from 1 down to 1e-9, with a constant offset of delta and large logits."""
    case = make_case(divergence, True, vocab=2500, scale=scale, softcap=softcap)
    case.student += scale
    stats, grad = case.run(kernel)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
@DELTA
def test_equal_distributions_are_exactly_zero(
    kernel: RowKernel, divergence: str, delta: bool
) -> None:
    case = make_case(divergence, delta, scale=0.0, logit_scale=0.3, temperature=1.4, softcap=11.0)
    case.student_bias = case.teacher_bias = torch.randn(1300)
    stats, grad = case.run(kernel)
    assert stats[:, 0].eq(0).all()
    assert grad.eq(0).all()


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("offset", [50.0, -200.0])
def test_distant_distributions(
    kernel: RowKernel, divergence: str, delta: bool, offset: float
) -> None:
    """Log ratios for which p_t exp(x) over- or underflows, and a student offset by a constant."""
    case = make_case(divergence, delta, scale=40.0)
    case.student += offset
    stats, grad = case.run(kernel)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert (grad - true_grad).norm() < 1e-5 * (true_grad.norm() + 1e-2)
    if divergence == JSD:
        assert stats[:, 0].max() <= 0.6931472


@DIVERGENCES
@DELTA
def test_masked_vocabulary(kernel: RowKernel, divergence: str, delta: bool) -> None:
    """-inf on both sides, whole blocks of columns too: as if the columns were not there."""
    case = make_case(divergence, delta, vocab=1500)
    kept = torch.rand(1500) < 0.6
    kept[300:900] = False
    shorter = replace(case, student=case.student[:, kept], teacher=case.teacher[:, kept])
    case.teacher[:, ~kept] = -torch.inf
    case.student[:, ~kept] = torch.nan if delta else -torch.inf  # -inf - -inf
    stats, grad = case.run(kernel)
    true_stats, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad[:, kept], true_grad) < 1e-5
    assert grad[:, ~kept].eq(0).all()


def test_masks_that_differ_are_finite_for_jsd(kernel: RowKernel) -> None:
    case = make_case(JSD, False, vocab=1100)
    case.teacher[:, :350] = -torch.inf
    case.student[:, 650:] = -torch.inf
    stats, grad = case.run(kernel)
    finite = replace(
        case, student=case.student.clamp(min=-300), teacher=case.teacher.clamp(min=-300)
    )
    true_stats, true_grad = finite.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
def test_weight_zero_hides_garbage(kernel: RowKernel, divergence: str) -> None:
    case = make_case(divergence, False, rows=4)
    case.row_weights = torch.tensor([1.0, 0.0, 0.0, 1.0])
    case.student[1] = torch.nan
    case.teacher[3, 7] = torch.nan
    stats, grad = case.run(kernel)
    truth, _ = make_case(divergence, False, rows=4).truth()
    assert grad[1:3].eq(0).all()
    assert stats[1].eq(0).all()
    assert stats[2, 0].item() == pytest.approx(truth[2, 0].item(), rel=1e-5)
    assert stats[3, 0].isnan() and grad[3].isnan().all()


@DELTA
@pytest.mark.parametrize("start", [96, 97], ids=["aligned", "unaligned"])
def test_strided_and_expanded_rows(kernel: RowKernel, delta: bool, start: int) -> None:
    case = make_case(REVERSE_KL, delta, rows=6)
    columns = slice(start, start + 800)
    expanded = replace(
        case, student=case.student[::2, columns], teacher=case.teacher[:1, columns].expand(3, 800)
    )
    workspace = torch.full((3, 2, 800), 7.0)
    stats = expanded.call(kernel, workspace[:, 0])
    true_stats, true_grad = expanded.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(workspace[:, 0], true_grad) < 1e-5
    assert workspace[:, 1].eq(7.0).all()


@DIVERGENCES
def test_rows_that_hold_logits_among_differences(kernel: RowKernel, divergence: str) -> None:
    case = make_case(divergence, True, scale=2.0, vocab=300, softcap=20.0)
    case.student_bias = case.teacher_bias = torch.randn(300)
    case.student[1] += case.teacher[1]
    case.absolute_rows = torch.tensor([False, True, False])
    case.target_ids = torch.tensor([5, 6, 7])
    check(kernel, case)


@DIVERGENCES
def test_no_gradient_wanted(kernel: RowKernel, divergence: str) -> None:
    case = make_case(divergence, True)
    before = case.student.clone()
    stats = case.call(kernel, None)
    assert torch.equal(stats, case.run(kernel)[0])
    assert torch.equal(case.student, before)


@DIVERGENCES
@DELTA
def test_padding_columns_are_ignored(kernel: RowKernel, divergence: str, delta: bool) -> None:
    case = make_case(divergence, delta, vocab=1100, num_real=1037)
    case.student[:, 1037:] = torch.nan
    case.teacher[:, 1037:] = 1e30
    check(kernel, case)
    assert case.run(kernel)[1][:, 1037:].eq(0).all()


@DIVERGENCES
@DELTA
def test_statistics(kernel: RowKernel, divergence: str, delta: bool) -> None:
    case = make_case(divergence, delta, rows=40, vocab=50, scale=1.5, with_stats=True)
    case.target_ids = torch.randint(-1, 50, (40,))
    agree = case.truth()[0][:, 6].mean()
    assert 0 < agree < 1
    check(kernel, case)


@DIVERGENCES
@pytest.mark.parametrize("is_clip", [None, 1.1], ids=["unclipped", "clipped"])
def test_row_weights_and_importance_ratio(
    kernel: RowKernel, divergence: str, is_clip: float | None
) -> None:
    case = make_case(divergence, True, rows=30, vocab=50, is_clip=is_clip)
    case.row_weights = torch.rand(30)
    case.target_ids = torch.randint(-1, 50, (30,))
    case.old_logprobs = case.truth()[0][:, 2].float() + 0.3 * torch.randn(30)
    ratio = case.truth()[0][:, 1]
    assert ratio.min() < 1 < ratio.max()
    check(kernel, case)


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
def test_transforms(
    kernel: RowKernel, divergence: str, delta: bool, options: dict[str, Any]
) -> None:
    options = dict(options)
    if options.pop("bias", False):
        options["student_bias"], options["teacher_bias"] = torch.randn(2, 1300)
    check(kernel, make_case(divergence, delta, **options))


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["plain", "softcap"])
def test_each_row_has_its_temperature(
    kernel: RowKernel, divergence: str, delta: bool, softcap: float | None
) -> None:
    case = make_case(divergence, delta, softcap=softcap, with_stats=True, temperature=5.0)
    case.temperatures = torch.tensor([2.5, 1.0, 0.5])
    case.target_ids = torch.tensor([0, 7, -1])
    check(kernel, case)


CONFIDENT = pytest.mark.parametrize("probability", [0.5, 0.99, 0.9999])
AGREES = pytest.mark.parametrize("agrees", [True, False], ids=["agrees", "disagrees"])


@DELTA
@CONFIDENT
@AGREES
@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6])
def test_a_confident_student_of_the_jsd(
    kernel: RowKernel, delta: bool, probability: float, agrees: bool, beta: float
) -> None:
    """Relative errors of plain torch in fp32: up to 2 in these gradients, up to 200 in values."""
    case = confident_case(JSD, delta, probability, agrees)
    case.beta = beta
    check_closely(kernel, case)


@DELTA
@CONFIDENT
@AGREES
@pytest.mark.parametrize("divergence", [FORWARD_KL, REVERSE_KL])
def test_a_confident_student_of_the_kls(
    kernel: RowKernel, divergence: str, delta: bool, probability: float, agrees: bool
) -> None:
    check_closely(kernel, confident_case(divergence, delta, probability, agrees))


def check_closely(kernel: RowKernel, case: Case) -> None:
    stats, grad = case.run(kernel)
    true_stats, true_grad = case.truth()
    assert relative_error(stats[:, 0], true_stats[:, 0]) < 3e-6
    assert relative_error(grad, true_grad) < 6e-6


@DIVERGENCES
@DELTA
def test_statistics_keep_their_range(kernel: RowKernel, divergence: str, delta: bool) -> None:
    """Entropies are at least 0, log-probabilities at most 0, also of certain students; half of the
    vocabulary is masked, targets too."""
    case = confident_case(divergence, delta, 0.9999, agrees=True, rows=40)
    case.teacher[:, 0] += torch.arange(40.0)  # up to probabilities that round to 1
    if not delta:
        case.student[:, 0] += torch.arange(40.0)
    half = case.student.shape[1] // 2
    case.teacher[:, half:] = -torch.inf
    case.student[:, half:] = torch.nan if delta else -torch.inf
    case.with_stats = True
    for target in (0, 1, half + 1):
        case.target_ids = torch.full((40,), target)
        stats, grad = case.run(kernel)
        assert stats.isfinite().all() and grad.isfinite().all()
        assert (stats[:, [0, 4, 5]] >= 0).all() and (stats[:, [2, 3]] <= 0).all()
        if target > half:
            assert (stats[:, [2, 3]] < -1e29).all()


@DIVERGENCES
@pytest.mark.parametrize(
    "sides", [("student",), ("teacher",), ("student", "teacher")], ids="-".join
)
def test_a_row_without_a_distribution_is_nan(
    kernel: RowKernel, divergence: str, sides: tuple[str, ...]
) -> None:
    """As `log_softmax` has it; and 0 where its weight is 0. Other rows do not notice."""
    case = make_case(divergence, False, rows=4, vocab=300)
    stats, grad = case.run(kernel)
    for side in sides:
        getattr(case, side)[1:3] = -torch.inf
    case.row_weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with_empty, grad_with_empty = case.run(kernel)
    assert with_empty[1, 0].isnan() and grad_with_empty[1].isnan().all()
    assert with_empty[2].eq(0).all() and grad_with_empty[2].eq(0).all()
    for row in (0, 3):
        assert torch.equal(with_empty[row], stats[row])
        assert torch.equal(grad_with_empty[row], grad[row])
