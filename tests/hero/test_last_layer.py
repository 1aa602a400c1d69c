"""States of a few tokens against those of a pass that computes all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hero.config import ModelConfig
from hero.policy import Policy

IDS, WANTED = torch.tensor([[5, 9, 4, 7, 3, 8]]), torch.tensor([4, 1])


class Mixing(nn.Module):
    """No MLP of one token: it adds the mean of all."""

    def forward(self, states: Tensor) -> Tensor:
        return states + states.mean(1, keepdim=True)


def tokens_in_the_last_mlp(policy: Policy) -> list[int]:
    seen: list[int] = []
    mlp = policy.model.get_decoder().layers[-1].mlp
    child = next(module for module in mlp.modules() if isinstance(module, nn.Linear))
    child.register_forward_pre_hook(lambda _, states: seen.append(states[0].shape[1]))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_states_and_gradients(fresh_policy: Policy, checkpointing: bool) -> None:
    config = ModelConfig(device="cpu", gradient_checkpointing=checkpointing)
    policy = Policy(fresh_policy.model, fresh_policy.tokenizer, config)
    found = []
    for some in (False, True):
        with policy.learning():
            states = policy.hidden(IDS, WANTED) if some else policy.hidden(IDS)[:, WANTED]
            (states * torch.arange(states.numel()).view(states.shape)).sum().backward()
        found.append([states, *(p.grad for p in policy.trainable().values() if p.grad is not None)])
        policy.model.zero_grad()
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)


def test_only_they_are_computed(fresh_policy: Policy) -> None:
    fresh_policy.hidden(IDS, WANTED)  # tries it out
    seen = tokens_in_the_last_mlp(fresh_policy)
    fresh_policy.hidden(IDS, WANTED)
    fresh_policy.hidden(IDS)
    assert seen == [2, 6]


@torch.no_grad()
def test_an_mlp_that_mixes_tokens_is_noticed(fresh_policy: Policy) -> None:
    fresh_policy.model.get_decoder().layers[-1].mlp = Mixing()
    expected = fresh_policy.hidden(IDS)[:, WANTED]
    torch.testing.assert_close(fresh_policy.hidden(IDS, WANTED), expected)
