"""`divergence_from_logits`. Oracles: the fp64 reference, and `fused_linear_divergence`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import DIVERGENCES, relative_error
from torch import Tensor

from hero_kernels import (
    DivergenceOutput,
    divergence_from_logits,
    fused_linear_divergence,
    reference,
)


def logits(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 5, 60).to(device=device, dtype=dtype).unbind(0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_agrees_with_reference(
    impl: str, device: str, divergence: str, reduction: str, inplace: bool
) -> None:
    student, teacher = logits(device)
    weights, upstream = torch.rand(3, 5).round(decimals=1), torch.randn(3, 5)
    upstream = upstream if reduction == "none" else upstream[0, 0]
    leaf, exact = student.clone().requires_grad_(), student.cpu().double().requires_grad_()
    loss = divergence_from_logits(
        leaf * 1.0,
        teacher,
        divergence=divergence,
        token_weights=weights.to(device),
        reduction=reduction,
        temperature=0.7,
        inplace_gradient=inplace,
        impl=impl,
    )
    loss.backward(upstream.to(device))
    values = torch.stack(
        [
            reference.token_divergence(s / 0.7, t / 0.7, divergence=divergence)
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


def test_inplace_gradient_takes_no_second_matrix_and_overwrites() -> None:
    student, teacher = logits("cpu")
    leaf = student.clone().requires_grad_()
    buffer = leaf * 1.0
    before = buffer.detach().clone()
    divergence_from_logits(buffer, teacher, inplace_gradient=True)
    assert not torch.equal(buffer.detach(), before)
    kept = leaf * 1.0
    divergence_from_logits(kept, teacher)
    assert torch.equal(kept.detach(), before)


def test_inplace_gradient_refuses_what_would_go_wrong() -> None:
    student, teacher = logits("cpu")
    with pytest.raises(ValueError, match="is a leaf that requires grad"):
        divergence_from_logits(student.requires_grad_(), teacher, inplace_gradient=True)
    turned = (student * 1.0).transpose(0, 1)
    with pytest.raises(ValueError, match="can be viewed as"):
        divergence_from_logits(turned, teacher.transpose(0, 1), inplace_gradient=True)
    needed = torch.tanh(student * 1.0)  # tanh needs its result for its own gradient
    loss = divergence_from_logits(needed, teacher, inplace_gradient=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradient_logits_stay() -> None:
    student, teacher = logits("cpu")
    before = student.clone()
    divergence_from_logits(student, teacher, inplace_gradient=True)
    assert torch.equal(student, before)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_rows_may_hold_anything(
    impl: str, device: str, divergence: str, inplace: bool, garbage: float
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
        leaf * 1.0,
        teacher,
        target_ids=targets,
        old_logprobs=old,
        token_weights=mask,
        inplace_gradient=inplace,
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
    from hero_kernels.options import Objective

    from hero_kernels.from_logits import _logits_divergence

    student, teacher = torch.randn(2, 6, 20)
    objective = Objective(0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, 20, "full", 0, "student", True)
    rows = (torch.rand(6), torch.randint(0, 20, (6,)), None)
    torch.library.opcheck(
        _logits_divergence,
        (student.requires_grad_(), teacher, *rows, *objective, "torch", True, True),
    )


def test_inplace_gradient_refuses_shared_memory() -> None:
    """Rows that overlap would overwrite each other; views of a parameter, the parameter."""
    student, teacher = logits("cpu")
    leaf = student[0, :1].clone().requires_grad_()
    expanded = (leaf * 1.0).expand(5, 60)
    with pytest.raises(ValueError, match=r"rows lie apart.*strides \(0, 1\).*\.contiguous\(\)"):
        divergence_from_logits(expanded, teacher[0], inplace_gradient=True)
    parameter = student.clone().requires_grad_()
    for view in (parameter[1:], parameter.view(15, 60), parameter[1:][:1]):
        with pytest.raises(ValueError, match=r"is a view of a leaf.*inplace_gradient=False"):
            divergence_from_logits(view, torch.zeros(view.shape), inplace_gradient=True)
    assert torch.equal(parameter.detach(), student)
