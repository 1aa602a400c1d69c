"""The CUDA row kernel's own text on a CPU, under random schedules, against fp64 (row_cases.py).

Every thread of every block is a fibre (csrc/cuda/emulator.cpp). That shows missing and misplaced
synchronisation and wrong arithmetic; memory order, fences and PTX operands it does not see.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cuda_tools import DeadlockError, Emulator, Fault, Limits, Setting, random_case
from row_cases import (
    DELTA,
    DIVERGENCES,
    FLOATS,
    JSD,
    REVERSE_KL,
    Case,
    check,
    make_case,
    relative_error,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

SETTINGS = {
    "block": Setting(1, 1, 2, 0),
    "cluster": Setting(2, 4, 1, 0),
    "streamed": Setting(2, 1, 1, 2),
    "streamed-cluster": Setting(1, 2, 2, 1),
}
LAYOUTS = pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulator"))


@LAYOUTS
@pytest.mark.parametrize("seed", range(14))
def test_random_problems_and_schedules(emulator: Emulator, setting: Setting, seed: int) -> None:
    seed = 100 * seed + list(SETTINGS.values()).index(setting)
    case, grad_dtype = random_case(seed)
    check(partial(emulator.divergence_rows, setting=setting, seed=seed), case, grad_dtype)


@pytest.mark.parametrize("fault", list(Fault)[1:], ids=lambda fault: fault.name.lower())
def test_a_missing_synchronisation_is_found(emulator: Emulator, fault: Fault) -> None:
    """Guards the tests above: a schedule among a few must show every single one."""
    for seed in range(40):
        case = make_case(seed % 3, True, rows=6, vocab=1300)
        setting = (SETTINGS["cluster"], Setting())[seed // 3 % 2]
        run = partial(emulator.divergence_rows, setting=setting, seed=seed)
        check(run, case)
        try:
            check(partial(run, fault=fault), case)
        except (AssertionError, DeadlockError):
            return
    pytest.fail(f"no schedule shows {fault.name}")


@DIVERGENCES
@DELTA
def test_bits_do_not_depend_on_the_schedule(
    emulator: Emulator, divergence: int, delta: bool
) -> None:
    case = make_case(divergence, delta, rows=5, vocab=1700, with_stats=True)
    results = []
    for seed, clusters in enumerate((1, 2, 3, 5)):
        run = partial(emulator.divergence_rows, setting=Setting(clusters, 2, 2), seed=seed)
        results.append(case.run(run))
    for stats, grad in results[1:]:
        assert torch.equal(stats, results[0][0])
        assert torch.equal(grad, results[0][1])


@DIVERGENCES
@LAYOUTS
@pytest.mark.parametrize("vocab", [1, 7, 257, 1025])
def test_every_length_of_row(
    emulator: Emulator, divergence: int, setting: Setting, vocab: int
) -> None:
    case = make_case(divergence, True, vocab=vocab)
    run = partial(emulator.divergence_rows, setting=setting, seed=vocab)
    if vocab > 1:
        return check(run, case)
    stats, grad = case.run(run)
    assert stats[:, 0].eq(0).all() and grad.eq(0).all()


@DIVERGENCES
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (1e-2, 20.0), (1e-4, 0.0), (5e-5, 0.0)])
def test_nearby_distributions_keep_relative_accuracy(
    emulator: Emulator, divergence: int, scale: float, softcap: float
) -> None:
    """KL from 1 down to 1e-9, with a constant offset of delta and large logits."""
    case = make_case(divergence, True, vocab=2500, scale=scale, softcap=softcap)
    case.student += scale
    stats, grad = case.run(emulator.divergence_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
@DELTA
def test_equal_distributions_are_exactly_zero(
    emulator: Emulator, divergence: int, delta: bool
) -> None:
    case = make_case(
        divergence, delta, scale=0.0, logit_scale=0.3, inv_temperature=0.7, softcap=11.0
    )
    case.student_bias = case.teacher_bias = torch.randn(1300)
    stats, grad = case.run(emulator.divergence_rows)
    assert stats[:, 0].eq(0).all()
    assert grad.eq(0).all()


@DIVERGENCES
@DELTA
@pytest.mark.parametrize("offset", [50.0, -200.0])
def test_distant_distributions(
    emulator: Emulator, divergence: int, delta: bool, offset: float
) -> None:
    """Log ratios for which p_t exp(x) over- or underflows, and a student offset by a constant."""
    case = make_case(divergence, delta, scale=40.0)
    case.student += offset
    stats, grad = case.run(emulator.divergence_rows)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert (grad - true_grad).norm() < 1e-5 * (true_grad.norm() + 1e-2)
    if divergence == JSD:
        assert stats[:, 0].max() <= 0.6931472


@DIVERGENCES
@DELTA
def test_masked_vocabulary(emulator: Emulator, divergence: int, delta: bool) -> None:
    """-inf on both sides, whole blocks of columns too: as if the columns were not there."""
    case = make_case(divergence, delta, vocab=1500)
    kept = torch.rand(1500) < 0.6
    kept[300:900] = False
    shorter = replace(case, student=case.student[:, kept], teacher=case.teacher[:, kept])
    case.teacher[:, ~kept] = -torch.inf
    case.student[:, ~kept] = torch.nan if delta else -torch.inf  # -inf - -inf
    stats, grad = case.run(emulator.divergence_rows)
    true_stats, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad[:, kept], true_grad) < 1e-5
    assert grad[:, ~kept].eq(0).all()


def test_masks_that_differ_are_finite_for_jsd(emulator: Emulator) -> None:
    case = make_case(JSD, False, vocab=1100)
    case.teacher[:, :350] = -torch.inf
    case.student[:, 650:] = -torch.inf
    stats, grad = case.run(emulator.divergence_rows)
    finite = replace(
        case, student=case.student.clamp(min=-300), teacher=case.teacher.clamp(min=-300)
    )
    true_stats, true_grad = finite.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad, true_grad) < 1e-5


@DIVERGENCES
def test_weight_zero_hides_garbage(emulator: Emulator, divergence: int) -> None:
    case = make_case(divergence, False, rows=4)
    case.row_weights = torch.tensor([1.0, 0.0, 0.0, 1.0])
    case.student[1] = torch.nan
    case.teacher[3, 7] = torch.nan
    stats, grad = case.run(emulator.divergence_rows)
    truth, _ = make_case(divergence, False, rows=4).truth()
    assert grad[1:3].eq(0).all()
    assert stats[1].eq(0).all()
    assert stats[2, 0].item() == pytest.approx(truth[2, 0].item(), rel=1e-5)
    assert stats[3, 0].isnan() and grad[3].isnan().all()


@LAYOUTS
@DIVERGENCES
@pytest.mark.parametrize("target", ["student", "teacher"])
def test_gradient_in_place(
    emulator: Emulator, divergence: int, setting: Setting, target: str
) -> None:
    """An odd length: neighbouring rows share the pieces of 16 bytes in which rows are copied."""
    case = make_case(divergence, True, rows=5, vocab=1297)
    case = replace(case, student=case.student.half(), teacher=case.teacher.half())
    run = partial(emulator.divergence_rows, setting=setting)
    stats, grad = case.run(run, torch.float16)
    inputs = {"student": case.student, "teacher": case.teacher}
    in_place = run(case.student, case.teacher, inputs[target], **case.options(), seed=1)
    assert torch.equal(in_place, stats)
    assert torch.equal(inputs[target], grad)


@DELTA
@pytest.mark.parametrize("start", [96, 97], ids=["aligned", "unaligned"])
def test_strided_and_expanded_rows(emulator: Emulator, delta: bool, start: int) -> None:
    case = make_case(REVERSE_KL, delta, rows=6)
    columns = slice(start, start + 800)
    expanded = replace(
        case, student=case.student[::2, columns], teacher=case.teacher[:1, columns].expand(3, 800)
    )
    workspace = torch.full((3, 2, 800), 7.0)
    stats = emulator.divergence_rows(
        expanded.student, expanded.teacher, workspace[:, 0], **expanded.options()
    )
    true_stats, true_grad = expanded.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(workspace[:, 0], true_grad) < 1e-5
    assert workspace[:, 1].eq(7.0).all()


@DIVERGENCES
def test_rows_that_hold_logits_among_differences(emulator: Emulator, divergence: int) -> None:
    case = make_case(divergence, True, scale=2.0, vocab=300, softcap=20.0)
    case.student_bias = case.teacher_bias = torch.randn(300)
    case.student[1] += case.teacher[1]
    case.absolute_rows = torch.tensor([False, True, False])
    case.target_ids = torch.tensor([5, 6, 7])
    check(emulator.divergence_rows, case)


@DIVERGENCES
def test_no_gradient_wanted(emulator: Emulator, divergence: int) -> None:
    case = make_case(divergence, True)
    before = case.student.clone()
    stats = emulator.divergence_rows(case.student, case.teacher, None, **case.options())
    assert torch.equal(stats, case.run(emulator.divergence_rows)[0])
    assert torch.equal(case.student, before)


A100 = Limits(166912, 167936, 1)
H100 = Limits(232448, 233472, 16)


def layout_of(emulator: Emulator, vocab: int, student: torch.dtype, limits: Limits) -> Any:
    case = Case(torch.empty(1, vocab, dtype=student), torch.empty(1, vocab), True, JSD)
    return emulator.layout(case.student, case.teacher, limits, **case.options())


def test_layout_of_known_models(emulator: Emulator) -> None:
    """Qwen3's rows fit into clusters of 8 blocks; SmolLM2's leave room for a second one."""
    for dtype in (torch.float32, torch.bfloat16):
        qwen = layout_of(emulator, 151936, dtype, H100)
        assert (qwen.cluster_size, qwen.resident, qwen.slice_columns) == (8, 1, 19200)
        assert 19200 * (4 + dtype.itemsize) < qwen.shared_bytes < 232448
    smol = layout_of(emulator, 49152, torch.bfloat16, H100)
    assert (smol.cluster_size, smol.resident) == (4, 1)
    assert 2 * (smol.shared_bytes + 1024) <= 233472
    assert layout_of(emulator, 32000, torch.bfloat16, A100).resident == 0
    small = layout_of(emulator, 16384, torch.bfloat16, A100)
    assert (small.cluster_size, small.resident) == (1, 1)
    assert layout_of(emulator, 1 << 20, torch.float32, H100).resident == 0


@pytest.mark.parametrize(
    "limits", [A100, H100, Limits(101376, 102400, 1)], ids=["163K", "227K", "99K"]
)
@pytest.mark.parametrize(
    "dtypes", [FLOATS[:1] * 2, (FLOATS[1], FLOATS[0]), FLOATS[1:2] * 2], ids=str
)
def test_every_layout_is_within_its_limits(
    emulator: Emulator, limits: Limits, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for vocab in (1, 255, 1000, 8193, 50257, 65536, 128256, 202048, 262144, 600_000, 3_000_000):
        student, teacher = (torch.empty(1, vocab, dtype=dtype) for dtype in dtypes)
        case = Case(student, teacher, True, JSD)
        layout = emulator.layout(student, teacher, limits, **case.options())
        assert 0 < layout.shared_bytes <= limits.shared_per_block
        assert 1 <= layout.stages <= 16 and layout.cluster_size <= limits.max_cluster
        assert layout.cluster_size * layout.slice_columns >= vocab
        assert layout.tiles * layout.warps * 256 >= layout.slice_columns
        assert layout.stages == layout.tiles or not layout.resident
