"""What is a tensor with numbers of its own, and what only stands for one: named and refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)
_OF_TORCH = ("torch._subclasses.", "torch.distributed._functional_collectives")
"""Modules of classes that stand for a plain tensor in all they do: while a graph is traced, and
while a collective is under way."""


def is_plain(value: Any) -> bool:
    """Whether torch's functions and operations mean on it what they mean on its numbers.

    Not so where a class overrides them: masked tensors, formats of quantisation, lazy parameters.
    Parameters may override functions: packed ones do, of which `no_stand_in` says what they hold.
    """
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter or kind.__module__.startswith(_OF_TORCH):
        return True
    if not issubclass(kind, Tensor) or issubclass(kind, _LAZY):
        return False
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or hasattr(kind, "full_tensor"):
        return False
    theirs, usual = (getattr(k.__torch_function__, "__func__", None) for k in (kind, Tensor))
    return issubclass(kind, nn.Parameter) or theirs is usual


def served(name: str, value: Any, dims: str) -> None:
    """What `checks.is_tensor` does with a value that is not plain at the first look."""
    plain = is_plain(value)
    if plain and value.layout == torch.strided and value.device.type != "meta":
        if torch._C._are_functorch_transforms_active():
            _not_batched(name, value)
        if not (value.is_nested or value.is_quantized):
            return
    if isinstance(value, nn.Module):
        remedy, kind = "pass its .weight", type(value).__name__
        if hasattr(value, "base_layer"):
            remedy = "its .weight would leave out the adapter (LoRA) on it: use hidden_and_head"
        raise TypeError(f"{name} must be a tensor {dims}, got the module {kind}: {remedy}.")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(value).__name__}.")
    if hasattr(type(value), "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor of placements {getattr(value, 'placements', '?')}; a whole "
            f"tensor {dims} is expected: gather the head once a step by "
            "hero_kernels.integrations.fsdp.whole_head, which has the gradient that FSDP2 wants; "
            "without gradient .full_tensor() will do."
        )
    if not plain:
        raise ValueError(
            f"{name} is a {type(value).__name__}, whose class changes what torch's functions do; "
            f"expected a plain dense tensor {dims}. Convert it first: such classes have "
            ".to_tensor, .values, .dequantize or the like; a lazy parameter has numbers after the "
            "first call."
        )
    for is_so, what, remedy in (
        (value.is_nested, "a nested tensor", ".values()"),
        (value.layout != torch.strided, value.layout, ".to_dense()"),
        (value.is_quantized, value.dtype, ".dequantize()"),
    ):
        if is_so:
            raise ValueError(f"{name} is {what}; expected a dense tensor {dims}: {remedy}.")
    raise ValueError(f"{name} is on the meta device, without data: load or move it first.")


def _not_batched(name: str, value: Tensor) -> None:
    if torch._C._functorch.is_batchedtensor(value):  # type: ignore[attr-defined]
        raise RuntimeError(
            f"{name} is inside torch.vmap, which the loss does not serve: pass the batch as it is, "
            "[B, L, H] with reduction='none' for a loss of each token."
        )


def no_stand_in(name: str, weight: Tensor) -> None:
    """A parameter that stands for a weight [V, H] which is elsewhere or packed."""
    if hasattr(weight, "ds_shape") and tuple(weight.shape) != tuple(weight.ds_shape):
        raise ValueError(
            f"{name} is partitioned by ZeRO-3: {list(weight.shape)} is here of "
            f"{list(weight.ds_shape)}. A gradient would be lost in gathering it: use FSDP2 "
            "(hero_kernels.integrations.fsdp.whole_head) or ZeRO-2. A frozen head can be gathered: "
            "with deepspeed.zero.GatheredParameters([weight])."
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"{name} is {weight.dtype} {list(weight.shape)}: a packed 4-bit or 8-bit weight is not "
            "served. Leave the head out of the quantisation (transformers: "
            "llm_int8_skip_modules=['lm_head'], modules_to_not_convert), or pass it dequantised."
        )
