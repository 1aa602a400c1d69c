"""`divergence_from_logits`. Oracles: the fp64 reference, and `fused_linear_divergence`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import DIVERGENCES, relative_error
from torch import Tensor

from hero_kernels import (
    DivergenceOutput,
    Objective,
    divergence_from_logits,
    fused_linear_divergence,
    reference,
)
from hero_kernels.call import Call, encoded, numbers_of
from hero_kernels.from_logits import _logits_divergence


def logits(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 5, 60).to(device=device, dtype=dtype).unbind(0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_reference(impl: str, device: str, divergence: str, reduction: str) -> None:
    student, teacher = logits(device)
    weights, upstream = torch.rand(3, 5).round(decimals=1), torch.randn(3, 5)
    upstream = upstream if reduction == "none" else upstream[0, 0]
    leaf, exact = student.clone().requires_grad_(), student.cpu().double().requires_grad_()
    loss = divergence_from_logits(
        leaf,
        teacher,
        divergence=divergence,
        token_weights=weights.to(device),
        reduction=reduction,
        temperature=0.7,
        impl=impl,
    )
    loss.backward(upstream.to(device))
    values = torch.stack(
        [
            reference.token_divergence(s / 0.7, t / 0.7, Objective(divergence))
            for s, t in zip(exact, teacher.cpu().double(), strict=True)
        ]
    )
    expected = {
        "none": weights * values,
        "sum": (weights * values).sum(),
        "mean": (weights * values).sum() / weights.sum(),
    }[reduction]
    expected.backward(upstream.double())
    assert relative_error(loss, expected) < 1e-5
    assert leaf.grad is not None and exact.grad is not None
    assert relative_error(leaf.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_rows_may_hold_anything(
    impl: str, device: str, divergence: str, garbage: float
) -> None:
    """Logits, target ids and old log-probabilities. Oracle: the same call without these rows."""
    student, teacher = logits(device)
    targets = torch.randint(0, 60, (3, 5), device=device)
    old = torch.full((3, 5), -3.0, device=device)
    chosen: dict[str, Any] = {
        "divergence": divergence,
        "impl": impl,
        "return_stats": True,
        "softcap": 20.0,
        "is_clip": 2.0,
    }
    clean = student[1:].clone().requires_grad_()
    expected = divergence_from_logits(
        clean, teacher[1:], target_ids=targets[1:], old_logprobs=old[1:], **chosen
    )
    expected.loss.backward()

    student[0], teacher[0], old[0], targets[0] = garbage, garbage, garbage, 10**6
    student[0, 0], targets[0, 0] = 0.0, -100  # a masked row that is half garbage
    mask = torch.tensor([[0], [1], [1]], device=device).expand(3, 5)
    leaf = student.clone().requires_grad_()
    got = divergence_from_logits(
        leaf,
        teacher,
        target_ids=targets,
        old_logprobs=old,
        token_weights=mask,
        **chosen,
    )
    got.loss.backward()
    for name, value in got._asdict().items():
        if value is not None and value.dim():
            assert value[0].eq(0).all(), name
            torch.testing.assert_close(value[1:], getattr(expected, name))
    torch.testing.assert_close(got.loss, expected.loss)
    assert leaf.grad is not None and leaf.grad[0].eq(0).all()
    torch.testing.assert_close(leaf.grad[1:], clean.grad)


@pytest.mark.parametrize(
    "support",
    [{"support": "topk", "top_k": 5}, {"support": "sampled", "divergence": "reverse_kl"}],
    ids=["topk", "sampled"],
)
def test_masked_rows_of_other_supports(support: dict[str, Any]) -> None:
    student, teacher = logits("cpu")
    targets = torch.randint(0, 60, (3, 5))
    expected = divergence_from_logits(student[1:], teacher[1:], target_ids=targets[1:], **support)
    student[0], teacher[0], targets[0] = torch.nan, torch.nan, 10**6
    leaf = student.clone().requires_grad_()
    mask = torch.tensor([[0], [1], [1]]).expand(3, 5)
    loss = divergence_from_logits(leaf, teacher, target_ids=targets, token_weights=mask, **support)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert leaf.grad is not None and leaf.grad[0].eq(0).all() and leaf.grad.isfinite().all()


def test_equals_the_fused_function(impl: str, device: str) -> None:
    hidden, teacher_hidden = torch.randn(2, 9, 6, device=device)
    weight, own = torch.randn(2, 60, 6, device=device)
    common: dict[str, Any] = {
        "target_ids": torch.randint(0, 60, (9,), device=device),
        "turn_ids": torch.arange(9, device=device) // 4,
        "return_stats": True,
        "vocab_size": 55,
        "softcap": 8.0,
    }
    common["target_ids"] %= 55
    fused = fused_linear_divergence(hidden, weight, teacher_hidden, own, impl=impl, **common)
    direct = divergence_from_logits(
        hidden @ weight.t(),
        teacher_hidden @ own.t(),
        impl=impl,
        **common,
    )
    assert isinstance(fused, DivergenceOutput) and isinstance(direct, DivergenceOutput)
    for name, value in fused._asdict().items():
        torch.testing.assert_close(getattr(direct, name), value, rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    student, teacher = torch.randn(2, 6, 20)
    rows = (torch.rand(6), torch.randint(0, 20, (6,)), None, torch.rand(6) + 0.5)
    call = Call("torch", 0, 0, 20, need_hidden=True, with_stats=True)
    torch.library.opcheck(
        _logits_divergence,
        (
            student.requires_grad_(),
            teacher,
            *rows,
            numbers_of(Objective()),
            encoded(Objective(), call.text),
        ),
    )


def test_small_gradients_wait_in_fp32(impl: str, device: str) -> None:
    """fp16 logits, a mean over many tokens and a GradScaler: the gradients of single logits are
    below what fp16 holds until they have been scaled. Oracle: the fp64 reference."""
    student, teacher = (torch.randn(2, 400, 50) * 0.1).half().to(device).unbind(0)
    leaf, exact = student.clone().requires_grad_(), student.cpu().double().requires_grad_()
    loss = divergence_from_logits(leaf, teacher, impl=impl)
    (2.0**16 * loss).backward()
    (
        2.0**16 * reference.token_divergence(exact, teacher.cpu().double(), Objective()).mean()
    ).backward()
    assert leaf.grad is not None and exact.grad is not None and leaf.grad.dtype == torch.float16
    assert exact.grad.abs().max() / 2**16 < 1e-5  # in fp16 numbers are 6e-8 apart there
    assert relative_error(leaf.grad, exact.grad) < 1e-3


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_upstream_garbage_of_masked_rows(impl: str, device: str, upstream: float) -> None:
    """What arrives for a masked token is not even looked at. Oracle: an upstream of 0 there."""
    student, teacher = (x[0] for x in logits(device))
    mask = torch.tensor([1, 0, 1, 1, 0], device=device)
    grads = []
    for value in (0.0, upstream):
        leaf = student.clone().requires_grad_()
        loss = divergence_from_logits(
            leaf, teacher, token_weights=mask, reduction="none", impl=impl
        )
        loss.backward(torch.full_like(loss, 2.0).where(mask > 0, value))
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1]) and grads[0].isfinite().all()


def test_vocabularies_padded_to_different_lengths(impl: str, device: str) -> None:
    """Oracle: both without their padding, which may hold anything."""
    student, teacher = (x[0] for x in logits(device))
    common: dict[str, Any] = {"impl": impl, "reduction": "sum"}
    short = student[:, :40].clone().requires_grad_()
    expected = divergence_from_logits(short, teacher[:, :40], **common)
    expected.backward()
    for widths in ((60, 45), (45, 60)):
        padded = [x[:, :width].clone() for x, width in zip((student, teacher), widths, strict=True)]
        for x in padded:
            x[:, 40:] = torch.nan
        leaf = padded[0].requires_grad_()
        loss = divergence_from_logits(leaf, padded[1], vocab_size=40, **common)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(leaf.grad[:, :40], short.grad)
        assert leaf.grad[:, 40:].eq(0).all()
