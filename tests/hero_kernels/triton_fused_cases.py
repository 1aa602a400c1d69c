"""Cases of the fused maker of logits, and of the loop around Triton's kernels, against fp64.

Run by test_triton_cases.py, in Triton's interpreter or on a GPU. In the interpreter tiles of the
GEMM have 16 rows and 64 columns, with steps of 16 along the hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tile_cases import DIVERGENCES, Case, relative_error
from torch import Tensor
from triton_tools import DEVICE, mend_interpreter, to_device

from hero_kernels import divergence as loop
from hero_kernels import reference
from hero_kernels.call import Call
from hero_kernels.constants import SUM_S
from hero_kernels.objective import Objective
from hero_kernels.triton import fused, rows
from hero_kernels.triton.configs import GEMMS
from hero_kernels.types import Head, RowTensors, Tile

if DEVICE == "cpu":
    mend_interpreter()
ROWS, VOCAB, WIDTH = 17, 100, 112


class Inputs:
    """Random heads in 16 bits, and the tile for their logits, whose last columns are padding."""

    def __init__(
        self, distance: float, shared: bool, dtype: torch.dtype, size: int = 40, rows: int = ROWS
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.shared = shared
        self.h_t = normal(rows, size).to(dtype)
        self.h_s = (self.h_t.float() + distance * normal(rows, size)).to(dtype)
        self.w_t = (3 / math.sqrt(size) * normal(VOCAB, size)).to(dtype)
        self.w_s = self.w_t
        self.b_t = self.b_s = normal(WIDTH)
        if not shared:  # of another hidden size too
            self.h_s, self.w_s = normal(rows, 56).to(dtype), (0.5 * normal(VOCAB, 56)).to(dtype)
            self.b_s = normal(WIDTH)
        self.rows = RowTensors(torch.rand(rows), torch.randint(-1, VOCAB, (rows,)))

    def tile(self, objective: Objective) -> Tile:
        """With its logits made; the gradient takes their place."""
        dtype = fused.DELTA_DTYPE if self.shared else torch.float32
        student = torch.full((len(self.h_t), WIDTH), torch.nan, dtype=dtype)
        teacher = torch.full((len(self.h_t), WIDTH), torch.nan)
        tile = to_device(Tile(student, teacher, None, self.shared, self.b_s, self.b_t))
        tile = tile._replace(grad=tile.student, num_real=VOCAB)
        heads = (
            to_device(Head(h, w, b[:VOCAB]))
            for h, w, b in ((self.h_s, self.w_s, self.b_s), (self.h_t, self.w_t, self.b_t))
        )
        return fused.logits_into(tile, *heads, to_device(self.rows), objective)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Of student and teacher, in fp64."""
        products = ((self.h_s, self.w_s), (self.h_t, self.w_t))
        student, teacher = (h.double() @ w.double().t() for h, w in products)
        return student, teacher

    def truth(self, **settings: Any) -> tuple[Tensor, Tensor]:
        """Statistics [R, 8] and gradient [R, V] in fp64."""
        case = Case(*self.logits(), delta=False, with_stats=True, **settings)
        case.student_bias, case.teacher_bias = self.b_s[:VOCAB], self.b_t[:VOCAB]
        case.row_weights, case.target_ids = self.rows.weights, self.rows.target_ids
        case.temperatures = self.rows.temperatures
        return case.truth()


# Hidden sizes: rows of 40 are read by descriptors, those of 33 element by element.
KINDS = pytest.mark.parametrize(
    ("distance", "shared", "dtype", "size"),
    [
        pytest.param(1.0, True, torch.bfloat16, 40, id="far"),  # h_s - h_t is not a 16-bit number
        pytest.param(1e-2, True, torch.bfloat16, 33, id="near"),
        pytest.param(0.1, True, torch.float16, 40, id="fp16"),
        pytest.param(0.0, False, torch.bfloat16, 40, id="own-heads"),
    ],
)


