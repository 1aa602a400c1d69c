"""`linear_logprobs`. Oracle: log_softmax of dense logits in fp64, and gradcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import ProductCounter, missing, relative_error
from torch import Tensor

from hero_kernels import KernelOptions, LinearLogprobs, linear_logprobs
from hero_kernels.backends import IMPLEMENTATIONS
from hero_kernels.call import Call, encoded, numbers_of
from hero_kernels.logprobs import _computed, _linear_logprobs, _linear_logprobs_backward
from hero_kernels.objective import Objective
from hero_kernels.reference import entropy, scaled_logits
from hero_kernels.types import Head

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"temperature": 0.6, "softcap": 4.0, "logit_scale": 0.7},
}


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if not missing(name, "linear_logprobs")])
def impl(request: pytest.FixtureRequest) -> str:
    """Name of an implementation of `linear_logprobs` that can run here."""
    name: str = request.param
    return name


def dense(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    logp = scaled_logits(hidden, weight, bias, **settings).log_softmax(-1)
    return logp.gather(1, ids[:, None])[:, 0], entropy(logp)


def tensors(
    dtype: torch.dtype, vocab: int = 50, device: str = "cpu", hidden_size: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((13, hidden_size), (vocab, hidden_size), (vocab,))
    hidden, weight, bias = (
        torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes
    )
    return hidden, weight, bias, torch.randint(0, 40, (13,)).to(device)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("entropies", [False, True], ids=["logprobs", "entropy"])
def test_gradcheck(case: str, entropies: bool) -> None:
    hidden, weight, bias, ids = tensors(torch.float64, 17)
    ids = ids % 17
    options = KernelOptions(tile_rows=5)

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return linear_logprobs(
            h, w, ids, bias=b, return_entropy=entropies, options=options, **SETTINGS[case]
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [None, 41])
def test_agrees_with_dense(
    impl: str, device: str, case: str, dtype: torch.dtype, vocab_size: int | None
) -> None:
    ours = tensors(dtype, device=device)
    ids = ours[3].cpu()
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in ours[:3]]
    settings: dict[str, Any] = {**SETTINGS[case], "vocab_size": vocab_size}
    got = linear_logprobs(
        ours[0], ours[1], ours[3], bias=ours[2], return_entropy=True, impl=impl, **settings
    )
    expected = dense(exact[0], exact[1], ids, exact[2], **settings)
    upstream = torch.randn(2, 13)
    for value, truth in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, truth) < 1e-5
    torch.autograd.backward(got, list(upstream.to(device)))
    torch.autograd.backward(expected, list(upstream.double()))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
    for value, truth in zip(ours[:3], exact, strict=True):
        assert value.grad is not None and truth.grad is not None
        assert value.grad.dtype == dtype
        assert relative_error(value.grad, truth.grad) < tolerance


@pytest.mark.parametrize("hidden_size", [7, 23])
@pytest.mark.parametrize("vocab", [123, 32769, 151936])
def test_real_vocabularies_in_tiles(impl: str, device: str, vocab: int, hidden_size: int) -> None:
    """MKL on some processors sums a product of few columns one term after the other, 1e-4 off at
    H = 7: there dX may be off by twice what torch's own product of the same gradient is."""
    hidden, weight, _, ids = tensors(torch.float32, vocab, device, hidden_size=hidden_size)
    options = KernelOptions(tile_rows=5)
    got = linear_logprobs(hidden, weight, ids, impl=impl, options=options, return_entropy=True)
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    logits.retain_grad()
    logp = logits.log_softmax(-1)
    expected = logp.gather(1, ids.cpu()[:, None])[:, 0], entropy(logp)
    for value, truth in zip(got, expected, strict=True):
        assert relative_error(value, truth) < 1e-5
    torch.autograd.backward(got, [torch.ones_like(got[0]), torch.full_like(got[1], 0.5)])
    (expected[0].sum() + 0.5 * expected[1].sum()).backward()
    assert logits.grad is not None
    product = torch.cat([part @ weight for part in logits.grad.float().to(device).split(5)])
    of_product = relative_error(product, exact[0].grad) if hidden_size == 7 else 0.0
    for value, truth, bound in zip((hidden, weight), exact, (2 * of_product, 0.0), strict=True):
        assert value.grad is not None and truth.grad is not None
        assert relative_error(value.grad, truth.grad) < max(1e-5, bound)


