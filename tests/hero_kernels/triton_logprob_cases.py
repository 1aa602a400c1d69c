"""Cases of the Triton log-probability kernels; the oracle is in logprob_cases.py.

Run by test_triton_cases.py, in Triton's interpreter or on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logprob_cases import Case
from triton_tools import DEVICE, mend_interpreter

from hero_kernels.objective import Objective
from hero_kernels.triton import logprobs
from hero_kernels.types import Tile

if DEVICE == "cpu":
    mend_interpreter()
VOCAB = 700


class Inputs(Case):
    """Four rows."""

    kernels = logprobs
    device = DEVICE

    def __init__(self, vocab: int = VOCAB, sharpness: float = 4.0, **objective: Any) -> None:
        super().__init__(4, vocab, **objective)
        self.logits *= sharpness / 4.0

    def check(self, grad_dtype: torch.dtype = torch.float32, rounding: float = 1e-6) -> None:
        super().check(grad_dtype, rounding)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param({}, id="plain"),
        pytest.param({"softcap": 30.0, "logit_scale": 0.7, "temperature": 0.7}, id="everything"),
    ],
)
def test_transforms_bias_and_padding(objective: dict[str, float]) -> None:
    inputs = Inputs(**objective)
    if objective:
        inputs.bias = torch.randn(VOCAB)
        inputs.num_real = 637
        inputs.target_ids = torch.tensor([0, 636, 17, -1])
        inputs.logits[:, 637:] = torch.nan
    inputs.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    inputs = Inputs()
    inputs.logits = inputs.logits.to(dtype)
    inputs.check(dtype)


@pytest.mark.parametrize("vocab", [2, 15, 128, 129])
def test_every_length_of_row(vocab: int) -> None:
    Inputs(vocab).check()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, -500.0, 1000.0])
def test_sizes_of_logits(sharpness: float, offset: float) -> None:
    inputs = Inputs(sharpness=sharpness)
    inputs.logits += offset
    inputs.check()


def test_maximum_that_grows_in_every_block() -> None:
    inputs = Inputs()
    inputs.logits += torch.linspace(-60, 60, VOCAB)
    inputs.check()


@pytest.mark.parametrize("masked", [0, 256, 600])
def test_masked_columns(masked: int) -> None:
    """-inf, also throughout whole blocks; and a target among them."""
    inputs = Inputs()
    hidden = torch.rand(VOCAB) < 0.4
    hidden[:masked], hidden[-2:] = True, False
    inputs.logits[:, hidden] = -torch.inf
    inputs.target_ids = torch.tensor([VOCAB - 1, VOCAB - 2, -1, -1])
    inputs.check()
    inputs.target_ids[2] = int(hidden.nonzero()[-1])
    stats, grad = inputs.run()
    assert stats[2, 0] == -torch.inf and stats[:, 1].isfinite().all()
    assert (
        grad[:, hidden].where(inputs.target_ids[:, None] != inputs.target_ids[2], 0.0).eq(0).all()
    )


def test_garbage() -> None:
    """A NaN reaches the results of its row; where the upstream gradient is 0, not the gradient."""
    inputs = Inputs()
    inputs.upstream[0] = 0
    expected, clean_grad = inputs.run()
    inputs.logits[0] = torch.nan
    inputs.logits[2, VOCAB // 2] = torch.nan
    stats, grad = inputs.run()
    assert stats[[0, 2], :2].isnan().all()
    assert torch.equal(stats[[1, 3]], expected[[1, 3]])
    assert grad[0].eq(0).all() and grad[2].isnan().all()
    assert torch.equal(grad[[1, 3]], clean_grad[[1, 3]])


def test_gradient_in_place() -> None:
    inputs = Inputs(softcap=9.0)
    stats, apart = inputs.run()
    assert torch.equal(inputs.gradient(stats, inputs.logits), apart)


def test_rows_that_are_not_adjacent_and_no_rows() -> None:
    logits = torch.randn(4, 1300).to(DEVICE)[:, 100:900]
    grad = torch.full((4, 2, 800), 7.0, device=DEVICE)
    ids = torch.tensor([0, 799, 400, 3], device=DEVICE)
    tile, objective = Tile(logits, None, grad[:, 0], num_real=800), Objective()
    stats = logprobs.logprob_rows(tile, ids, objective, False)
    truth = logits.double().log_softmax(-1)
    picked = truth.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(stats[:, 0].double(), picked, rtol=1e-6, atol=3e-6)
    assert stats[:, 1].eq(0).all()  # no entropy was asked for
    upstream = torch.tensor([1.0, 0.0], device=DEVICE).expand(4, 2)
    logprobs.logprob_gradient(tile, ids, objective, stats, upstream)
    exact = torch.nn.functional.one_hot(ids, 800) - truth.exp()
    torch.testing.assert_close(grad[:, 0].double(), exact, rtol=1e-5, atol=1e-7)
    assert grad[:, 1].eq(7.0).all()
    empty = Tile(logits[:0], None, num_real=800)
    assert logprobs.logprob_rows(empty, ids[:0], objective, True).shape == (0, 4)


@pytest.mark.skipif(DEVICE == "cpu", reason="would take hours in the interpreter")
def test_more_than_2_31_logits() -> None:
    """64-bit offsets: the last rows of a tensor with more elements than an int32 counts."""
    total, vocab = 16_400, 131_072
    logits = torch.zeros(total, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-2:] = torch.randn(2, vocab).bfloat16()
    truth = logits[-2:].double().log_softmax(-1)
    ids = torch.zeros(total, dtype=torch.int64, device="cuda")
    tile, objective = Tile(logits, None, logits, num_real=vocab), Objective()
    stats = logprobs.logprob_rows(tile, ids, objective, False)
    torch.testing.assert_close(stats[-2:, 0].double(), truth[:, 0], rtol=1e-6, atol=3e-6)
    upstream = torch.zeros(total, 2, device="cuda")
    upstream[-2:, 0] = 1
    logprobs.logprob_gradient(tile, ids, objective, stats, upstream)
    exact = torch.nn.functional.one_hot(ids[-2:], vocab) - truth.exp()
    assert (logits[-2:] - exact).norm() < 4e-3 * exact.norm()
    assert not logits[:-2].any()
