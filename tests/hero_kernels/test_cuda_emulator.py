"""The CUDA row kernel's own text on a CPU, under random schedules, against fp64 (tile_cases.py).

Every thread of every block is a fibre (emulator/). That shows missing and misplaced
synchronisation and wrong arithmetic; memory order, fences and PTX operands it does not see.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cuda_tools import DeadlockError, Emulator, Limits, Patch, Plan, Setting, random_case
from tile_cases import (
    DELTA,
    DIVERGENCES,
    FLOATS,
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    check,
    confident_case,
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


FAULTS: dict[str, list[Patch]] = {
    "blocks-do-not-wait-for-each-others-barriers": [
        ("row_kernel.h", "sync_cluster();\n    const Work", "const Work")
    ],
    "a-tile-is-read-before-its-copy-has-landed": [
        ("row_kernel.h", "if (incoming) wait(&exchange.full[at.stage], at.parity);", "")
    ],
    "a-stage-is-overwritten-while-it-is-read": [
        ("row_copies.h", "wait(&exchange.empty[at.stage], at.parity ^ 1);", "")
    ],
    "a-stage-is-given-back-before-the-last-sweep": [
        ("row_kernel.h", "at, true, !resident,", "at, true, true,")
    ],
    "a-blocks-sum-is-formed-before-all-warps-have-given-theirs": [
        ("row_sums.h", "sync_threads(32 * plan.warps);", "")
    ],
    "the-clusters-sum-is-formed-before-all-blocks-have-sent-theirs": [
        ("row_sums.h", "wait_cluster(arrived, count / 4 & 1);", "")
    ],
    "two-reductions-use-the-same-memory": [
        ("row_sums.h", "exchange.of_warps[count % 2]", "exchange.of_warps[0]"),
        ("row_sums.h", "exchange.of_blocks[count % 4]", "exchange.of_blocks[0]"),
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_synchronisation_is_found(tmp_path: Path, emulator: Emulator, fault: str) -> None:
    """Guards the other tests: a schedule among a few must show every single planted fault."""
    faulty = Emulator(tmp_path / "faulty", FAULTS[fault])
    for seed in range(40):
        case = make_case((JSD, FORWARD_KL, REVERSE_KL)[seed % 3], True, rows=6, vocab=1300)
        setting = (SETTINGS["cluster"], Setting())[seed // 3 % 2]
        try:
            check(partial(faulty.divergence_rows, setting=setting, seed=seed), case)
        except (AssertionError, DeadlockError):  # and the kernel as it is passes
            return check(partial(emulator.divergence_rows, setting=setting, seed=seed), case)
    pytest.fail(f"no schedule shows that {fault}")


@DIVERGENCES
@DELTA
def test_bits_do_not_depend_on_the_schedule(
    emulator: Emulator, divergence: str, delta: bool
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
    emulator: Emulator, divergence: str, setting: Setting, vocab: int
) -> None:
    case = make_case(divergence, True, vocab=vocab)
    run = partial(emulator.divergence_rows, setting=setting, seed=vocab)
    if vocab > 1:
        return check(run, case)
    stats, grad = case.run(run)
    assert stats[:, 0].eq(0).all() and grad.eq(0).all()


@LAYOUTS
@DIVERGENCES
@pytest.mark.parametrize("target", ["student", "teacher"])
def test_gradient_in_place(
    emulator: Emulator, divergence: str, setting: Setting, target: str
) -> None:
    """An odd length: neighbouring rows share the pieces of 16 bytes in which rows are copied."""
    case = make_case(divergence, True, rows=5, vocab=1297)
    case = replace(case, student=case.student.half(), teacher=case.teacher.half())
    run = partial(emulator.divergence_rows, setting=setting)
    stats, grad = case.run(run, torch.float16)
    inputs = {"student": case.student, "teacher": case.teacher}
    in_place = case.call(partial(run, seed=1), inputs[target])
    assert torch.equal(in_place, stats)
    assert torch.equal(inputs[target], grad)


@pytest.mark.parametrize(
    ("scale", "beta"), [(0.01, 0.5), (0.7, 0.5), (0.7, 0.2), (4.0, 0.5)], ids=str
)
@DIVERGENCES
@DELTA
def test_rows_that_need_no_more_than_a_factor(
    emulator: Emulator, divergence: str, delta: bool, scale: float, beta: float
) -> None:
    """Without bias, soft cap and masked columns there is a way of its own; 0.7 and less are small
    log ratios throughout, 4.0 is both kinds."""
    case = make_case(divergence, delta, 2, 1048, scale=scale, beta=beta, with_stats=scale < 1)
    if delta:
        case.student = case.student.bfloat16()
    run = partial(emulator.divergence_rows, setting=Setting(1, 2, 2))
    check(run, case, torch.float32 if beta == 0.5 else torch.bfloat16)


@pytest.mark.parametrize("probability", [0.9, 0.999])
@pytest.mark.parametrize("agrees", [True, False])
def test_probabilities_left_in_fp16_cost_nothing(
    emulator: Emulator, probability: float, agrees: bool
) -> None:
    """A confident student's gradient is a small difference of what its top token has; with 16-bit
    storage its error is no more than that of rounding the true gradient."""
    case = confident_case(JSD, True, probability, agrees, rows=2, vocab=1024)
    case = replace(case, student=case.student.bfloat16())
    _, grad = case.run(partial(emulator.divergence_rows, setting=Setting(1, 1, 2)), torch.bfloat16)
    _, truth = case.truth()
    assert relative_error(grad, truth) < 1.02 * relative_error(truth.bfloat16(), truth)


@DIVERGENCES
def test_columns_masked_without_a_bias(emulator: Emulator, divergence: str) -> None:
    """As if they were not there."""
    case = make_case(divergence, False, 2, 1048, scale=0.5)
    kept = torch.arange(1048) % 100 != 7
    without = replace(case, student=case.student[:, kept], teacher=case.teacher[:, kept])
    true_stats, true_grad = without.truth()
    masked = [matrix.masked_fill(~kept, -torch.inf) for matrix in (case.student, case.teacher)]
    case = replace(case, student=masked[0], teacher=masked[1])
    stats, grad = case.run(partial(emulator.divergence_rows, setting=Setting(1, 2, 2)))
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=1e-5, atol=0)
    assert relative_error(grad[:, kept], true_grad) < 1e-5
    assert grad[:, ~kept].eq(0).all()


A100 = Limits(166912, 167936, 1)
H100 = Limits(232448, 233472, 16)


def plan_of(emulator: Emulator, vocab: int, student: torch.dtype, limits: Limits) -> Plan:
    return emulator.plan(torch.empty(1, vocab, dtype=student), torch.empty(1, vocab), limits)


def test_plan_of_known_models(emulator: Emulator) -> None:
    """Qwen3's rows fit into clusters of 8 blocks; SmolLM2's leave room for a second one."""
    for dtype in (torch.float32, torch.bfloat16):
        qwen = plan_of(emulator, 151936, dtype, H100)
        assert (qwen.cluster_size, qwen.resident, qwen.slice_columns) == (8, 1, 19200)
        assert 19200 * (4 + dtype.itemsize) < qwen.shared_bytes < 232448
    smol = plan_of(emulator, 49152, torch.bfloat16, H100)
    assert (smol.cluster_size, smol.resident) == (4, 1)
    assert 2 * (smol.shared_bytes + 1024) <= 233472
    assert plan_of(emulator, 32000, torch.bfloat16, A100).resident == 0
    small = plan_of(emulator, 16384, torch.bfloat16, A100)
    assert (small.cluster_size, small.resident) == (1, 1)
    assert plan_of(emulator, 1 << 20, torch.float32, H100).resident == 0


@pytest.mark.parametrize(
    "limits", [A100, H100, Limits(101376, 102400, 1)], ids=["163K", "227K", "99K"]
)
@pytest.mark.parametrize(
    "dtypes", [FLOATS[:1] * 2, (FLOATS[1], FLOATS[0]), FLOATS[1:2] * 2], ids=str
)
def test_every_plan_is_within_its_limits(
    emulator: Emulator, limits: Limits, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for vocab in (1, 255, 1000, 8193, 50257, 65536, 128256, 202048, 262144, 600_000, 3_000_000):
        student, teacher = (torch.empty(1, vocab, dtype=dtype) for dtype in dtypes)
        plan = emulator.plan(student, teacher, limits)
        assert 0 < plan.shared_bytes <= limits.shared_per_block
        assert 1 <= plan.stages <= 16 and plan.cluster_size <= limits.max_cluster
        assert plan.cluster_size * plan.slice_columns >= vocab
        assert plan.tiles * plan.warps * 256 >= plan.slice_columns
        assert plan.stages == plan.tiles or not plan.resident
