"""Weights in more than one form: in shards (FSDP2), or in two types.

In shards: what each rank keeps of them, and when they are whole.

Between two steps each of N ranks keeps 1/N of the trained weights in float32, of AdamW's moments
and of the teacher's weights. Passes need weights that are whole: all of them are gathered once, in
the compute type, and stay so for a whole rollout or minibatch. So a pass waits for nobody, and
ranks may take as many as they like, of whatever length. Gradients are whole too until the last
micro-batch of a step; then they are summed over the ranks, and each keeps its shard.

A GPU thus holds, in bytes a parameter: 2 for the whole weights in bfloat16 and 4 for their whole
gradients, and 16 / N for the rest. FSDP2 could do with less, by gathering layer by layer in each
pass; then all ranks would have to take the same passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hero.ranks import Ranks


class Unsharded:
    """Weights that one process holds whole."""

    ranks = Ranks()

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Trained parameters by name; of shards, this rank's."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def unsharded(self) -> AbstractContextManager[object]:
        """Within, the weights are whole."""
        return nullcontext()

    def resharded(self) -> AbstractContextManager[object]:
        """Within, trained weights may be changed."""
        return nullcontext()

    def reduce(self) -> None:
        """Sum the gradients of this step over the ranks."""

    @contextmanager
    def lent(self, own: dict[str, nn.Parameter], other: dict[str, Tensor]) -> Iterator[None]:
        """Within, the model computes with `other` in the place of its own weights of these names,
        without gradients; `other` may be on the CPU."""
        kept = {name: own[name].data for name in other}
        try:
            for name, tensor in other.items():
                own[name].data = tensor.to(own[name])
            yield
        finally:
            for name, data in kept.items():
                own[name].data = data

    def whole_weights(self) -> AbstractContextManager[dict[str, Tensor] | None]:
        """Within, all weights that are saved on rank 0; None if the model has them itself."""
        return nullcontext()


class Mastered(Unsharded):
    """Weights in the compute type, and float32 copies of those that are trained: the masters.

    The optimiser changes the masters; the weights take them over in `resharded`. Gradients are
    summed in float32: each pass' leaves the weight for its master as soon as it is there.

    Args:
        policy: a `hero.policy.Policy` with float32 weights where they are trained.
    """

    def __init__(self, policy: Any) -> None:
        self.policy, self._own = policy, super().trained(policy.model)
        self._masters: dict[str, nn.Parameter] = {}
        for name, weight in self._own.items():
            self._masters[name] = master = nn.Parameter(weight.detach())
            weight.data = master.data.to(policy.dtype)
            weight.register_post_accumulate_grad_hook(partial(_hand_over, master))

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self._masters

    @contextmanager
    def resharded(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._write(self._masters)

    @contextmanager
    def lent(self, own: dict[str, nn.Parameter], other: dict[str, Tensor]) -> Iterator[None]:
        try:
            self._write(other)
            yield
        finally:
            self._write({name: self._masters[name] for name in other})

    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._own[name].data.copy_(value.detach())

    @contextmanager
    def whole_weights(self) -> Iterator[dict[str, Tensor] | None]:
        masters: dict[str, Tensor] = {name: p.detach() for name, p in self._masters.items()}
        if self.policy.adapter is None:
            of = {id(weight): masters[name] for name, weight in self._own.items()}
            saved = self.policy.model.state_dict(keep_vars=True)
            masters = {name: of.get(id(tensor), tensor.detach()) for name, tensor in saved.items()}
        yield masters


def _hand_over(master: nn.Parameter, weight: Tensor) -> None:
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient


class Sharded(Unsharded):
    """Weights of which each rank keeps a shard.

    Args:
        policy: a `hero.policy.Policy` with float32 weights where they are trained; its model is
            sharded in place.
        ranks: who share them.
        stays_whole: but for `resharded`; else the weights are whole within `unsharded` alone.
    """

    def __init__(self, policy: Any, ranks: Ranks, stays_whole: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self.policy, self.ranks, self.stays_whole = policy, ranks, stays_whole
        model, dtype = policy.model, policy.dtype
        self._same_everywhere()
        mesh = init_device_mesh(policy.device.type, (ranks.size,))
        precision = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )  # fmt: skip
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=precision)
        model.set_reshard_after_backward(False)
        model.set_requires_gradient_sync(False)
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for part in self._modules:
            part.set_gradient_divide_factor(1.0)  # a sum: the loss holds its denominator already
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other
        with torch.no_grad(), policy.autocast():
            # FSDP2 takes the module of its first pass for the root.
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=policy.device))
        self._reshard()
        self._trained = super().trained(model)
        if stays_whole:
            self._unshard()

    def _same_everywhere(self) -> None:
        """Refuse to make one model of the shards of several."""

        def bits() -> list[int]:
            found = (p.detach().flatten().view(torch.uint8) for p in self.policy.model.parameters())
            return [int(of_one.sum(dtype=torch.int64)) for of_one in found]

        first, *others = self.ranks.all_gather(bits)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(
                    f"Rank {rank} has read other weights than rank 0 from "
                    f"{self.policy.model.config.name_or_path!r}: that folder must hold the same "
                    "model on every machine."
                )

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self._trained

    def _reshard(self) -> None:
        for module in self._modules:
            module.reshard()

    def _unshard(self) -> None:
        for module in self._modules:
            module.unshard()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        if self.stays_whole:
            yield
            return
        self._unshard()
        try:
            yield
        finally:
            self._reshard()

    @contextmanager
    def resharded(self) -> Iterator[None]:
        self._reshard()
        try:
            yield
        finally:
            self._unshard()

    def reduce(self) -> None:
        """By a last pass that adds nothing: the others are over, as many as they were."""
        policy = self.policy
        policy.model.set_requires_gradient_sync(True)
        states = policy.hidden(torch.zeros(1, 1, dtype=torch.long, device=policy.device))
        touched = [states, *policy.head.parameters()]
        (0.0 * torch.stack([tensor.float().sum() for tensor in touched]).sum()).backward()
        policy.model.set_requires_gradient_sync(False)

    @contextmanager
    def lent(self, own: dict[str, nn.Parameter], other: dict[str, Tensor]) -> Iterator[None]:
        self._exchange(own, other)
        try:
            yield
        finally:
            self._exchange(own, other)

    @torch.no_grad()
    def _exchange(self, own: dict[str, nn.Parameter], other: dict[str, Tensor]) -> None:
        with self.resharded() if other else nullcontext():
            for name, tensor in other.items():
                mine, theirs = local(own[name]), local(tensor)
                kept = mine.clone()
                mine.copy_(theirs)
                theirs.copy_(kept)

    @contextmanager
    def whole_weights(self) -> Iterator[dict[str, Tensor] | None]:
        with self.resharded():
            found = dict[int, Tensor]()  # tied weights once
            tensors: dict[str, Any] = self._trained  # an adapter is saved without its model
            if self.policy.adapter is None:
                tensors = self.policy.model.state_dict(keep_vars=True)
            for tensor in tensors.values():
                if id(tensor) not in found:
                    found[id(tensor)] = gathered(tensor.detach(), self.ranks.is_first)
            yield {name: found[id(tensor)] for name, tensor in tensors.items()}


def local(tensor: Tensor) -> Tensor:
    """This rank's shard; a tensor that is whole as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tree: Any, keep: bool) -> Any:
    """Nested dictionaries and lists with whole tensors on the CPU in the place of shards.

    Args:
        tree: the same on all ranks.
        keep: whether this rank wants them; None takes their place where it does not.
    """
    if isinstance(tree, dict):
        return {name: gathered(value, keep) for name, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value, keep) for value in tree]
    if not hasattr(tree, "full_tensor"):
        return tree
    tensor = tree.full_tensor()
    return tensor.cpu() if keep else None


def like(value: Any, tensor: Any) -> Any:
    """A whole tensor, laid out as `tensor` of the same shape is: this rank's shard of it."""
    if not hasattr(tensor, "full_tensor") or tensor.shape != getattr(value, "shape", None):
        return value
    if hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
    )


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Overwrite a tensor, in shards or not, by one that is whole."""
    local(tensor).copy_(local(like(value, tensor)))
