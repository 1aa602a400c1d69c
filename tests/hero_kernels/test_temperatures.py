"""One temperature for each token. Oracle: a call for each token, with a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import DIVERGENCES, make_problem, relative_error
from torch import Tensor

from hero_kernels import (
    DivergenceOutput,
    KernelOptions,
    divergence_from_logits,
    fused_linear_divergence,
)

ROWS, VOCAB = 7, 60
TEMPERATURES = torch.tensor([0.5, 1.0, 2.0, 0.7, 1.0, 3.0, 1.3])
SUPPORTS: dict[str, dict[str, Any]] = {
    "full": {"softcap": 4.0, "logit_scale": 1.5},
    "topk": {"support": "topk", "top_k": 5},
    "topk_of_teacher": {"support": "topk", "top_k": 5, "top_k_source": "teacher"},
    "renormalised": {"support": "topk", "top_k": 5, "top_k_tail": False},
    "sampled": {"support": "sampled", "divergence": "reverse_kl"},
}


def calls(
    impl: str, device: str, shared: bool, settings: dict[str, Any], options: KernelOptions
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """With a tensor of temperatures, and token by token with numbers."""
    problem = make_problem(ROWS, 6, VOCAB, shared=shared, bias=True)
    common: dict[str, Any] = {
        "old_logprobs": torch.full((ROWS,), -4.0),
        "target_ids": torch.arange(ROWS) * 8,
    }
    results = []
    for parts in ([slice(0, ROWS)], [slice(i, i + 1) for i in range(ROWS)]):
        copy = problem.to(device, torch.float32)
        outputs = []
        for part in parts:
            by = TEMPERATURES if len(parts) == 1 else TEMPERATURES[part].item()
            output = fused_linear_divergence(
                copy.student_hidden[part],
                copy.student_weight,
                copy.teacher_hidden[part],
                copy.teacher_weight,
                **copy.biases(),
                **{name: value[part].to(device) for name, value in common.items()},
                **settings,
                temperature=by.to(device) if isinstance(by, Tensor) else by,
                return_stats=True,
                impl=impl,
                options=options,
            )
            assert isinstance(output, DivergenceOutput)
            output.loss.sum().backward()
            outputs.append(output)
        joined = {
            name: torch.stack(column).sum() if column[0].dim() == 0 else torch.cat(column)
            for name, *column in zip(DivergenceOutput._fields, *outputs, strict=True)
            if column[0] is not None
        }
        results.append((joined, copy.gradients()))
    return results


def check(results: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    (whole, grads), (single, single_grads) = results
    assert whole.keys() == single.keys()
    for name, value in single.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-6)
    for name, value in single_grads.items():
        assert relative_error(grads[name], value.cpu()) < 1e-5, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_full_vocabulary(impl: str, device: str, divergence: str, shared: bool) -> None:
    settings = {**SUPPORTS["full"], "divergence": divergence, "reduction": "sum"}
    check(calls(impl, device, shared, settings, KernelOptions(tile_rows=3)))


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_every_support(support: str, reduction: str) -> None:
    settings = {**SUPPORTS[support], "reduction": reduction}
    check(calls("torch", "cpu", True, settings, KernelOptions()))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_split_rows(shared: bool) -> None:
    settings = {**SUPPORTS["full"], "reduction": "sum"}
    check(calls("torch", "cpu", shared, settings, KernelOptions(tile_columns=16)))


def test_teacher_behind_a_server() -> None:
    problem = make_problem(ROWS, 6, VOCAB)
    logits = problem.teacher_hidden @ problem.student_weight.detach().t()
    logprobs, ids = (logits / TEMPERATURES[:, None]).log_softmax(-1).topk(8)
    server: dict[str, Any] = {"support": "topk", "reduction": "none"}
    got = fused_linear_divergence(
        problem.student_hidden, problem.student_weight, teacher_topk=(ids, logprobs),
        temperature=TEMPERATURES, **server,
    )  # fmt: skip
    local = fused_linear_divergence(
        *problem.positional(), top_k=8, top_k_source="teacher", temperature=TEMPERATURES, **server
    )
    torch.testing.assert_close(got, local, rtol=1e-4, atol=1e-6)


def test_from_logits(impl: str, device: str) -> None:
    student, teacher = torch.randn(2, ROWS, VOCAB, device=device)
    grads, losses = [], []
    for by in (TEMPERATURES.to(device), None):
        leaf = student.clone().requires_grad_()
        if by is not None:
            loss = divergence_from_logits(
                leaf, teacher, temperature=by, reduction="none", impl=impl
            )
        else:
            loss = torch.cat([
                divergence_from_logits(
                    leaf[i : i + 1], teacher[i : i + 1], reduction="none", impl=impl,
                    temperature=TEMPERATURES[i].item(),
                )
                for i in range(ROWS)
            ])  # fmt: skip
        loss.sum().backward()
        losses.append(loss.detach())
        grads.append(leaf.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("garbage", [torch.nan, 0.0, -1.0])
def test_masked_tokens_may_have_any(garbage: float) -> None:
    problem = make_problem(ROWS, 6, VOCAB)
    mask = torch.arange(ROWS) % 2
    spoilt = TEMPERATURES.where(mask > 0, garbage)
    expected, got = (
        fused_linear_divergence(*problem.positional(), temperature=by, token_weights=mask)
        for by in (TEMPERATURES, spoilt)
    )
    assert torch.equal(got, expected)


def test_leading_shape_and_a_scalar_tensor() -> None:
    problem = make_problem(6, 6, VOCAB)
    hidden, teacher = problem.student_hidden.view(2, 3, 6), problem.teacher_hidden.view(2, 3, 6)
    by = TEMPERATURES[:6]
    losses = [
        fused_linear_divergence(hidden, problem.student_weight, teacher, temperature=shape)
        for shape in (by.view(2, 3), by)
    ]
    assert torch.equal(losses[0], losses[1])
    scalar, number = (
        fused_linear_divergence(hidden, problem.student_weight, teacher, temperature=value)
        for value in (torch.tensor(0.7), 0.7)
    )
    torch.testing.assert_close(scalar, number)
