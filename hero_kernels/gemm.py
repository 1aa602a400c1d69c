"""The head's products, with the type of the result chosen apart from that of the operands.

Logits, and sums over row tiles, must not be rounded to 16 bits. CUDA's library writes fp32 results
of 16-bit operands. On CPU torch cannot: where the processor multiplies bf16 numbers, `cpu_gemm`
does; elsewhere the operands are widened, the head in parts of the vocabulary that are small beside
the tile, which is several times faster than what torch makes of a 16-bit product there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hero_kernels import cpu_gemm

_OPERAND_ROWS = 1024
"""Rows of h_s - h_t worked on at once, as its temporaries are several times its size."""
PART_ROWS = 8192
"""Rows of the head widened at once on CPU."""


def takes_16_bit(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of 16-bit operands have wide results here without widening the operands."""
    return device.type == "cuda" or (dtype == torch.bfloat16 and cpu_gemm.kind() != "none")


def logits_into(weight: Tensor, *products: tuple[Tensor, Tensor]) -> None:
    """out [R, V] = hidden [R, H] · weightᵀ for each pair (out, hidden).

    Args:
        weight: [V, H]; where it has to be widened or packed, that is done once for all products.
        products: one or two pairs: results, to be overwritten, of the weight's type or fp32; and
            left operands.
    """
    wide_results = []
    for out, hidden in products:
        if out.dtype == weight.dtype:
            torch.mm(hidden.to(weight.dtype), weight.t(), out=out)
        elif out.is_cuda:
            torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=out.dtype, out=out)
        else:
            wide_results.append((out, hidden))
    if not wide_results:
        return
    if takes_16_bit(weight.device, weight.dtype):
        cpu_gemm.logits_into(
            rows_of(weight),
            *((out, rows_of(hidden.to(weight.dtype))) for out, hidden in wide_results),
        )
        return
    widened = [(out, hidden.to(out.dtype)) for out, hidden in wide_results]
    for part in _parts(weight):
        head = weight[part].to(torch.float32).t()
        for out, hidden in widened:
            torch.mm(hidden, head, out=out[:, part])


def hidden_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [R, V] · weight [V, H], summed in fp32 or wider; [R, H], fp32 or of `grad`'s type."""
    if grad.dtype == weight.dtype:
        if grad.device.type == "cpu" and takes_16_bit(grad.device, grad.dtype):
            return cpu_gemm.hidden_gradient(rows_of(grad), rows_of(weight))
        if grad.is_cuda and grad.itemsize == 2:
            # With a 16-bit result the library may also sum parts of the vocabulary in 16 bits.
            return torch.mm(grad, weight, out_dtype=torch.float32)
        return torch.mm(grad, weight)
    total = grad.new_zeros(grad.shape[0], weight.shape[1])
    add_hidden_gradient(total, grad, weight)
    return total


def add_hidden_gradient(total: Tensor, grad: Tensor, weight: Tensor) -> None:
    """total [R, H] += grad [R, V] · weight [V, H]; `total` may be of a wider type than both."""
    if grad.numel() == 0:
        return
    if grad.dtype != weight.dtype:
        for part in _parts(weight):
            total.addmm_(grad[:, part], weight[part].to(grad.dtype))
    elif total.dtype == grad.dtype:
        total.addmm_(grad, weight)
    elif total.is_cuda:
        torch.addmm(total, grad, weight, out_dtype=total.dtype, out=total)
    elif takes_16_bit(grad.device, grad.dtype):
        cpu_gemm.add_hidden_gradient(total, rows_of(grad), rows_of(weight))
    else:
        total += torch.mm(grad, weight)


def weight_gradient_into(total: Tensor, grad: Tensor, hidden: Tensor, accumulate: bool) -> None:
    """total [V, H] (+)= gradᵀ · hidden, of [R, V] and [R, H].

    Args:
        total: of the type of `grad` or a wider one.
        grad: of the logits.
        hidden: states.
        accumulate: add to what `total` holds; else overwrite it.
    """
    hidden = hidden.to(grad.dtype)
    if (
        grad.device.type == "cpu"
        and grad.element_size() == 2
        and takes_16_bit(grad.device, grad.dtype)
    ):
        cpu_gemm.weight_gradient_into(total, rows_of(grad), rows_of(hidden), accumulate)
    elif total.dtype == grad.dtype:
        if accumulate:
            total.addmm_(grad.t(), hidden)
        else:
            torch.mm(grad.t(), hidden, out=total)
    elif total.is_cuda:
        if accumulate:
            torch.addmm(total, grad.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            torch.mm(grad.t(), hidden, out_dtype=total.dtype, out=total)
    else:  # an fp16 product would be rounded before it is scaled back
        product = torch.mm(grad.t().to(total.dtype), hidden.to(total.dtype))
        total.add_(product) if accumulate else total.copy_(product)


def rows_of(matrix: Tensor) -> Tensor:
    """The matrix with adjacent columns: itself, or a copy."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _parts(weight: Tensor) -> Iterator[slice]:
    for start in range(0, weight.shape[0], PART_ROWS):
        yield slice(start, min(start + PART_ROWS, weight.shape[0]))


def difference_operand(h_s: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor]:
    """What to multiply by the head, in 16 bits, to get delta [R, V] without the error of rounding
    h_s - h_t.

    The difference of nearby 16-bit numbers is itself a 16-bit number, so there it is taken. Where
    it is not, h_s and h_t lie so far apart that the fp32 logits of both can be subtracted.

    Returns:
        The operand [R, H], h_s - h_t or h_s; and [R] bool, whether it is h_s.
    """
    operand, absolute = torch.empty_like(h_s), h_s.new_empty(len(h_s), dtype=torch.bool)
    for start in range(0, len(h_s), _OPERAND_ROWS):
        part = slice(start, start + _OPERAND_ROWS)
        exact = h_s[part].float() - h_t[part].float()
        rounded = exact.to(h_s.dtype)
        error = (exact - rounded.float()).norm(dim=1)
        absolute[part] = error > 2.0**-12 * exact.norm(dim=1)
        operand[part] = torch.where(absolute[part, None], h_s[part], rounded)
    return operand, absolute