@DIVERGENCES
@KINDS
def test_against_fp64(
    divergence: str, distance: float, shared: bool, dtype: torch.dtype, size: int
) -> None:
    inputs = Inputs(distance, shared, dtype, size)
    inputs.rows = inputs.rows._replace(temperatures=torch.rand(ROWS) + 0.7)
    settings: dict[str, Any] = {"divergence": divergence, "softcap": 20.0, "logit_scale": 0.8}
    objective = Objective(**settings)
    tile = inputs.tile(objective)
    student, teacher = inputs.logits()
    expected = student - teacher if shared else student
    torch.testing.assert_close(
        tile.teacher[:, :VOCAB].double().cpu(), teacher, rtol=1e-5, atol=1e-5
    )
    rounding = 2**-11 if shared else 1e-6
    assert relative_error(tile.student[:, :VOCAB].cpu(), expected) < rounding
    stats = fused.divergence_rows(tile, to_device(inputs.rows), objective, True)
    true_stats, true_grad = inputs.truth(**settings)
    error = 2e-3 if shared else 1e-5  # 2^-11 of delta, which is large if far
    torch.testing.assert_close(
        stats[:, 2:].double().cpu(), true_stats[:, 2:], rtol=error, atol=error
    )
    assert relative_error(stats[:, 0].cpu(), true_stats[:, 0]) < error
    assert relative_error(tile.grad[:, :VOCAB].cpu(), true_grad) < (3e-3 if shared else 1e-5)
    assert tile.grad[:, VOCAB:].eq(0).all()


@KINDS
def test_statistics_are_those_of_the_stored_logits(
    distance: float, shared: bool, dtype: torch.dtype, size: int
) -> None:
    """A row kernel that reads the logits back finds the same."""
    inputs = Inputs(distance, shared, dtype, size)
    objective = Objective(softcap=20.0)
    tile = inputs.tile(objective)
    again = rows.row_statistics(tile, to_device(inputs.rows), objective)
    torch.testing.assert_close(tile.statistics, again, rtol=1e-5, atol=1e-5)


@DIVERGENCES
def test_equal_hidden_states_give_exactly_zero(divergence: str) -> None:
    inputs = Inputs(0.0, True, torch.bfloat16, rows=5)
    objective = Objective(divergence=divergence)
    tile = inputs.tile(objective)
    stats = fused.divergence_rows(tile, to_device(inputs.rows), objective, False)
    assert stats[:, 0].eq(0).all() and tile.grad.eq(0).all()


