"""The log-probability kernels in torch. The oracle is in logprob_cases.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logprob_cases import GRADIENT_ERROR, Case
from tile_cases import FLOATS, far_apart, relative_error

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6, "logit_scale": 0.6},
    "softcap": {"softcap": 6.0},
    "everything": {"softcap": 30.0, "logit_scale": 0.7, "temperature": 0.7, "with_bias": True},
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_transforms(transform: str, dtype: torch.dtype) -> None:
    case = Case(**TRANSFORMS[transform])
    case.logits = case.logits.to(dtype)
    case.check()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_dtypes(dtype: torch.dtype) -> None:
    Case().check(dtype)


@pytest.mark.parametrize("vocab", [2, 15, 1025, 300_001])
def test_lengths_of_rows(vocab: int) -> None:
    """Several rows in one block, and one row that is larger than a block."""
    Case(vocab=vocab).check()


def test_one_column() -> None:
    stats, grad = Case(vocab=1).run()
    assert stats[:, :2].eq(0).all() and grad.eq(0).all()


@pytest.mark.parametrize("sharpness", [0.0, 1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, -500.0, 1000.0])
def test_sizes_of_logits(sharpness: float, offset: float) -> None:
    """From uniform to one-hot, where exp of the logits themselves over- or underflows."""
    case = Case()
    case.logits = case.logits / 4.0 * sharpness + offset
    stats, grad = case.run()
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm() + 1e-6


def test_padding_columns() -> None:
    case = Case(vocab=1100)
    case.target_ids %= 1037
    case.target_ids[3] = -1
    case.num_real = 1037
    case.logits[:, 1037:] = torch.nan
    case.check()


@pytest.mark.parametrize("masked", [0, 1024, 2100])
def test_masked_columns(masked: int) -> None:
    """-inf: as if the columns were not there, also where they fill whole blocks."""
    case = Case(3, 3000)
    kept = torch.rand(3000) < 0.6
    kept[:masked], kept[-2:] = False, True
    case.target_ids = torch.tensor([2999, 2998, int((~kept).nonzero()[-1])])
    case.logits[:, ~kept] = -torch.inf
    stats, grad = case.run()
    shorter = Case(3, int(kept.sum()))
    shorter.logits, shorter.upstream = case.logits[:, kept], case.upstream
    shorter.target_ids = torch.tensor([shorter.num_real - 1, shorter.num_real - 2, -1])
    values, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 1].double(), values[:, 1], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(stats[:2, 0].double(), values[:2, 0], rtol=1e-6, atol=3e-6)
    assert stats[2, 0] == -torch.inf
    assert relative_error(grad[:2, kept], true_grad[:2]) < 3e-6
    assert grad[:2, ~kept].eq(0).all()


def test_garbage() -> None:
    """A NaN reaches the results of its row; where the upstream gradient is 0, not the gradient."""
    case = Case()
    case.upstream[0] = 0
    expected, clean_grad = case.run()
    case.logits[0] = torch.nan
    case.logits[2, 650] = torch.nan
    stats, grad = case.run()
    assert stats[[0, 2], :2].isnan().all()
    assert torch.equal(stats[[1, 3]], expected[[1, 3]])
    assert grad[0].eq(0).all() and grad[2].isnan().all()
    assert torch.equal(grad[[1, 3]], clean_grad[[1, 3]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_in_place(dtype: torch.dtype) -> None:
    case = Case(softcap=9.0)
    case.logits = case.logits.to(dtype)
    stats, apart = case.run(dtype)
    assert torch.equal(case.gradient(stats, case.logits), apart)


def test_strided() -> None:
    """Every other row, some of the columns, and a gradient with neighbours."""
    whole, case = Case(6, 1300), Case(3, 800)
    case.logits = whole.logits[::2, 100:900]
    around = torch.full((3, 2, 800), 7.0)
    stats = case.statistics()
    grad = case.gradient(stats, around[:, 0])
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
    assert relative_error(grad, true_grad) < 3e-6
    assert around[:, 1].eq(7.0).all()


def test_entropy_is_optional() -> None:
    case = Case()
    case.upstream[:, 1] = 0
    both, one = case.statistics(), case.statistics(with_entropy=False)
    assert one[:, 1].eq(0).all() and both[:, 1].gt(0).all()
    assert torch.equal(one[:, [0, 2, 3]], both[:, [0, 2, 3]])
    assert relative_error(case.gradient(one, torch.empty(4, 1300)), case.truth()[1]) < 3e-6


def test_no_rows() -> None:
    stats, grad = Case(rows=0).run()
    assert stats.shape == (0, 4) and grad.shape == (0, 1300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_2_31_logits(dtype: torch.dtype) -> None:
    """64-bit offsets: rows so far apart that the last starts beyond element 2^31."""
    case = Case(rows=3)
    case.target_ids[2] = 17
    case.logits = case.logits.to(dtype)
    expected, true_grad = case.truth()
    case.logits = far_apart(case.logits)
    assert case.logits.stride(0) * 2 > 2**31
    stats = case.statistics()
    torch.testing.assert_close(stats[:, :2].double(), expected, rtol=1e-6, atol=3e-6)
    grad = case.gradient(stats, case.logits)
    assert relative_error(grad, true_grad) < GRADIENT_ERROR[dtype]
