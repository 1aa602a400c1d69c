"""The head's products, with the type of the result chosen apart from that of the operands.

Logits, and sums over chunks, must not be rounded to 16 bits. CUDA's library writes fp32 results of
16-bit operands. On CPU torch cannot, so the operands are widened there, the head in slices of the
vocabulary that are small beside the chunk; where the CPU has no 16-bit arithmetic that is also
several times faster.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SLICE_ROWS = 8192
"""Rows of the head widened at once on CPU."""


def logits_into(weight: Tensor, *products: tuple[Tensor, Tensor]) -> None:
    """out [R, V] = hidden [R, H] · weightᵀ for each pair (out, hidden).

    Args:
        weight: [V, H]; where it has to be widened, that is done once for all products.
        products: results, to be overwritten, of the weight's type or fp32; and left operands.
    """
    widened = []
    for out, hidden in products:
        if out.dtype == weight.dtype:
            torch.mm(hidden.to(weight.dtype), weight.t(), out=out)
        elif out.is_cuda:
            torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=out.dtype, out=out)
        else:
            widened.append((out, hidden.to(out.dtype)))
    for part in _slices(weight) if widened else ():
        head = weight[part].to(torch.float32).t()
        for out, hidden in widened:
            torch.mm(hidden, head, out=out[:, part])


def hidden_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [R, V] · weight [V, H], summed in fp32 or wider; [R, H] in the type of `grad`."""
    if grad.dtype == weight.dtype:
        return torch.mm(grad, weight)
    total = grad.new_zeros(grad.shape[0], weight.shape[1])
    add_hidden_gradient(total, grad, weight)
    return total


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total [V, H] += gradᵀ · hidden, of [R, V] and [R, H]; `total` may be of a wider type."""
    hidden = hidden.to(grad.dtype)
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), hidden)
    elif total.is_cuda:
        torch.addmm(total, grad.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(grad.t(), hidden)


def add_hidden_gradient(total: Tensor, grad: Tensor, weight: Tensor) -> None:
    """total [R, H] += grad [R, C] · weight [C, H]; `total` may be of a wider type than both."""
    if grad.dtype == weight.dtype:
        add_weight_gradient(total, grad.t(), weight)
        return
    for part in _slices(weight):
        total.addmm_(grad[:, part], weight[part].to(grad.dtype))


def weight_gradient_into(out: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """out [C, H] = gradᵀ · hidden, of [R, C] and [R, H], rounded once to the type of `out`."""
    hidden = hidden.to(grad.dtype)
    if out.dtype == grad.dtype:
        torch.mm(grad.t(), hidden, out=out)
    elif out.is_cuda:
        torch.mm(grad.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(grad.t(), hidden))


def _slices(weight: Tensor) -> Iterator[slice]:
    for start in range(0, weight.shape[0], SLICE_ROWS):
        yield slice(start, min(start + SLICE_ROWS, weight.shape[0]))
