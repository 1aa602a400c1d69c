"""The fused design as a whole against fp64; run by test_triton_fused.py, in Triton's interpreter
or on a GPU.

In the interpreter tensors are on the CPU, where the public function would refuse the design: the
loop beneath it is called.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_phases_tools import DEVICE

from hero_kernels import logprob_loop, reference
from hero_kernels.chunked import Head
from hero_kernels.divergence_loop import RowTensors, run
from hero_kernels.layout import Plan
from hero_kernels.options import Divergence, Objective

DIVERGENCES = pytest.mark.parametrize("divergence", list(Divergence), ids=str)
VOCAB, HIDDEN, ROWS = 300, 48, 29


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch settings of an H100 where there is no device."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


class Inputs:
    """Random tensors of a call, in 16 bits, and what the dense definition makes of them."""

    def __init__(self, distance: float, own_head: bool, dtype: torch.dtype, **settings: Any):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.h_t = normal(ROWS, HIDDEN).to(dtype)
        self.h_s = (self.h_t.float() + distance * normal(ROWS, HIDDEN)).to(dtype)
        self.weight = (3 / math.sqrt(HIDDEN) * normal(VOCAB + 5, HIDDEN)).to(dtype)
        self.own = (self.weight.float() + 0.1 * normal(VOCAB + 5, HIDDEN)).to(dtype)
        self.own_head = own_head
        self.bias = normal(VOCAB + 5).to(dtype)
        self.weights = torch.rand(ROWS, generator=generator)
        self.weights[::4] = 0
        self.targets = torch.randint(VOCAB, (ROWS,), generator=generator)
        self.settings = settings

    def ours(self, divergence: Divergence, with_ratio: bool) -> tuple[Tensor, Tensor, Any]:
        """Losses, stats and gradients of the fused design."""
        get = self.settings.get
        objective = Objective(
            divergence.code,
            0.3,
            get("temperature", 1.0),
            get("softcap", 0.0),
            1.0,
            2.0,
            0.0,
            VOCAB,
            "full",
            0,
            "student",
            True,
        )
        plan = Plan("auto", 12, "float32", 0, True, True, True, True, "fused")
        h_s, h_t, weight, own, bias, weights, targets = (
            tensor.to(DEVICE, copy=True)
            for tensor in (
                self.h_s, self.h_t, self.weight, self.own, self.bias, self.weights, self.targets,
            )
        )  # fmt: skip
        h_s[weights == 0] = torch.nan
        student = Head(h_s, weight, bias)
        teacher = Head(h_t, own if self.own_head else weight, bias)
        old = self.old_logprobs().to(DEVICE) if with_ratio else None
        rows = RowTensors(weights, targets, old, None, None)
        result = run(student, teacher, rows, objective, plan)
        return result.losses.cpu(), result.stats.cpu(), [g.cpu() for g in result.gradients]

    def old_logprobs(self) -> Tensor:
        return torch.linspace(-9, -1, ROWS)

    def truth(self, divergence: Divergence, with_ratio: bool) -> tuple[Any, list[Tensor]]:
        h_s, weight, bias = (
            tensor.double().requires_grad_() for tensor in (self.h_s, self.weight, self.bias)
        )
        output = reference.fused_linear_divergence(
            h_s,
            weight,
            self.h_t.double(),
            self.own.double() if self.own_head else None,
            divergence=str(divergence),
            beta=0.3,
            student_bias=bias,
            teacher_bias=self.bias.double() if self.own_head else None,
            token_weights=self.weights.double(),
            target_ids=self.targets,
            old_logprobs=self.old_logprobs().double() if with_ratio else None,
            is_clip=2.0 if with_ratio else None,
            reduction="sum",
            vocab_size=VOCAB,
            **{k: v or None for k, v in self.settings.items()},
        )
        return output, list(torch.autograd.grad(output.loss, (h_s, weight, bias)))


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@DIVERGENCES
@pytest.mark.parametrize(
    ("distance", "own_head", "dtype", "settings"),
    [
        pytest.param(1.0, False, torch.bfloat16, {}, id="far"),  # h_s - h_t is no 16-bit number
        pytest.param(1e-2, False, torch.bfloat16, {}, id="near"),
        pytest.param(0.1, False, torch.float16, {"temperature": 1.5, "softcap": 20.0}, id="fp16"),
        pytest.param(0.3, True, torch.bfloat16, {}, id="own-head"),
    ],
)
def test_against_the_dense_definition(
    divergence: Divergence, distance: float, own_head: bool, dtype: torch.dtype, settings: Any
) -> None:
    inputs = Inputs(distance, own_head, dtype, **settings)
    # A ratio is as exact as the target's log-probability: 2^-11 of delta, which is large if far.
    with_ratio = settings == {} and distance < 1
    losses, stats, gradients = inputs.ours(divergence, with_ratio)
    truth, expected = inputs.truth(divergence, with_ratio)
    active = inputs.weights != 0
    assert relative_error(losses.sum(), truth.loss.detach()) < 1e-3
    for column, value in ((2, truth.student_logprobs), (3, truth.teacher_logprobs)):
        torch.testing.assert_close(
            stats[active, column].double(), value[active], rtol=2e-3, atol=2e-3
        )
    torch.testing.assert_close(
        stats[active, 4].double(), truth.student_entropy[active], rtol=2e-3, atol=2e-3
    )
    for gradient, exact, limit in zip(gradients, expected, (3e-3, 3e-3, 4e-3), strict=True):
        assert relative_error(gradient, exact) < limit
    assert gradients[0][~active].eq(0).all() and gradients[1][VOCAB:].eq(0).all()


@DIVERGENCES
def test_equal_hidden_states_give_exactly_zero(divergence: Divergence) -> None:
    inputs = Inputs(0.0, False, torch.bfloat16)
    losses, _, gradients = inputs.ours(divergence, with_ratio=False)
    assert losses.eq(0).all() and all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_probabilities_without_logits(dtype: torch.dtype) -> None:
    """The forward pass in one GEMM, and the usual backward pass from its numbers."""
    inputs = Inputs(1.0, False, dtype)
    h, weight, bias = (
        tensor.double().requires_grad_() for tensor in (inputs.h_s, inputs.weight, inputs.bias)
    )
    logits = reference.scaled_logits(
        h, weight, bias, temperature=1.3, softcap=25.0, vocab_size=VOCAB
    )
    logp = torch.log_softmax(logits, -1)
    picked = logp.gather(1, inputs.targets[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    active = inputs.weights != 0
    upstream = torch.stack([inputs.weights, 0.1 * inputs.weights], 1)
    total = (upstream[:, 0] * picked + upstream[:, 1] * entropy).sum()
    expected = torch.autograd.grad(total, (h, weight, bias))

    states, head, of_head, targets, mask, weights = (
        tensor.to(DEVICE, copy=True)
        for tensor in (
            inputs.h_s, inputs.weight, inputs.bias, inputs.targets, active, upstream.float(),
        )
    )  # fmt: skip
    states[~mask] = torch.nan
    plan = Plan("auto", 12, "float32", 0, True, True, True, True, "fused")
    arguments = (Head(states, head, of_head), logprob_loop.Tokens(targets, mask))
    transform = logprob_loop.Transform(1.3, 25.0, 1.0, VOCAB)
    stats = logprob_loop.forward(*arguments, transform, plan)
    torch.testing.assert_close(
        stats[mask, :2].double().cpu(),
        torch.stack([picked, entropy], 1)[active].detach(),
        rtol=1e-5,
        atol=2e-5,
    )
    assert stats[~mask].eq(0).all()
    grads = logprob_loop.backward(
        *arguments, stats, weights, transform, plan._replace(design="chunked")
    )
    for gradient, exact in zip(grads, expected, strict=True):
        assert gradient is not None
        assert relative_error(gradient.cpu(), exact) < 4e-3
