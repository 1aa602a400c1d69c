"""How exact 16-bit and fp32 calls are. Oracle: the fp64 reference on the same (rounded) inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import DIVERGENCES, make_problem, relative_error, run, truth
from torch import Tensor

from hero_kernels import KernelOptions, fused_linear_divergence, reference
from hero_kernels.gemm import difference_operand

DISTANCES = [1.0, 0.3, 0.1, 0.03, 0.01, 3e-3]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_shared_head_gradients_within_three_permille(
    impl: str, device: str, divergence: str, dtype: torch.dtype
) -> None:
    """From KL > 0.1 down to < 1e-6, where 16-bit logits would be 8 to 190 % off."""
    scale = 2.0**14 if dtype == torch.float16 else 1.0  # as GradScaler does
    reached = []
    for distance in DISTANCES:
        problem = make_problem(96, 64, 2048, distance=distance, sharpness=1.5).to("cpu", dtype)
        got, student = run(problem, impl, device, dtype, scale, divergence=divergence)
        expected, exact = truth(problem, divergence=divergence)
        reached.append(expected.loss.item())
        assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
        for name, value in exact.gradients().items():
            assert relative_error(student.gradients()[name], scale * value) <= 3e-3, (
                distance,
                name,
            )
    assert max(reached) > 0.1 and min(reached) < 2e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_own_head_no_worse_than_twice_plain_torch(impl: str, device: str, divergence: str) -> None:
    problem = make_problem(64, 64, 1024, shared=False, dtype=torch.bfloat16)
    _, student = run(problem, impl, device, torch.bfloat16, divergence=divergence)
    _, exact = truth(problem, divergence=divergence)
    plain = problem.to("cpu", torch.bfloat16)
    logits = (plain.student_hidden @ plain.student_weight.t()).float().log_softmax(-1)
    assert plain.teacher_weight is not None
    teacher = (plain.teacher_hidden @ plain.teacher_weight.t()).float().log_softmax(-1)
    plain_divergence(logits, teacher, divergence).mean().backward()
    for name, value in exact.gradients().items():
        theirs = relative_error(plain.gradients()[name], value)
        assert relative_error(student.gradients()[name], value) <= 2 * theirs, name


def plain_divergence(logp_s: Tensor, logp_t: Tensor, divergence: str) -> Tensor:
    """Textbook torch, as users write it."""
    if divergence == "forward_kl":
        return (logp_t.exp() * (logp_t - logp_s)).sum(-1)
    if divergence == "reverse_kl":
        return (logp_s.exp() * (logp_s - logp_t)).sum(-1)
    m = (0.5 * (logp_s.exp() + logp_t.exp())).log()
    return 0.5 * ((logp_s.exp() * (logp_s - m)).sum(-1) + (logp_t.exp() * (logp_t - m)).sum(-1))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("distance", [1e-3, 3e-5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_fp32_values_keep_relative_precision(
    impl: str, device: str, divergence: str, distance: float, softcap: float | None
) -> None:
    """Down to 1e-10, where the textbook formula in fp32 is negative or many times too large."""
    problem = make_problem(32, 48, 4096, distance=distance)
    got, student = run(problem, impl, device, torch.float32, divergence=divergence, softcap=softcap)
    expected, exact = truth(problem, divergence=divergence, softcap=softcap)
    assert expected.loss.item() < 1e-6
    assert relative_error(got.per_token, expected.per_token) < 3e-4
    assert relative_error(student.student_hidden.grad, exact.student_hidden.grad) < 3e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_students_and_teachers_are_exactly_equal(
    impl: str, device: str, divergence: str, dtype: torch.dtype
) -> None:
    problem = make_problem(9, 16, 500, distance=0.0, bias=True)
    got, student = run(problem, impl, device, dtype, divergence=divergence, softcap=5.0)
    assert got.loss.item() == 0.0
    assert all(value.eq(0).all() for value in student.gradients().values())


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
@pytest.mark.parametrize("distance", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bounds(impl: str, device: str, shared: bool, distance: float, divergence: str) -> None:
    problem = make_problem(64, 16, 300, shared=shared, distance=distance, sharpness=10.0)
    if not shared and distance < 1:  # an own head that is all but the student's
        problem.teacher_hidden = problem.student_hidden.detach() + distance
        problem.teacher_weight = problem.student_weight.detach() * (1 + distance)
    got, _ = run(problem, impl, device, torch.float32, divergence=divergence)
    assert got.per_token.min() >= 0.0
    if divergence == "jsd":
        assert got.per_token.max() <= math.log(2) * (1 + 1e-4)


@pytest.mark.parametrize("distance", [2.0, 0.3, 0.03, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_difference_operand_loses_nothing(distance: float, dtype: torch.dtype) -> None:
    """The 16-bit operand of CUDA, with the subtraction it asks for, gives delta."""
    h_t = torch.randn(200, 64).to(dtype)
    h_s = (h_t.float() + distance * torch.randn(200, 64)).to(dtype)
    weight = torch.randn(300, 64, dtype=torch.float64)
    operand, absolute = difference_operand(h_s, h_t)
    assert operand.dtype == dtype
    subtract = absolute[:, None].double()
    delta = operand.double() @ weight.t() - subtract * (h_t.double() @ weight.t())
    exact = (h_s.double() - h_t.double()) @ weight.t()
    assert relative_error(delta, exact) < 3e-4
    naive = (h_s - h_t).double() @ weight.t()
    if distance == 2.0 and dtype == torch.bfloat16:
        assert relative_error(naive, exact) > 3e-4


@pytest.mark.parametrize("columns", [None, 64], ids=["whole_rows", "split_rows"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_fp16_rows_of_one_sign_do_not_overflow(divergence: str, columns: int | None) -> None:
    """dW sums the scaled rows of all tokens: more than fp16 holds, before it is scaled back."""
    torch.manual_seed(0)
    h_s, h_t = ((0.3 * torch.randn(512, 160) + mean).half() for mean in (3.0, -3.0))
    weight = (0.3 * torch.randn(200, 160)).half()
    options = KernelOptions(tile_columns=columns)

    def gradients(function: Any, dtype: torch.dtype, **settings: Any) -> tuple[Tensor, ...]:
        states, head = (tensor.to(dtype).requires_grad_() for tensor in (h_s, weight))
        settings |= {"divergence": divergence, "reduction": "sum"}
        output = function(states, head, h_t.to(dtype), **settings)
        return torch.autograd.grad(getattr(output, "loss", output), (states, head))

    ours = gradients(fused_linear_divergence, torch.float16, options=options)
    truth = gradients(reference.fused_linear_divergence, torch.float64)
    for gradient, exact in zip(ours, truth, strict=True):
        assert relative_error(gradient, exact) <= 3e-3
