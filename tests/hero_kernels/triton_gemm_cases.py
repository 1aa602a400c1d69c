"""Cases of the dual GEMM against fp64.

test_triton_gemm.py runs this file in a process of its own: with TRITON_INTERPRET=1, which must be
set before triton is imported, or on a GPU.

The oracle for logits is the fp64 product of the rounded operands. The oracle for statistics is
their definition in fp64, applied to the logits as stored.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from row_cases import Case
from torch import Tensor
from triton_phases_tools import DEVICE, offsets, true_statistics

from hero_kernels import phases
from hero_kernels.phases import Scaling
from hero_kernels.triton import dual_gemm
from hero_kernels.triton.configs import GemmConfig
from hero_kernels.triton.dual_gemm import ENERGY

TILE = GemmConfig(block_t=16, block_v=64, block_k=16, num_warps=4, num_stages=2, group_t=2)
SLICES = pytest.mark.parametrize("slices", [1, 4])
FLOATS16 = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
PATHS = pytest.mark.parametrize("path", ["descriptors", "unaligned"])


def plain(**options: Any) -> Scaling:
    return Scaling(1.0, 0.0, 1.0, None, None)._replace(**options)


def matrix(rows: int, size: int, scale: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, size, generator=generator)).to(dtype).to(DEVICE)


def new_out(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, columns), torch.nan, dtype=dtype, device=DEVICE)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.double() @ weight.double().t()


def as_case(
    student: Tensor, teacher: Tensor, delta: bool, scaling: Scaling, **options: Any
) -> Case:
    return Case(
        student.cpu(),
        teacher.cpu(),
        delta,
        0,
        inv_temperature=scaling.inv_temperature,
        softcap=scaling.softcap,
        logit_scale=scaling.logit_scale,
        student_bias=None if scaling.student_bias is None else scaling.student_bias.cpu(),
        teacher_bias=None if scaling.teacher_bias is None else scaling.teacher_bias.cpu(),
        **options,
    )


def check_statistics(statistics: Tensor, case: Case) -> None:
    """Compare with fp64; what depends on the shift, which is free, as offset and mean."""
    ours, truth = statistics.double().cpu(), true_statistics(case)
    for column in (phases.MAX_T, phases.MAX_S, phases.TARGET_T, phases.TARGET_GAP):
        torch.testing.assert_close(ours[:, column], truth[:, column], rtol=3e-6, atol=1e-5)
    for column in (phases.SUM_T, phases.SUM_S):
        torch.testing.assert_close(ours[:, column], truth[:, column], rtol=2e-5, atol=0)
    for column in (phases.TOP_T, phases.TOP_S):
        assert torch.equal(ours[:, column], truth[:, column])
    for value, expected in zip(offsets(ours), offsets(truth), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert ours[:, ENERGY].eq(0).all()


@SLICES
@FLOATS16
@PATHS
def test_shared_head(path: str, dtype: torch.dtype, slices: int) -> None:
    """19 rows, 150 columns of which 130 are real, hidden size 40: no multiple of any tile."""
    hidden, weight = matrix(19, 40, 1.0, dtype, 1), matrix(150, 40, 0.5, dtype, 2)
    difference = matrix(19, 40, 0.05, dtype, 3)
    targets = torch.randint(-1, 130, (19,), device=DEVICE)
    teacher_out, delta_out = new_out(19, 150, torch.float32), new_out(19, 150, dtype)
    statistics = dual_gemm.dual_logits(
        hidden,
        difference,
        weight,
        teacher_out,
        delta_out,
        scaling=plain(),
        target_ids=targets,
        vocab_size=130,
        path=path,
        config=TILE._replace(slices=slices),
    )
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(teacher_out.double(), product(hidden, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        delta_out.double(), product(difference, weight), rtol=rounding, atol=1e-5
    )
    options = {"target_ids": targets.cpu(), "vocab_size": 130}
    check_statistics(statistics, as_case(delta_out, teacher_out, True, plain(), **options))


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_statistics_are_of_the_stored_logits(teacher_dtype: torch.dtype) -> None:
    """Of 16-bit teacher logits too, with bias, scale, soft cap and temperature."""
    dtype = torch.bfloat16
    hidden, weight = matrix(17, 33, 1.0, dtype, 1), matrix(77, 33, 0.8, dtype, 2)
    difference = matrix(17, 33, 0.1, dtype, 3)
    bias = matrix(1, 77, 1.0, torch.float32, 4)[0]
    scaling = Scaling(1.25, 9.0, 0.8, bias, bias)
    teacher_out, delta_out = new_out(17, 77, teacher_dtype), new_out(17, 77, dtype)
    statistics = dual_gemm.dual_logits(
        hidden,
        difference,
        weight,
        teacher_out,
        delta_out,
        scaling=scaling,
        vocab_size=77,
        path="unaligned",
        config=TILE,
    )
    check_statistics(statistics, as_case(delta_out, teacher_out, True, scaling))


@PATHS
@FLOATS16
def test_own_heads(path: str, dtype: torch.dtype) -> None:
    """Hidden sizes that differ, biases, soft cap, and distributions far apart."""
    student_hidden, student_weight = matrix(21, 24, 1.0, dtype, 1), matrix(90, 24, 0.5, dtype, 2)
    teacher_hidden, teacher_weight = matrix(21, 56, 1.0, dtype, 3), matrix(90, 56, 0.5, dtype, 4)
    biases = matrix(2, 90, 1.0, torch.float32, 5)
    scaling = Scaling(0.7, 15.0, 1.1, biases[0] + 3.0, biases[1])
    student_out, teacher_out = (new_out(21, 90, torch.float32) for _ in range(2))
    targets = torch.randint(-1, 85, (21,), device=DEVICE)
    statistics = dual_gemm.pair_logits(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        student_out,
        teacher_out,
        scaling=scaling,
        target_ids=targets,
        vocab_size=85,
        path=path,
        config=TILE,
    )
    for out, hidden, weight in (
        (student_out, student_hidden, student_weight),
        (teacher_out, teacher_hidden, teacher_weight),
    ):
        torch.testing.assert_close(out.double(), product(hidden, weight), rtol=1e-5, atol=1e-5)
    options = {"target_ids": targets.cpu(), "vocab_size": 85}
    check_statistics(statistics, as_case(student_out, teacher_out, False, scaling, **options))


@PATHS
def test_one_side_gives_logprobs_entropy_and_top(path: str) -> None:
    hidden, weight = matrix(18, 40, 1.0, torch.bfloat16, 1), matrix(300, 40, 0.7, torch.bfloat16, 2)
    bias = matrix(1, 300, 1.0, torch.float32, 3)[0]
    targets = torch.randint(0, 290, (18,), device=DEVICE)
    statistics = dual_gemm.linear_statistics(
        hidden,
        weight,
        scaling=plain(inv_temperature=0.8, softcap=20.0, student_bias=bias),
        target_ids=targets,
        vocab_size=290,
        path=path,
        config=TILE,
    ).double()
    z = 20.0 * torch.tanh((product(hidden, weight) + bias.double())[:, :290] / 20.0) * 0.8
    log_p = torch.log_softmax(z, -1)
    log_sum = statistics[:, phases.SUM_T].log()
    ours = statistics[:, phases.TARGET_T] - statistics[:, phases.MAX_T] - log_sum
    truth = log_p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-5)
    entropy = log_sum - statistics[:, ENERGY] / statistics[:, phases.SUM_S]
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=0)
    assert torch.equal(statistics[:, phases.TOP_T], z.argmax(-1).double())


@pytest.mark.parametrize(("scale", "error"), [(1.0, 1e-5), (1e-2, 1e-4), (1e-3, 3e-3)])
def test_reverse_kl_without_storing_logits(scale: float, error: float) -> None:
    """KLs of 2.5, 3e-4 and 3e-6, and how much of them cancellation leaves."""
    hidden, weight = matrix(16, 32, 1.0, torch.float16, 1), matrix(500, 32, 0.5, torch.float16, 2)
    difference = matrix(16, 32, scale, torch.float16, 3)
    options: dict[str, Any] = {"scaling": plain(), "vocab_size": 500, "path": "unaligned"}
    statistics = dual_gemm.dual_logits(
        hidden, difference, weight, None, None, config=TILE, **options
    )
    log_t = torch.log_softmax(product(hidden, weight), -1)
    log_s = torch.log_softmax(product(hidden, weight) + product(difference, weight), -1)
    truth = (log_s.exp() * (log_s - log_t)).sum(-1)
    ours = dual_gemm.reverse_kl(statistics).double()
    worst = ((ours - truth).abs() / truth).max().item()
    print(f"KL {truth.mean().item():.1e}: relative error up to {worst:.1e}")
    assert worst < error


def test_tile_order_covers_the_last_group_and_result_repeats() -> None:
    """Three tiles of rows in groups of two, five of columns; twice the same bits."""
    hidden, weight = matrix(45, 16, 1.0, torch.bfloat16, 1), matrix(300, 16, 1.0, torch.bfloat16, 2)
    results = []
    for _ in range(2):
        teacher_out, delta_out = (new_out(45, 300, torch.float32) for _ in range(2))
        statistics = dual_gemm.dual_logits(
            hidden,
            hidden,
            weight,
            teacher_out,
            delta_out,
            scaling=plain(),
            vocab_size=300,
            path="descriptors",
            config=TILE,
        )
        results.append((statistics, teacher_out, delta_out))
    torch.testing.assert_close(
        results[0][1].double(), product(hidden, weight), rtol=1e-5, atol=1e-5
    )
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert torch.equal(results[0][1], results[0][2])


def test_equal_sides_are_exactly_zero_and_garbage_rows_stay_alone() -> None:
    hidden, weight = matrix(8, 32, 1.0, torch.bfloat16, 1), matrix(100, 32, 0.5, torch.bfloat16, 2)
    hidden[3] = torch.nan
    statistics = dual_gemm.dual_logits(
        hidden,
        torch.zeros_like(hidden),
        weight,
        None,
        None,
        scaling=plain(),
        vocab_size=100,
        path="descriptors",
        config=TILE,
    )
    kept = torch.arange(8) != 3
    for column in (phases.SHIFT, phases.GROWTH, phases.MEAN):
        assert statistics[kept, column].eq(0).all()
    assert statistics[3, phases.SUM_T].isnan()
    assert statistics[kept].isfinite().all()


def test_no_rows() -> None:
    hidden, weight = matrix(0, 32, 1.0, torch.bfloat16, 1), matrix(100, 32, 0.5, torch.bfloat16, 2)
    result = dual_gemm.linear_statistics(
        hidden, weight, scaling=plain(), vocab_size=100, path="aligned", config=TILE
    )
    assert result.shape == (0, 12)


def test_errors_name_what_was_got_and_expected() -> None:
    hidden, weight = matrix(4, 32, 1.0, torch.bfloat16, 1), matrix(100, 32, 0.5, torch.bfloat16, 2)
    options: dict[str, Any] = {"scaling": plain(), "vocab_size": 100}
    out = new_out(4, 100, torch.float32)
    with pytest.raises(ValueError, match=r"bfloat16 or torch\.float16, got torch\.float32"):
        dual_gemm.dual_logits(hidden.float(), hidden.float(), weight.float(), None, None, **options)
    with pytest.raises(ValueError, match=r"Both outputs must be given"):
        dual_gemm.dual_logits(hidden, hidden, weight, out, None, **options)
    with pytest.raises(ValueError, match=r"output must be \[4, 100\].*got \[4, 99\]"):
        dual_gemm.dual_logits(hidden, hidden, weight, out, out[:, :99], **options)
    with pytest.raises(ValueError, match=r"head must be \[100, 32\].*got \[100, 31\]"):
        dual_gemm.dual_logits(hidden, hidden, weight[:, :31], None, None, **options)
    with pytest.raises(ValueError, match=r"teacher_out must be torch\.float32, got .*bfloat16"):
        dual_gemm.pair_logits(hidden, weight, hidden, weight, out, out.bfloat16(), **options)
    with pytest.raises(ValueError, match=r"vocab_size must be in \[1, 100\], got 101"):
        dual_gemm.linear_statistics(hidden, weight, scaling=plain(), vocab_size=101)
    with pytest.raises(ValueError, match=r"each bias must be a contiguous \[100\]"):
        bias = torch.zeros(99, device=DEVICE)
        dual_gemm.linear_statistics(
            hidden, weight, scaling=plain(student_bias=bias), vocab_size=100
        )


def test_refusals() -> None:
    assert dual_gemm.refusal((9, 0), torch.bfloat16, 151_936) is None
    assert "8.0 or newer, got 7.5" in (dual_gemm.refusal((7, 5), torch.float16, 100) or "")
    assert "got torch.float32" in (dual_gemm.refusal((9, 0), torch.float32, 100) or "")
    assert "2^24" in (dual_gemm.refusal((9, 0), torch.float16, 1 << 24) or "")


def test_operand_path() -> None:
    """Rows of a multiple of 16 bytes for the accelerator; Triton's own notion for pointers."""
    paths = {
        size: [
            dual_gemm.operand_path(capability, torch.empty(4, size, dtype=torch.bfloat16))
            for capability in ((8, 0), (9, 0), (10, 0), (12, 0))
        ]
        for size in (64, 24, 20)
    }
    assert paths[64] == ["aligned", "descriptors", "descriptors", "aligned"]
    assert paths[24] == ["unaligned", "descriptors", "descriptors", "unaligned"]
    assert paths[20] == ["unaligned"] * 4
    padded = torch.empty(4, 64, dtype=torch.bfloat16)
    assert dual_gemm.operand_path((9, 0), padded[:, :61]) == "descriptors"
    assert dual_gemm.operand_path((8, 0), padded[:, :61]) == "unaligned"
    assert dual_gemm.operand_path((9, 0), padded[:, 1:]) == "unaligned"