def test_small_gradients_survive_fp16(impl: str, device: str) -> None:
    """Upstream gradients of 1e-6 would round to 0 in an fp16 tile."""
    hidden, weight, _, ids = tensors(torch.float16, device=device)
    logprobs = linear_logprobs(hidden, weight, ids, impl=impl)
    logprobs.backward(torch.full((13,), 1e-6).to(device))
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (hidden, weight)]
    dense(exact[0], exact[1], ids.cpu(), None)[0].sum().backward()
    assert hidden.grad is not None and exact[0].grad is not None
    # The result itself is fp16, whose numbers are 6e-8 apart there.
    assert (hidden.grad.cpu().double() - 1e-6 * exact[0].grad).abs().max() <= 3.5e-8


def test_results_may_be_changed_in_place(impl: str, device: str) -> None:
    """Trainers mask results in place; nothing that the backward pass needs may suffer."""
    hidden, weight, _, ids = tensors(torch.float32, device=device)
    plain = linear_logprobs(hidden, weight, ids, impl=impl, return_entropy=True)
    expected = torch.autograd.grad(plain[0][3:].sum() + plain[1][3:].sum(), hidden)
    logprobs, values = linear_logprobs(hidden, weight, ids, impl=impl, return_entropy=True)
    logprobs[:3] = 0
    values[:3] = 0
    got = torch.autograd.grad(logprobs.sum() + values.sum(), hidden)
    assert torch.equal(got[0], expected[0])


