"""Cases of the Triton log-probability kernels against fp64 (logprob_cases.py).

test_triton_rows.py runs this file in a process of its own: with TRITON_INTERPRET=1, which must be
set before triton is imported, or on a GPU.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from logprob_cases import (
    TRANSFORMS,
    check,
    check_garbage,
    check_in_place,
    check_masked_columns,
    check_strided,
    make_case,
    relative_error,
)
from torch import Tensor
from triton_tools import mend_interpreter

from hero_kernels.triton import logprobs
from hero_kernels.triton.configs import RowConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    mend_interpreter()
SMALL_BLOCKS = RowConfig(block_v=256, num_warps=4)
VOCAB = 700


def moved(value: Any, memo: dict[int, Tensor]) -> Any:
    """A tensor on the device that the kernels run on; the same for the same."""
    if INTERPRETED or not isinstance(value, Tensor):
        return value
    return memo.setdefault(id(value), value.cuda())


def logprob_rows(*tensors: Tensor, **options: Any) -> Tensor:
    memo: dict[int, Tensor] = {}
    options = {name: moved(value, memo) for name, value in options.items()}
    inputs = [moved(tensor, memo) for tensor in tensors]
    return logprobs.logprob_rows(*inputs, **options, config=SMALL_BLOCKS).cpu()


def logprob_gradient(logits: Tensor, grad: Tensor, *rest: Tensor, **options: Any) -> None:
    memo: dict[int, Tensor] = {}
    options = {name: moved(value, memo) for name, value in options.items()}
    inputs = [moved(tensor, memo) for tensor in (logits, grad, *rest)]
    logprobs.logprob_gradient(*inputs, **options, config=SMALL_BLOCKS)
    grad.copy_(inputs[1])


KERNELS = SimpleNamespace(logprob_rows=logprob_rows, logprob_gradient=logprob_gradient)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str) -> None:
    check(KERNELS, make_case(vocab=VOCAB, **TRANSFORMS[transform]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    case = make_case(vocab=VOCAB)
    case.logits = case.logits.to(dtype)
    check(KERNELS, case, dtype)


@pytest.mark.parametrize("vocab", [2, 15, 256, 257])
def test_every_length_of_row(vocab: int) -> None:
    check(KERNELS, make_case(vocab=vocab))


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, -500.0, 1000.0])
def test_sizes_of_logits(sharpness: float, offset: float) -> None:
    case = make_case(2, VOCAB, sharpness=sharpness)
    case.logits += offset
    stats, grad = case.run(KERNELS)
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm() + 1e-6


def test_maximum_that_grows_in_every_block() -> None:
    case = make_case(vocab=VOCAB)
    case.logits += torch.linspace(-60, 60, VOCAB)
    check(KERNELS, case)


def test_padding_columns() -> None:
    case = make_case(vocab=VOCAB, vocab_size=637)
    case.logits[:, 637:] = torch.nan
    check(KERNELS, case)


@pytest.mark.parametrize("masked", [0, 256, 600])
def test_masked_columns(masked: int) -> None:
    check_masked_columns(KERNELS, VOCAB, masked)


def test_garbage() -> None:
    check_garbage(KERNELS, VOCAB)


def test_gradient_in_place() -> None:
    check_in_place(KERNELS, make_case(vocab=VOCAB, softcap=9.0))


def test_strided() -> None:
    check_strided(KERNELS)


def test_entropy_is_optional() -> None:
    case = make_case(vocab=VOCAB)
    both, one = case.statistics(KERNELS), case.statistics(KERNELS, with_entropy=False)
    assert one[:, 1].eq(0).all() and both[:, 1].gt(0).all()
    assert torch.equal(one[:, [0, 2, 3]], both[:, [0, 2, 3]])


def test_no_rows() -> None:
    case = make_case(vocab=VOCAB)
    case.logits, case.target_ids = case.logits[:0], case.target_ids[:0]
    case.upstream = case.upstream[:0]
    assert case.run(KERNELS)[0].shape == (0, 4)


@pytest.mark.skipif(INTERPRETED, reason="would take hours in the interpreter")
def test_more_than_2_31_logits() -> None:
    """64-bit offsets: the last rows of a tensor with more elements than an int32 counts."""
    total, vocab = 16_400, 131_072
    case = make_case(2, vocab)
    case.logits = case.logits.bfloat16()
    logits = torch.zeros(total, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-2:] = case.logits.cuda()
    arguments = {**case.arguments(), "target_ids": torch.zeros(total).long().cuda()}
    arguments["target_ids"][-2:] = case.target_ids.cuda()
    upstream = torch.zeros(total, 2, device="cuda")
    upstream[-2:] = case.upstream.cuda()
    stats = logprobs.logprob_rows(logits, with_entropy=True, **arguments)
    logprobs.logprob_gradient(logits, logits, stats, upstream, **arguments)
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[-2:, :2].double().cpu(), values, rtol=1e-6, atol=3e-6)
    assert relative_error(logits[-2:].cpu(), true_grad) < 4e-3
    assert not logits[:-2].any()
