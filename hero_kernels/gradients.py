"""What the gradients of the ops do not serve, refused by the name of the argument."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


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


def savable(
    side: str, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, **others: Tensor
) -> None:
    """Autograd keeps no tensor made under torch.inference_mode for a backward pass.

    Args:
        side: what the arguments' names begin with: "student_", "".
        hidden: states.
        weight: of the head.
        bias: of the head.
        others: further arguments by name.
    """
    of_head = {f"{side}hidden": hidden, f"{side}weight": weight, f"{side}bias": bias}
    for name, value in (of_head | others).items():
        if value is not None and not torch.compiler.is_compiling() and value.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode, but this call keeps it for the "
                f"backward pass: compute it under torch.no_grad() instead, or pass {name}.clone()."
            )
