"""The log-probability rows_logprobs in torch against fp64 (logprob_cases.py)."""

from __future__ import annotations

import pytest
import torch
from logprob_cases import (
    TRANSFORMS,
    LogprobCase,
    check,
    check_garbage,
    check_in_place,
    check_masked_columns,
    check_strided,
    make_case,
    relative_error,
)
from tile_cases import far_apart

from hero_kernels import rows_logprobs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_transforms(transform: str, dtype: torch.dtype) -> None:
    case = make_case(**TRANSFORMS[transform])
    case.logits = case.logits.to(dtype)
    check(rows_logprobs, case)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_dtypes(dtype: torch.dtype) -> None:
    check(rows_logprobs, make_case(), dtype)


@pytest.mark.parametrize("vocab", [1, 2, 15, 1024, 1025, 32769])
def test_every_length_of_row(vocab: int) -> None:
    case = make_case(vocab=vocab)
    if vocab > 1:
        return check(rows_logprobs, case)
    stats, grad = case.run(rows_logprobs)
    assert stats[:, :2].eq(0).all() and grad.eq(0).all()


@pytest.mark.parametrize("sharpness", [0.0, 1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, -500.0, 1000.0])
def test_sizes_of_logits(sharpness: float, offset: float) -> None:
    """From uniform to one-hot, where exp of the logits themselves over- or underflows."""
    case = make_case(sharpness=sharpness)
    case.logits += offset
    stats, grad = case.run(rows_logprobs)
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm() + 1e-6


def test_maximum_that_grows_in_every_block() -> None:
    case = make_case(vocab=5000)
    case.logits += torch.linspace(-60, 60, 5000)
    check(rows_logprobs, case)


def test_padding_columns() -> None:
    case = make_case(vocab=1100, vocab_size=1037)
    case.logits[:, 1037:] = torch.nan
    check(rows_logprobs, case)


@pytest.mark.parametrize("masked", [0, 1024, 2100])
def test_masked_columns(masked: int) -> None:
    check_masked_columns(rows_logprobs, 3000, masked)


def test_garbage() -> None:
    check_garbage(rows_logprobs, 1300)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_in_place(dtype: torch.dtype) -> None:
    case = make_case(softcap=9.0)
    case.logits = case.logits.to(dtype)
    check_in_place(rows_logprobs, case)


def test_strided() -> None:
    check_strided(rows_logprobs)


def test_entropy_is_optional() -> None:
    case = make_case()
    case.upstream[:, 1] = 0
    both, one = case.statistics(rows_logprobs), case.statistics(rows_logprobs, with_entropy=False)
    assert one[:, 1].eq(0).all() and both[:, 1].gt(0).all()
    assert torch.equal(one[:, [0, 2, 3]], both[:, [0, 2, 3]])
    grad = torch.empty_like(case.logits)
    case.gradient(rows_logprobs, grad, one)
    assert relative_error(grad, case.truth()[1]) < 3e-6


def test_no_rows() -> None:
    case = make_case()
    empty = LogprobCase(case.logits[:0], case.target_ids[:0], case.upstream[:0])
    stats, grad = empty.run(rows_logprobs)
    assert stats.shape == (0, 4) and grad.shape == (0, 1300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_2_31_logits(dtype: torch.dtype) -> None:
    """64-bit offsets: rows so far apart that the last starts beyond element 2^31."""
    case = make_case(rows=3)
    case.target_ids[2] = 17
    case.logits = case.logits.to(dtype)
    expected, true_grad = case.truth()
    case.logits = logits = far_apart(case.logits)
    assert logits.stride(0) * 2 > 2**31
    stats = case.statistics(rows_logprobs)
    case.gradient(rows_logprobs, logits, stats)
    torch.testing.assert_close(stats[:, :2].double(), expected, rtol=1e-6, atol=3e-6)
    assert relative_error(logits, true_grad) < (3e-6 if dtype == torch.float32 else 4e-3)
