"""The head of a model that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_head(weight: Tensor, dtype: torch.dtype | None = None, reduce_op: str = "avg") -> Tensor:
    """The whole [V, H] weight on every rank, with the gradient that FSDP2 would give.

    Each rank computes the loss of its own tokens with it. The gradient of the whole weight is then
    averaged over the ranks, as FSDP2 averages that of every other parameter, and each rank keeps
    its shard of it in `weight.grad`: `full_tensor` without `grad_placements` would take it for the
    same on all ranks and drop what the other ranks have. Call it once a step, not once a loss:

        hidden = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        head = whole_head(model.lm_head.weight)
        loss = fused_linear_divergence(hidden, head, teacher_hidden)

    The model has to be called as a whole; `integrations.transformers.hidden_and_head` does all of
    this.

    A weight that FSDP2 holds whole at the time (the root's after its forward pass) is returned as
    it is: its gradient FSDP2 reduces itself.

    Args:
        weight: [V, H], a DTensor sharded or replicated in any way, or a plain tensor.
        dtype: to gather it in, as FSDP2's `param_dtype`; the gradient is reduced in it too, and
            kept in the type of `weight`.
        reduce_op: "avg", or "sum" where FSDP2 was told to divide gradients by 1
            (`set_gradient_divide_factor`).

    Returns:
        [V, H], a plain tensor.
    """
    from torch.distributed.tensor import DTensor, Partial

    if dtype is not None:
        weight = weight.to(dtype)
    if not isinstance(weight, DTensor):
        return weight
    of_ranks = [Partial(reduce_op)] * weight.device_mesh.ndim
    return weight.full_tensor(grad_placements=of_ranks)
