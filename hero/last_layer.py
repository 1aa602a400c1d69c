"""Only the states that are read leave the last layer: its MLP need not compute the others.

Keys and values of all tokens are made before it, so nothing else depends on what it does with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def last_mlp(policy: Any) -> nn.Module | None:
    """The MLP of a policy's last layer, if it takes tokens one by one: tried on four.

    None too if layers are compiled, as hooks would come and go unnoticed.
    """
    layers = getattr(policy.model.get_decoder(), "layers", None)
    if not layers or policy.compiles:
        return None
    mlp = getattr(layers[-1], "mlp", None)
    ids, wanted = torch.arange(4, device=policy.device), torch.tensor([1, 3], device=policy.device)
    try:
        whole = policy.hidden(ids[None])[:, wanted]
        with only_at(mlp, wanted):
            some = policy.hidden(ids[None])[:, wanted]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None
    return mlp if (some - whole).abs().max() <= 0.05 * whole.abs().max() else None


@contextmanager
def only_at(mlp: nn.Module | None, wanted: Tensor | None) -> Iterator[None]:
    """Within, an MLP gives zeros but for the tokens `wanted` [N] of one sequence."""
    if mlp is None or wanted is None:
        yield
        return
    shapes = []

    def pick(_: nn.Module, states: tuple[Tensor, ...]) -> Tensor:
        shapes.append(states[0].shape)
        return states[0].index_select(1, wanted)

    def put(_: nn.Module, states: tuple[Tensor, ...], found: Tensor) -> Tensor:
        return found.new_zeros(shapes.pop()).index_copy(1, wanted, found)

    hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
