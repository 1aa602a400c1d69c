"""Drop-ins and modules. Oracles: the formulas as Liger and TRL document them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import make_problem, relative_error
from torch import Tensor

from hero_kernels import FusedLinearDivergence, fused_linear_divergence
from hero_kernels.integrations.liger import FusedLinearJSD
from hero_kernels.integrations.trl import chunked_divergence, generalized_jsd_loss

BETAS = [0.0, 0.1, 0.5, 1.0]


def generalised_jsd(logits_s: Tensor, logits_t: Tensor, beta: float) -> Tensor:
    """beta KL(t | m) + (1-beta) KL(s | m), m = beta t + (1-beta) s; 0: KL(t | s), 1: KL(s | t)."""
    s, t = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
    if beta in (0.0, 1.0):
        target, given = (t, s) if beta == 0.0 else (s, t)
        return F.kl_div(given, target, log_target=True, reduction="none").sum(-1)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    of_teacher = F.kl_div(m, t, log_target=True, reduction="none").sum(-1)
    return beta * of_teacher + (1 - beta) * F.kl_div(m, s, log_target=True, reduction="none").sum(
        -1
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labels", [None, torch.tensor([3, -100, 0, 7, -100])])
def test_liger(beta: float, labels: Tensor | None) -> None:
    problem = make_problem(5, 6, 30, shared=False)
    module = FusedLinearJSD(jsd_beta=beta, temperature=1.5)
    assert problem.teacher_weight is not None
    loss = module(*problem.positional(), labels)
    exact = problem.to("cpu", torch.float64)
    values = generalised_jsd(
        exact.student_hidden @ exact.student_weight.t() / 1.5,
        exact.teacher_hidden @ exact.teacher_weight.t() / 1.5,
        beta,
    )
    expected = values.mean() if labels is None else values[labels != -100].mean()
    loss.backward()
    expected.backward()
    assert relative_error(loss, expected) < 1e-5
    for name, value in exact.gradients().items():
        assert relative_error(problem.gradients()[name], value) < 1e-4


def test_liger_with_one_trainable_head_for_both() -> None:
    problem = make_problem(5, 6, 30)
    module = FusedLinearJSD()
    loss = module(
        problem.student_hidden,
        problem.student_weight,
        problem.teacher_hidden,
        problem.student_weight,
    )
    assert torch.equal(loss, fused_linear_divergence(*problem.positional()))


@pytest.mark.parametrize("beta", BETAS)
def test_trl_chunked(beta: float) -> None:
    problem = make_problem(5, 6, 30, shared=False, bias=True)
    teacher = (problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)
    values, entropy = chunked_divergence(
        problem.student_hidden,
        problem.student_weight,
        problem.student_bias,
        *teacher,
        beta,
        0.8,
        2.0,
        5.0,
        2.0,
        5.0,
    )

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 5 * torch.tanh((hidden @ weight.t() + bias) * 2 / 5) / 0.8

    logits_s = logits(problem.student_hidden, problem.student_weight, problem.student_bias)
    expected = generalised_jsd(logits_s, logits(*teacher), beta)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        entropy, torch.distributions.Categorical(logits=logits_s.detach()).entropy()
    )
    upstream = torch.randn(5)
    ours = torch.autograd.grad(values, problem.student_weight, upstream)[0]
    theirs = torch.autograd.grad(expected, problem.student_weight, upstream)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_trl_with_two_scales_is_refused() -> None:
    problem = make_problem(5, 6, 30)
    with pytest.raises(ValueError, match=r"got \(2.0, None\) for the student and \(1.0, None\)"):
        chunked_divergence(
            problem.student_hidden,
            problem.student_weight,
            None,
            problem.teacher_hidden,
            problem.student_weight,
            None,
            0.5,
            student_logit_scale=2.0,
        )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labels", [None, torch.tensor([[3, -100, 1], [0, 7, -100]])])
def test_trl_generalized_jsd_loss(beta: float, labels: Tensor | None) -> None:
    student, teacher = torch.randn(2, 2, 3, 30)
    values = generalised_jsd(student / 2, teacher / 2, beta)
    kept = values if labels is None else values[labels != -100]
    count = 2 if labels is None else kept.numel()
    loss = generalized_jsd_loss(student, teacher, labels, beta, 2.0)
    torch.testing.assert_close(loss, kept.sum() / count, rtol=1e-4, atol=1e-6)
    total = generalized_jsd_loss(student, teacher, labels, beta, 2.0, "sum")
    torch.testing.assert_close(total, kept.sum(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="'batchmean', 'sum' or 'none'; got 'mean'"):
        generalized_jsd_loss(student, teacher, reduction="mean")


def test_module_twin() -> None:
    problem = make_problem(5, 6, 30, bias=True)
    module = FusedLinearDivergence(divergence="reverse_kl", temperature=2.0, reduction="none")
    got = module(*problem.positional(), **problem.biases())
    expected = fused_linear_divergence(
        *problem.positional(),
        **problem.biases(),
        divergence="reverse_kl",
        temperature=2.0,
        reduction="none",
    )
    assert torch.equal(got, expected)
    assert not list(module.parameters())
    assert "divergence='reverse_kl'" in repr(module)
