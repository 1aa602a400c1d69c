"""The reference itself. Oracles: torch.distributions, F.kl_div and numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from hero_kernels import Objective, reference

TWO = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
SKEWED = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()


def test_kls_equal_torch_distributions() -> None:
    student, teacher = torch.randn(2, 7, 11, dtype=torch.float64)
    forward = reference.token_divergence(student, teacher, Objective("forward_kl"))
    reverse = reference.token_divergence(student, teacher, Objective("reverse_kl"))
    p_s, p_t = Categorical(logits=student), Categorical(logits=teacher)
    torch.testing.assert_close(forward, kl_divergence(p_t, p_s))
    torch.testing.assert_close(reverse, kl_divergence(p_s, p_t))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_weights_the_teacher_by_beta(beta: float) -> None:
    student, teacher = torch.randn(2, 7, 11, dtype=torch.float64).log_softmax(-1)
    mixture = torch.log((1 - beta) * student.exp() + beta * teacher.exp())
    of_student = F.kl_div(mixture, student, log_target=True, reduction="none").sum(-1)
    of_teacher = F.kl_div(mixture, teacher, log_target=True, reduction="none").sum(-1)
    got = reference.token_divergence(student, teacher, Objective(beta=beta))
    torch.testing.assert_close(got, (1 - beta) * of_student + beta * of_teacher)


def test_by_hand() -> None:
    got = reference.token_divergence(SKEWED, TWO, Objective("reverse_kl")).item()
    assert got == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))


def test_disjoint_distributions_are_ln2_apart() -> None:
    far = torch.tensor([[60.0, 0.0]], dtype=torch.float64)
    assert reference.token_divergence(far, -far, Objective()).item() == pytest.approx(math.log(2))


def test_topk_with_tail_by_hand() -> None:
    student = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    settings: dict[str, Any] = {"divergence": "forward_kl", "support": "topk"}
    objective = Objective(**settings, top_k=1)
    with_tail = reference.token_divergence(student, teacher, objective).item()
    assert with_tail == pytest.approx(0.2 * math.log(0.2 / 0.6) + 0.8 * math.log(0.8 / 0.4))
    objective = Objective(**settings, top_k=2, top_k_source="teacher", top_k_tail=False)
    without = reference.token_divergence(student, teacher, objective).item()
    p, q = 5 / 8, 3 / 4
    assert without == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


def test_logits_follow_bias_scale_softcap_temperature() -> None:
    hidden, weight = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    got = reference.scaled_logits(
        hidden, weight, torch.tensor([1.0]), temperature=0.5, softcap=10.0, logit_scale=2.0
    )
    assert got.item() == pytest.approx(10 * math.tanh((2 * 3 + 1) * 2 / 10) / 0.5)
