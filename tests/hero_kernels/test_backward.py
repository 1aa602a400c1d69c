"""The saved gradients in the backward pass: when their memory is used up, and when it is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import check_second_backward, loss_of, make_problem, peak_bytes
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from hero_kernels import fused_linear_divergence, reference


def test_upstream_gradient_and_second_backward(impl: str, device: str) -> None:
    problem = make_problem(6, 5, 40, bias=True).to(device, torch.float32)
    leaves = [problem.student_hidden, problem.student_weight, problem.student_bias]
    loss = loss_of(problem, impl)
    check_second_backward(loss, leaves)


def test_the_backward_pass_takes_no_memory() -> None:
    """Nor a product where the upstream gradient is 1. Oracles: the allocator, the reference."""
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(4096, 256)).requires_grad_()
    student, teacher = torch.randn(2, 8, 256)
    (expected,) = torch.autograd.grad(
        reference.fused_linear_divergence(student, weight, teacher).loss, weight
    )
    for factor in (1.0, -3.0):
        loss = factor * fused_linear_divergence(student, weight, teacher)
        assert peak_bytes(loss.backward) < 100
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, factor * expected, rtol=1e-4, atol=1e-8)
        weight.grad = None


@pytest.mark.parametrize("again", [1.0, -3.0])
def test_kept_gradients_stay_as_they_are(impl: str, device: str, again: float) -> None:
    """Whatever the caller does to those of a first pass, and whatever came upstream in it."""
    problem = make_problem(6, 5, 40).to(device, torch.float32)
    weight = problem.student_weight
    loss = loss_of(problem, impl)
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    expected = expected.clone()
    for factor in (1.0, 2.0):
        (found,) = torch.autograd.grad(factor * loss, weight, retain_graph=True)
        found.zero_()
    (found,) = torch.autograd.grad(again * loss, weight)
    torch.testing.assert_close(found, again * expected)


def test_several_upstream_gradients_at_once(impl: str, device: str) -> None:
    """As torch.func and vectorised Jacobians ask for. Oracle: one at a time."""
    problem = make_problem(6, 5, 40).to(device, torch.float32)
    loss = loss_of(problem, impl)
    factors = torch.tensor([1.0, -2.0], device=device)
    (expected,) = torch.autograd.grad(loss, problem.student_weight, retain_graph=True)
    (found,) = torch.autograd.grad(loss, problem.student_weight, factors, is_grads_batched=True)
    torch.testing.assert_close(found, factors[:, None, None] * expected)


def test_compiled_autograd_is_one_graph() -> None:
    """Oracle: without it."""
    problem = make_problem(6, 5, 40)
    weight = problem.student_weight
    (expected,) = torch.autograd.grad(3 * loss_of(problem, "torch"), weight)
    loss = 3 * loss_of(problem, "torch")
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_trace_with_real_tensors(pre_dispatch: bool) -> None:
    """Its replay on other inputs. Oracle: without a trace."""
    problem, other = make_problem(6, 5, 40), make_problem(6, 5, 40, sharpness=2.0)

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(3 * fused_linear_divergence(*tensors), tensors[:2])

    inputs, others = problem.positional()[:3], other.positional()[:3]
    traced = make_fx(gradient, tracing_mode="real", pre_dispatch=pre_dispatch)(*inputs)
    for found, wanted in zip(traced(*others), gradient(*others), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("retain", [False, True])
def test_a_pass_that_failed_is_not_repeated_with_used_gradients(retain: bool) -> None:
    """Hooks on saved tensors keep torch from seeing that they changed."""
    problem = make_problem(6, 5, 40)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        loss = loss_of(problem, "torch")

    def fail(*_: Any) -> None:
        raise ValueError("of the hook")

    handle = loss.grad_fn.register_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="of the hook"):
        (3 * loss).backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward(retain_graph=retain)