def test_upstream_gradient_and_second_backward(impl: str, device: str) -> None:
    hidden, weight, bias, ids = tensors(torch.float32, device=device)
    total = linear_logprobs(hidden, weight, ids, bias=bias, impl=impl).sum()
    leaves = (hidden, weight, bias)
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves, retain_graph=True)
    threefold = torch.autograd.grad(3.0 * total, leaves)
    for first, second, third in zip(once, again, threefold, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(third, 3 * first)


@pytest.mark.parametrize("trunk", [True, False], ids=["trunk", "no_trunk"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no_head"])
def test_gemm_count(trunk: bool, head: bool) -> None:
    """Forward one head GEMM; backward three, two for a frozen head or trunk; of rows that count.
    With a frozen head the forward pass may form the gradient in one more."""
    mask, upstream = torch.arange(24) % 3 > 0, torch.randn(24, 2)
    given = Head(torch.randn(24, 8), torch.randn(50, 8), None), torch.arange(24)
    call, product = Call("torch", 10, 0, 50, with_stats=True), 2 * 8 * 50
    with ProductCounter() as counter:
        stats, _ = _computed(*given, mask, None, None, Objective(), call)
    assert counter.flops == int(mask.sum()) * product
    upstream[:11] = 0
    live = mask & (upstream != 0).any(1)
    needed = call.with_needs((trunk, head, False))
    with ProductCounter() as counter:
        _computed(*given, live, stats, upstream, Objective(), needed)
    products = 1 + trunk + head if trunk or head else 0
    assert counter.flops == products * int(mask[11:].sum()) * product


def test_a_frozen_head_has_no_backward_products() -> None:
    """The call forms the gradient by a second product; the backward pass does not call the op."""
    given = Head(torch.randn(24, 8), torch.randn(50, 8), None), torch.arange(24)
    mask, call = torch.arange(24) % 3 > 0, Call("torch", 10, 0, 50, need_hidden=True)
    of_logprob = torch.stack([mask, torch.zeros_like(mask)], 1)
    with ProductCounter() as counter:
        _computed(*given, mask, None, of_logprob, Objective(), call)
    assert counter.flops == 2 * int(mask.sum()) * 2 * 8 * 50
    hidden = given[0].hidden.requires_grad_()
    loss = linear_logprobs(hidden, given[0].weight, given[1], impl="torch").sum()
    with torch.profiler.profile() as profile:
        loss.backward()
    assert not [event for event in profile.events() if "logprobs_backward" in event.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_head_gets_the_gradient_of_a_trained_one(
    impl: str, device: str, dtype: torch.dtype
) -> None:
    """Masked rows of anything, rows without upstream gradient; oracle: fp64."""
    hidden, weight, bias, ids = tensors(dtype, device=device, hidden_size=16)
    mask, upstream = torch.arange(13) % 3 != 0, torch.randn(13)
    upstream[1] = 0.0
    with torch.no_grad():
        hidden[0] = torch.nan
    exact = [tensor.detach().cpu().double() for tensor in (hidden, weight, bias)]
    exact[0][0] = 0.0
    exact[0].requires_grad_()
    expected = dense(*exact[:2], ids.cpu(), exact[2], softcap=3.0, temperature=0.7)[0]
    (expected * upstream.double() * mask).sum().backward()
    got = linear_logprobs(
        hidden, weight.detach(), ids, bias=bias.detach(), softcap=3.0, temperature=0.7, impl=impl,
        token_mask=mask.to(device), options=KernelOptions(tile_rows=5),
    )  # fmt: skip
    upstream[0] = torch.nan
    got.backward(upstream.to(device))
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    assert hidden.grad[~mask].eq(0).all() and hidden.grad[1].eq(0).all()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(hidden.grad, exact[0].grad) < tolerance


def test_a_frozen_head_made_under_inference_mode_serves() -> None:
    """Nothing of it is kept; oracle: a head made as usual."""
    hidden, weight, bias, ids = tensors(torch.float32)
    with torch.inference_mode():
        made = [tensor.detach().clone() for tensor in (weight, ids, bias)]
    got = linear_logprobs(hidden, made[0], made[1], bias=made[2]).sum()
    expected = linear_logprobs(hidden, weight, ids, bias=bias).sum()
    assert torch.allclose(*(torch.autograd.grad(loss, hidden)[0] for loss in (got, expected)))


def test_rows_without_upstream_gradient_change_nothing(impl: str, device: str) -> None:
    hidden, weight, bias, ids = tensors(torch.float32, device=device)
    upstream = torch.randn(13, device=device)
    upstream[::2] = 0
    grads = []
    for rows in (slice(None), slice(1, None, 2)):
        leaves = [
            tensor.detach().clone().requires_grad_() for tensor in (hidden[rows], weight, bias)
        ]
        linear_logprobs(leaves[0], leaves[1], ids[rows], bias=leaves[2], impl=impl).backward(
            upstream[rows]
        )
        grads.append([leaf.grad for leaf in leaves])
    all_rows, some = grads
    assert all_rows[0][::2].eq(0).all()
    for ours, theirs in zip((all_rows[0][1::2], *all_rows[1:]), some, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_leading_shape_and_module_twin() -> None:
    hidden, weight, bias, ids = tensors(torch.float32)
    flat = linear_logprobs(hidden[:12], weight, ids[:12], bias=bias, temperature=0.5)
    module = LinearLogprobs(temperature=0.5)
    folded = module(hidden[:12].reshape(3, 4, 7), weight, ids[:12].reshape(3, 4), bias)
    assert torch.equal(folded.flatten(), flat)
    assert "temperature=0.5" in repr(module)


def test_layouts(impl: str, device: str) -> None:
    """Strided ids, mask, hidden states, head and upstream gradient; oracle: contiguous ones."""
    hidden, weight, _, ids = tensors(torch.float32, device=device)
    mask = torch.arange(13, device=device) % 4 != 1
    expected = linear_logprobs(hidden, weight, ids, token_mask=mask, impl=impl)
    true_grads = torch.autograd.grad(expected.sum(), (hidden, weight))
    pairs = [torch.stack([tensor, tensor], 1) for tensor in (ids, mask)]
    spread = torch.stack([hidden.detach()] * 2, 2).requires_grad_()
    turned = weight.detach().t().contiguous().t().requires_grad_()
    got = linear_logprobs(
        spread[..., 1], turned, pairs[0][:, 0], token_mask=pairs[1][:, 0], impl=impl
    )
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got.sum(), (spread, turned))
    torch.testing.assert_close(grads[0][..., 1], true_grads[0])
    torch.testing.assert_close(grads[1], true_grads[1])


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
    hidden, weight, bias, ids = tensors(torch.float32)
    mask, objective = torch.arange(13) % 3 != 0, Objective(temperature=0.7)
    call = Call("torch", 4, 0, 50, with_stats=True)

    def how(call: Call) -> tuple[Any, str]:
        return numbers_of(objective), encoded(objective, call.text)

    torch.library.opcheck(_linear_logprobs, (hidden, weight, bias, ids, mask, *how(call)))
    upstream, stats = torch.randn(13, 2), torch.randn(13, 4)
    frozen = (hidden.detach(), weight.detach(), bias.detach())
    forms_gradient = Call("torch", 4, 0, 50, need_hidden=True)
    torch.library.opcheck(_linear_logprobs, (hidden, *frozen[1:], ids, mask, *how(forms_gradient)))
    torch.library.opcheck(
        _linear_logprobs_backward,
        (*frozen, ids, mask, stats, upstream, *how(call.with_needs((True, False, True)))),
    )
