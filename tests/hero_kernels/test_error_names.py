"""Messages of a function name arguments of that function. Oracle: its signature."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import nn

from hero_kernels import (
    KernelOptions,
    Objective,
    divergence_from_logits,
    fused_linear_divergence,
    linear_logprobs,
)

N, H, V = 4, 6, 20
LONG = torch.zeros(N, dtype=torch.long)


def messages(function: Any, right: dict[str, Any], changes: list[dict[str, Any]]) -> list[str]:
    found = []
    for change in changes:
        with pytest.raises((ValueError, TypeError)) as caught:
            function(**{**right, **change})
        found.append(str(caught.value))
    return found


WRONG_ROWS: list[dict[str, Any]] = [
    {"target_ids": LONG[:3]},
    {"target_ids": torch.zeros(N)},
    {"target_ids": LONG + V},
    {"vocab_size": V + 1},
    {"impl": "none"},
    {"softcap": -1.0},
    {"logit_scale": 0.0},
    {"temperature": 0.0},
]
WRONG_WEIGHTING: list[dict[str, Any]] = [
    {"token_weights": torch.ones(3)},
    {"token_weights": torch.full((N,), torch.nan)},
    {"token_weights": -torch.ones(N)},
    {"token_weights": torch.ones(N, requires_grad=True)},
    {"turn_ids": LONG[:3]},
    {"turn_weights": torch.ones(2)},
    {"turn_weights": torch.ones(2), "turn_ids": LONG + 2},
    {"loss_aggregation": "turn"},
    {"loss_aggregation": "trajectory"},
    {"reduction": "avg"},
    {"num_items": 1.0, "reduction": "sum"},
    {"old_logprobs": torch.zeros(N)},
    {"old_logprobs": torch.full((N,), torch.nan), "target_ids": LONG},
    {"is_clip": 2.0},
    {"support": "topk"},
    {"support": "sampled", "divergence": "reverse_kl"},
    {"temperature": torch.ones(3)},
    {"temperature": torch.zeros(N)},
    {"beta": 1.0},
]
LOGITS = {"student_logits": torch.randn(N, V), "teacher_logits": torch.randn(N, V)}
PLAIN = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "target_ids": LONG}
PROVOKED: dict[Any, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    divergence_from_logits: (
        LOGITS,
        [
            *WRONG_ROWS,
            *WRONG_WEIGHTING,
            {"student_logits": torch.randn(3, V)},
            {"student_logits": torch.randn(N, V + 1)},
            {"student_logits": LONG[:, None].expand(N, V)},
            {"student_logits": torch.randn(N, V, device="meta")},
            {"student_logits": [1.0]},
            {"student_logits": torch.randn(N, V).double()},
            {"student_logits": torch.randn(N, 0), "teacher_logits": torch.randn(N, 0)},
            {"teacher_logits": torch.randn(N, V, requires_grad=True)},
            {"teacher_logits": torch.randn(N, V).to_sparse()},
        ],
    ),
    linear_logprobs: (
        PLAIN,
        [
            *WRONG_ROWS,
            {"token_mask": torch.ones(3)},
            {"hidden": torch.randn(N, H).half()},
            {"hidden": torch.randn(N, H + 1)},
            {"hidden": LONG[:, None].expand(N, H)},
            {"weight": torch.randn(V, H, device="meta")},
            {"weight": nn.Linear(H, V)},
            {"bias": torch.randn(3)},
            {"bias": torch.randn(V, device="meta")},
            {"token_mask": torch.ones(N, requires_grad=True)},
            {"temperature": torch.ones(N)},
            *(
                {"options": KernelOptions(**{n: 1 << 30})}
                for n in ("memory_budget", "tile_columns")
            ),
        ],
    ),
}


@pytest.mark.parametrize("function", PROVOKED, ids=lambda f: f.__name__)
def test_messages_name_arguments_that_exist(function: Any) -> None:
    """No argument of another function, which the caller could not pass."""
    right, changes = PROVOKED[function]
    names = {
        name
        for other in (fused_linear_divergence, divergence_from_logits, linear_logprobs)
        for name in inspect.signature(other).parameters
    }
    names |= set(Objective.__dataclass_fields__)
    names -= {"objective", "hidden", "weight", "bias", "support"}  # words of any sentence
    own = set(inspect.signature(function).parameters)
    if "objective" in own:
        own |= set(Objective.__dataclass_fields__)
    for text in messages(function, right, changes):
        foreign = {name for name in names - own if re.search(rf"\b{name}\b", text)}
        assert not foreign, text
