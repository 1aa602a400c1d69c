"""Whole graphs of torch.compile. Oracle: eager."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import setuptools  # noqa: F401  before any test: Inductor imports it, too late once distutils is loaded
import torch
from torch import Tensor

from hero_kernels import (
    KernelOptions,
    divergence_from_logits,
    fused_linear_divergence,
    linear_logprobs,
)


def compiled_cases() -> dict[str, Any]:
    ids, turns = torch.randint(0, 13, (9,)), torch.arange(9) // 3
    teacher, weights, factors = torch.randn(9, 6), torch.rand(9), torch.rand(3)

    def scalar(hidden: Tensor, weight: Tensor) -> Tensor:
        output = fused_linear_divergence(
            hidden,
            weight,
            teacher,
            target_ids=ids,
            token_weights=weights,
            turn_ids=turns,
            turn_weights=factors,
            loss_aggregation="turn",
            return_stats=True,
        )
        return 2 * output.loss + output.per_turn.sum() + output.student_entropy.sum()

    def per_token(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_divergence(hidden, weight, teacher, reduction="none").square().sum()

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        values, entropy = linear_logprobs(hidden, weight, ids, return_entropy=True)
        return (values * weights).sum() + entropy.sum()

    def from_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return divergence_from_logits(hidden @ weight.t(), teacher @ weight.detach().t())

    return {f.__name__: f for f in (scalar, per_token, logprobs, from_logits)}


@pytest.mark.parametrize("case", ["scalar", "per_token", "logprobs", "from_logits"])
def test_compiled_equals_eager(case: str) -> None:
    function = compiled_cases()[case]
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    eager = function(hidden, weight)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert torch.equal(eager, compiled)
    expected = torch.autograd.grad(eager, [hidden, weight])
    for ours, theirs in zip(torch.autograd.grad(compiled, [hidden, weight]), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
def test_inductor_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend of torch.compile, whose fused code around the op rounds differently."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        "torch._inductor.config.compile_threads", 1
    )  # more are processes with torch
    function = compiled_cases()["per_token"]
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    eager = function(hidden, weight)
    compiled = torch.compile(function, fullgraph=True)(hidden, weight)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)
    expected = torch.autograd.grad(eager, [hidden, weight])
    for ours, theirs in zip(torch.autograd.grad(compiled, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_compiled_with_what_varies() -> None:
    """What varies from call to call, sizes included, breaks no whole graph. Oracle: eager."""

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
        return fused_linear_divergence(hidden, weight, teacher, **settings)

    def budget(rows: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
        return (rows, 6, 13), {"options": KernelOptions(memory_budget=2**30)}

    def bound(rows: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
        return (9, 6, 13), {"options": KernelOptions(max_active_rows=rows)}

    plain: dict[str, Any] = {}
    varied: dict[str, list[tuple[tuple[int, int, int], dict[str, Any]]]] = {
        "temperature": [((9, 6, 13), {"temperature": t}) for t in (1.0, 0.7, 0.5)],
        "temperature of each token": [
            ((9, 6, 13), {"temperature": torch.rand(9) + 0.5}) for _ in range(2)
        ],
        "beta": [((9, 6, 13), {"beta": b}) for b in (0.1, 0.2, 0.3)],
        "softcap": [((9, 6, 13), {"softcap": c}) for c in (2.0, 3.0, 4.0)],
        "sizes": [((9, size, 2 * size), plain) for size in (6, 8, 10)],
        "rows": [((rows, 6, 13), plain) for rows in (9, 12, 7)],
        "rows within a budget": [budget(rows) for rows in (9, 12, 7)],
        "bound": [bound(rows) for rows in (9, 12, 15)],
    }
    for name, calls in varied.items():
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        for (rows, hidden, vocab), settings in calls:
            inputs = [torch.randn(size, hidden) for size in (rows, vocab, rows)]
            assert torch.equal(compiled(*inputs, **settings), loss(*inputs, **settings)), name


def test_the_own_weight_as_the_teachers_is_the_shared_head() -> None:
    """Also as a view that only the compiled code makes: h_s and h_t are too close for two heads."""

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        return fused_linear_divergence(hidden, weight, teacher, weight.detach())

    teacher, weight = torch.randn(6, 16), torch.randn(60, 16, requires_grad=True)
    hidden = (teacher + 1e-5 * torch.randn(6, 16)).requires_grad_()
    eager, compiled = (
        function(hidden, weight, teacher)
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    )
    assert torch.equal(eager, compiled)
    expected = torch.autograd.grad(eager, [hidden, weight])
    for ours, theirs in zip(torch.autograd.grad(compiled, [hidden, weight]), expected, strict=True):
        assert torch.equal(ours, theirs)
