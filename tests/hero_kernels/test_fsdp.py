"""FSDP2-sharded heads on two processes. Oracle: one process with all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import WORLD_SIZE, on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hero_kernels import fused_linear_divergence
from hero_kernels.integrations.fsdp import whole_head

VOCAB, HIDDEN, ROWS, STEPS = 37, 6, 5, 2  # V is no multiple of the ranks


class Model(nn.Module):
    """Ids to hidden states; the head is used by the loss, and by the embedding if tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.trunk = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.trunk(self.embedding(ids)).tanh()
        return hidden


def made(tied: bool) -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(1)
    model = Model(tied)
    shape = (STEPS, WORLD_SIZE, ROWS)
    return model, torch.randint(0, VOCAB, shape), torch.randn(*shape, HIDDEN)


def loss_of(hidden: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
    loss = fused_linear_divergence(hidden, head, teacher)
    assert isinstance(loss, Tensor)
    return loss


def gradients(model: Model) -> dict[str, Tensor]:
    return {
        name: value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
        for name, value in model.named_parameters()
        if value.grad is not None
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "root": {},
    "resharded": {"reshard_after_forward": True},
    "head_first": {"early": True},
    "own_unit": {"head_unit": True},
    "tied": {"tied": True},
    "tied_resharded": {"tied": True, "reshard_after_forward": True},
    "hybrid": {"mesh": (WORLD_SIZE, 1)},
    "sum": {"reduce_op": "sum", "reshard_after_forward": True},
    "bf16": {"dtype": torch.bfloat16, "reshard_after_forward": True},
}


def sharded_gradients(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name, variant in VARIANTS.items():
        model, ids, teacher = made(variant.get("tied", False))
        shape = variant.get("mesh", (WORLD_SIZE,))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        if "head_unit" in variant:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=variant.get("reshard_after_forward"))
        if "reduce_op" in variant:
            model.set_gradient_divide_factor(1.0)
            model.set_force_sum_reduction_for_comms(True)  # gloo has no other
        how = {name: variant[name] for name in ("reduce_op", "dtype") if name in variant}
        for step in range(STEPS):  # gradients accumulate
            early = whole_head(model.lm_head.weight, **how) if "early" in variant else None
            hidden = model(ids[step, rank])
            head = whole_head(model.lm_head.weight, **how) if early is None else early
            loss_of(hidden.to(head.dtype), head, teacher[step, rank].to(head.dtype)).backward()
        results[name] = gradients(model)
    return results


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, dict[str, Tensor]]]:
    return on_ranks(sharded_gradients)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_all_ranks(
    by_rank: list[dict[str, dict[str, Tensor]]], name: str
) -> None:
    model, ids, teacher = made(VARIANTS[name].get("tied", False))
    for step in range(STEPS):
        for rank in range(WORLD_SIZE):
            hidden, head = model(ids[step, rank]), model.lm_head.weight
            loss_of(hidden, head, teacher[step, rank]).backward()
    factor = 1.0 if "reduce_op" in VARIANTS[name] else 1.0 / WORLD_SIZE
    expected = {parameter: factor * value for parameter, value in gradients(model).items()}
    rounding = {"rtol": 0.05, "atol": 3e-4} if "dtype" in VARIANTS[name] else {}
    for results in by_rank:
        assert results[name].keys() == expected.keys()
        for parameter, value in expected.items():
            torch.testing.assert_close(results[name][parameter], value, **rounding)


def test_plain_weights_pass_through() -> None:
    weight = torch.randn(3, 2, requires_grad=True)
    assert whole_head(weight) is weight
    assert whole_head(weight, torch.bfloat16).dtype == torch.bfloat16
