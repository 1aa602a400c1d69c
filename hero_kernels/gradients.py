"""Gradients that the ops do not have: asked for by name, or kept where autograd cannot keep them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def no_grad_wanted(name: str, value: Tensor | None, what: str) -> None:
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but the loss has no gradient for {what}: pass {name}.detach(), "
            "or compute it under torch.no_grad()."
        )


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is under way."""
    if torch.compiler.is_compiling():
        return forward_ad._current_level >= 0
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def no_tangent(tensors: dict[str, Tensor | None]) -> None:
    """Within forward-mode differentiation, which would get a tangent of 0, silently.

    The transforms of torch.func that differentiate are refused too: the op has no rule for them.
    """
    for name, value in tensors.items():
        if value is not None and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{name} has a forward-mode tangent (jvp), which the loss does not propagate: use "
                "backward-mode gradients, or hero_kernels.reference, which has both."
            )
        if value is not None and torch._C._functorch.is_gradtrackingtensor(value):  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{name} is inside a transform of torch.func (grad, vjp, jacrev, hessian), which "
                "the loss does not serve: call backward() or torch.autograd.grad, or take "
                "hero_kernels.reference, which serves them all."
            )


def savable(**tensors: Tensor | None) -> None:
    """Autograd keeps no tensor made under torch.inference_mode for a backward pass."""
    for name, value in tensors.items():
        if value is not None and not torch.compiler.is_compiling() and value.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode, but this call keeps it for the "
                f"backward pass: compute it under torch.no_grad() instead, or pass {name}.clone()."
            )
