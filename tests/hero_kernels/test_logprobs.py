"""`linear_logprobs`. Oracle: log_softmax of dense logits in fp64, and gradcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import relative_error
from torch import Tensor

from hero_kernels import KernelOptions, LinearLogprobs, linear_logprobs
from hero_kernels.reference import entropy, scaled_logits

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"temperature": 0.6, "softcap": 4.0, "logit_scale": 0.7},
}


def dense(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    logp = scaled_logits(hidden, weight, bias, **settings).log_softmax(-1)
    return logp.gather(1, ids[:, None])[:, 0], entropy(logp)


def tensors(dtype: torch.dtype, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(13, 7, dtype=dtype), torch.randn(vocab, 7, dtype=dtype)
    bias = torch.randn(vocab, dtype=dtype)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    return hidden, weight, bias, torch.randint(0, 40, (13,))


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("entropies", [False, True], ids=["logprobs", "entropy"])
def test_gradcheck(case: str, entropies: bool) -> None:
    hidden, weight, bias, ids = tensors(torch.float64, 17)
    ids = ids % 17
    options = KernelOptions(chunk_size=5)

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return linear_logprobs(
            h, w, ids, bias=b, return_entropy=entropies, options=options, **SETTINGS[case]
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [None, 41])
def test_agrees_with_dense(case: str, dtype: torch.dtype, vocab_size: int | None) -> None:
    ours = tensors(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours[:3]]
    settings: dict[str, Any] = {**SETTINGS[case], "vocab_size": vocab_size}
    got = linear_logprobs(ours[0], ours[1], ours[3], bias=ours[2], return_entropy=True, **settings)
    expected = dense(exact[0], exact[1], ours[3], exact[2], **settings)
    upstream = torch.randn(2, 13)
    for value, truth in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, truth) < 1e-5
    sum(
        ((value * u).sum() for value, u in zip(got, upstream, strict=True)), torch.zeros(())
    ).backward()
    sum(
        ((value * u).sum() for value, u in zip(expected, upstream.double(), strict=True)),
        torch.zeros(()),
    ).backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
    for value, truth in zip(ours[:3], exact, strict=True):
        assert value.grad is not None and truth.grad is not None
        assert value.grad.dtype == dtype
        assert relative_error(value.grad, truth.grad) < tolerance


def test_leading_shape_and_module_twin() -> None:
    hidden, weight, bias, ids = tensors(torch.float32)
    flat = linear_logprobs(hidden[:12], weight, ids[:12], bias=bias, temperature=0.5)
    module = LinearLogprobs(temperature=0.5)
    folded = module(hidden[:12].reshape(3, 4, 7), weight, ids[:12].reshape(3, 4), bias)
    assert torch.equal(folded.flatten(), flat)
    assert "temperature=0.5" in repr(module)


def test_frozen_parts_get_no_gradient() -> None:
    hidden, weight, bias, ids = tensors(torch.float32)
    loss = linear_logprobs(hidden, weight.detach(), ids, bias=bias.detach())
    assert isinstance(loss, Tensor)
    loss.sum().backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, ids).requires_grad


def test_no_rows() -> None:
    hidden, weight = torch.randn(0, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    got = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert got.shape == (0,)
    got.sum().backward()
    assert weight.grad is not None and weight.grad.eq(0).all()


def test_opcheck() -> None:
    from hero_kernels.logprobs import _linear_logprobs, _linear_logprobs_backward

    hidden, weight, bias, ids = tensors(torch.float32)
    mask = torch.arange(13) % 3 != 0
    settings = (0.7, 0.0, 1.0, 50)
    loop = ("torch", 4, "float32", 0)
    torch.library.opcheck(
        _linear_logprobs, (hidden, weight, bias, ids, mask, *settings, True, *loop)
    )
    upstream, stats = torch.randn(13, 2), torch.randn(13, 4)
    frozen = (hidden.detach(), weight.detach(), bias.detach())
    torch.library.opcheck(
        _linear_logprobs_backward,
        (*frozen, ids, mask, stats, upstream, *settings, *loop, True, False, True),
    )