def test_order_of_tiles_repeats_and_garbage_stays_alone() -> None:
    """Two groups of row tiles, of which the last is short; twice the same bits."""
    inputs, kept = Inputs(0.1, True, torch.bfloat16, rows=140), torch.arange(140) != 3
    inputs.h_s[3] = torch.nan
    first, second = (inputs.tile(Objective()) for _ in range(2))
    assert torch.equal(first.student[kept, :VOCAB], second.student[kept, :VOCAB])
    assert torch.equal(first.statistics[kept], second.statistics[kept])
    assert first.statistics[kept].isfinite().all() and first.statistics[3, SUM_S].isnan()
    teacher = first.teacher[:, :VOCAB].double().cpu()
    torch.testing.assert_close(teacher, inputs.logits()[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [40, 33])
def test_log_probabilities_without_logits(size: int) -> None:
    inputs = Inputs(1.0, True, torch.bfloat16, size)
    objective = Objective(temperature=1.3, softcap=25.0)
    ids = inputs.rows.target_ids
    stats = fused.logprob_rows(
        *to_device(Head(inputs.h_s, inputs.w_s, inputs.b_s[:VOCAB])),
        ids.to(DEVICE), objective, VOCAB, True,
    )  # fmt: skip
    z = 25.0 * torch.tanh((inputs.logits()[0] + inputs.b_s[:VOCAB]) / 25.0) / 1.3
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(1, ids.clamp(min=0)[:, None])[:, 0].where(ids >= 0, 0.0)
    entropies, maxima = -(log_p.exp() * log_p).sum(-1), z.amax(-1)
    truth = torch.stack([logprobs, entropies, maxima, z.logsumexp(-1) - maxima], 1)
    torch.testing.assert_close(stats.double().cpu(), truth, rtol=1e-5, atol=1e-5)


@DIVERGENCES
@pytest.mark.parametrize(
    ("impl", "tile_columns"), [("triton", 0), ("triton", 40), ("triton_fused", 0)]
)
def test_the_loop_over_tiles(impl: str, tile_columns: int, divergence: str) -> None:
    """With masked rows that hold NaN, importance ratios, and a head with padding."""
    generator = torch.Generator().manual_seed(0)
    h_t, h_s = torch.randn(2, 5, 16, generator=generator).bfloat16()
    weight = torch.randn(VOCAB + 3, 16, generator=generator).bfloat16()
    bias = torch.randn(VOCAB + 3, generator=generator)
    rows = RowTensors(
        torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0]), torch.arange(5), torch.full((5,), -3.0)
    )
    inputs = [tensor.double().requires_grad_() for tensor in (h_s, weight, bias)]
    settings: dict[str, Any] = {"divergence": divergence, "is_clip": 2.0}
    truth = reference.fused_linear_divergence(
        inputs[0], inputs[1], h_t.double(), student_bias=inputs[2], vocab_size=VOCAB,
        token_weights=rows.weights, target_ids=rows.target_ids, old_logprobs=rows.old_logprobs,
        reduction="sum", **settings,
    )  # fmt: skip
    expected = torch.autograd.grad(truth.loss, inputs)
    needed = {"need_hidden": True, "need_weight": True, "need_bias": True}
    call = Call(impl, 2, tile_columns, VOCAB, **needed)
    h_s[1] = torch.nan
    student, teacher = (to_device(Head(hidden, weight, bias)) for hidden in (h_s, h_t))
    teacher = teacher._replace(weight=student.weight)
    result = loop.divergence(student, teacher, to_device(rows), Objective(**settings), call)
    assert result.losses.sum().item() == pytest.approx(truth.loss.item(), rel=1e-3)
    for gradient, exact in zip(result.gradients, expected, strict=True):
        assert relative_error(gradient.cpu(), exact) < 5e-3


def test_no_rows() -> None:
    inputs = Inputs(0.0, True, torch.bfloat16, rows=0)
    assert inputs.tile(Objective()).statistics.shape == (0, 12)


def test_refusals() -> None:
    assert fused.refusal((9, 0), torch.bfloat16, 151_936) is None
    assert "8.0 or newer, got 7.5" in (fused.refusal((7, 5), torch.float16, 100) or "")
    assert "got torch.float32" in (fused.refusal((9, 0), torch.float32, 100) or "")
    assert "2^24" in (fused.refusal((9, 0), torch.float16, 1 << 24) or "")


def test_operand_path() -> None:
    """Rows of a multiple of 16 bytes for the accelerator; Triton's own notion for pointers."""
    paths = {
        size: [
            fused.operand_path(GEMMS[arch], torch.empty(4, size, dtype=torch.bfloat16))
            for arch in (80, 90, 100, 120)
        ]
        for size in (64, 24, 20)
    }
    assert paths[64] == ["aligned", "descriptors", "descriptors", "aligned"]
    assert paths[24] == ["unaligned", "descriptors", "descriptors", "unaligned"]
    assert paths[20] == ["unaligned"] * 4
    padded = torch.empty(4, 64, dtype=torch.bfloat16)
    assert fused.operand_path(GEMMS[90], padded[:, :61]) == "descriptors"
    assert fused.operand_path(GEMMS[80], padded[:, :61]) == "unaligned"
    assert fused.operand_path(GEMMS[90], padded[:, 1:]) == "unaligned"
