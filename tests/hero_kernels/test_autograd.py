"""Autograd, GEMM counts, compilation. Oracles: gradcheck, opcheck, eager, FLOP counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import (
    DIVERGENCES,
    ProductCounter,
    loss_of,
    make_problem,
    relative_error,
    run,
)
from torch import Tensor

from hero_kernels import (
    KernelOptions,
    divergence_from_logits,
    fused_linear_divergence,
    linear_logprobs,
)
from hero_kernels.autograd import linear_divergence
from hero_kernels.call import Call, encoded, numbers_of
from hero_kernels.divergence import divergence as divergence_loop
from hero_kernels.objective import Objective
from hero_kernels.types import Head, RowTensors

EXTRA: dict[str, dict[str, Any]] = {
    "full": {},
    "scaled": {"softcap": 3.0, "temperature": 0.7, "logit_scale": 0.5},
    "temperatures": {"temperature": torch.tensor([0.5, 1.0, 2.0, 0.8, 1.3])},
    "topk": {"support": "topk", "top_k": 4},
    "renormalised": {
        "support": "topk",
        "top_k": 3,
        "top_k_source": "teacher",
        "top_k_tail": False,
    },
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("case", EXTRA)
@pytest.mark.parametrize(
    ("shared", "reduction"), [(True, "none"), (False, "mean")], ids=["shared", "own_head"]
)
def test_gradcheck(divergence: str, case: str, shared: bool, reduction: str) -> None:
    """In fp64. A shared W moves the teacher too, so W's gradient is checked with a head apart."""
    problem = make_problem(5, 4, 11, shared=shared, bias=True, dtype=torch.float64)
    chosen: dict[str, Any] = {"divergence": divergence, "reduction": reduction, **EXTRA[case]}
    chosen |= {"beta": 0.3, "token_weights": torch.rand(5), "teacher_bias": problem.teacher_bias}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        teacher = (problem.teacher_hidden, problem.teacher_weight)
        return fused_linear_divergence(hidden, weight, *teacher, student_bias=bias, **chosen)

    inputs = (problem.student_hidden, problem.student_weight, problem.student_bias)
    frozen = [tensor.detach() if shared and i else tensor for i, tensor in enumerate(inputs)]
    assert torch.autograd.gradcheck(loss, frozen)


def test_shared_head_gets_the_students_gradient_only(impl: str, device: str) -> None:
    problem = make_problem(6, 5, 40, bias=True).to(device, torch.float32)
    loss_of(problem, impl).backward()
    apart = problem.to(device, torch.float32)
    apart.teacher_weight = apart.student_weight.detach().clone()
    apart.teacher_bias = apart.student_bias.detach().clone()
    loss_of(apart, impl).backward()
    for name, value in apart.gradients().items():
        assert relative_error(problem.gradients()[name], value) < 1e-4, name


@pytest.mark.parametrize(
    "own", [lambda w: w, Tensor.detach, lambda w: w.data], ids=["itself", "detached", "data"]
)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_own_weight_passed_as_teachers_is_the_shared_head(
    impl: str, device: str, own: Callable[[Tensor], Tensor], bias: bool
) -> None:
    """To the bit: for heads that are two the difference of the logits would have been rounded."""
    problem = make_problem(6, 5, 40, distance=1e-4, bias=bias).to(device, torch.float32)
    leaves = [problem.student_hidden, problem.student_weight]
    shared = loss_of(problem, impl)
    expected = torch.autograd.grad(shared, leaves)
    problem.teacher_weight = own(problem.student_weight)
    if problem.student_bias is not None:
        problem.teacher_bias = own(problem.student_bias)
    loss = loss_of(problem, impl)
    assert torch.equal(loss, shared)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_own_weight_as_teachers_under_autocast(impl: str, device: str) -> None:
    """Which casts the student's: the two are one head all the same."""
    problem = make_problem(6, 16, 60, distance=1e-3).to(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        shared = loss_of(problem, impl)
        for own in (problem.student_weight, problem.student_weight.detach()):
            problem.teacher_weight = own
            assert torch.equal(loss_of(problem, impl), shared)


def test_a_view_of_the_weight_is_another_head(impl: str, device: str) -> None:
    """Memory at the same place, in another order."""
    problem = make_problem(6, 40, 40).to(device, torch.float32)
    shared = loss_of(problem, impl)
    problem.teacher_weight = problem.student_weight.detach().t()
    assert not torch.allclose(loss_of(problem, impl), shared)


def test_layouts(impl: str, device: str) -> None:
    """3-D, transposed, strided and expanded inputs give what contiguous ones give."""
    flat = make_problem(6, 4, 30).to(device, torch.float32)
    expected = torch.autograd.grad(loss_of(flat, impl), [flat.student_hidden, flat.student_weight])

    hidden = (
        flat.student_hidden.detach().reshape(2, 3, 4).transpose(0, 1).contiguous().transpose(0, 1)
    )
    weight = flat.student_weight.detach().t().contiguous().t()
    wide = torch.randn(2, 3, 8, device=device)
    wide[..., ::2] = flat.teacher_hidden.reshape(2, 3, 4)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = fused_linear_divergence(hidden, weight, wide[..., ::2], impl=impl)
    got = torch.autograd.grad(loss, [hidden, weight])
    torch.testing.assert_close(got[0].reshape(6, 4), expected[0])
    torch.testing.assert_close(got[1], expected[1])

    row = flat.student_hidden.detach()[:1].requires_grad_()
    teacher = flat.teacher_hidden[:1]
    one = fused_linear_divergence(row, flat.student_weight, teacher, impl=impl)
    many = fused_linear_divergence(
        row.expand(5, 4), flat.student_weight, teacher.expand(5, 4), impl=impl
    )
    torch.testing.assert_close(many, one)
    torch.testing.assert_close(
        torch.autograd.grad(many, row)[0],
        torch.autograd.grad(one, row)[0],
    )


@pytest.mark.parametrize("trunk", [True, False], ids=["trunk", "no_trunk"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no_head"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_gemm_count(impl: str, trunk: bool, head: bool, shared: bool) -> None:
    """Four head GEMMs for a trainable head, three for a frozen one, two for evaluation."""
    rows, hidden, vocab = 24, 8, 50
    problem = make_problem(rows, hidden, vocab, shared=shared)
    student = Head(problem.student_hidden.detach(), problem.student_weight.detach(), None)
    teacher = student._replace(hidden=problem.teacher_hidden)
    if problem.teacher_weight is not None:
        teacher = teacher._replace(weight=problem.teacher_weight)
    call = Call(impl, 10, 0, vocab, need_hidden=trunk, need_weight=head)
    with ProductCounter() as counter:
        divergence_loop(student, teacher, RowTensors(torch.ones(rows)), Objective(), call)
    assert counter.flops == (2 + trunk + head) * 2 * rows * hidden * vocab


@pytest.mark.parametrize(
    ("trunk", "head", "enabled"), [(True, True, True), (True, False, True), (True, True, False)]
)
def test_only_what_requires_grad_is_computed(trunk: bool, head: bool, enabled: bool) -> None:
    """What the public function asks of the loop: one tile, one product per GEMM, profiled."""
    problem = make_problem(24, 8, 50)
    problem.student_hidden.requires_grad_(trunk)
    problem.student_weight.requires_grad_(head)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profile, torch.set_grad_enabled(enabled):
        loss_of(problem)
    events = profile.key_averages()
    count = sum(event.count for event in events if event.key in ("aten::mm", "aten::addmm_"))
    assert count == 2 + (trunk and enabled) + (head and enabled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tiles_do_not_matter(impl: str, device: str, dtype: torch.dtype) -> None:
    problem = make_problem(37, 9, 60, bias=True)
    whole, first = run(problem, impl, device, dtype, options=KernelOptions(tile_rows=64))
    for size in (1, 5, 36):
        part, second = run(problem, impl, device, dtype, options=KernelOptions(tile_rows=size))
        torch.testing.assert_close(part.per_token, whole.per_token, rtol=1e-5, atol=1e-7)
        for name, value in first.gradients().items():
            tolerance = 1e-5 if dtype == torch.float32 else 4e-3
            assert relative_error(second.gradients()[name], value) < tolerance, name


def test_row_order_does_not_matter(impl: str, device: str) -> None:
    problem = make_problem(20, 9, 60)
    order, weights = torch.randperm(20), torch.rand(20).round(decimals=1)
    plain, first = run(problem, impl, device, torch.float32, token_weights=weights)
    problem.student_hidden = problem.student_hidden.detach()[order]
    problem.teacher_hidden = problem.teacher_hidden[order]
    shuffled, second = run(problem, impl, device, torch.float32, token_weights=weights[order])
    torch.testing.assert_close(shuffled.per_token, plain.per_token[order])
    torch.testing.assert_close(shuffled.loss, plain.loss)
    torch.testing.assert_close(second.student_weight.grad, first.student_weight.grad)


def test_micro_batches_add_up(impl: str, device: str) -> None:
    """With the global denominator given, two halves have the loss and the gradient of the whole."""
    problem = make_problem(20, 9, 60).to(device, torch.float32)
    weights = torch.rand(20, device=device)
    whole = torch.autograd.grad(
        loss_of(problem, impl, token_weights=weights), problem.student_weight
    )
    for part in (slice(0, 7), slice(7, 20)):
        loss = fused_linear_divergence(
            problem.student_hidden[part],
            problem.student_weight,
            problem.teacher_hidden[part],
            token_weights=weights[part],
            num_items=weights.sum(),
            impl=impl,
        )
        loss.backward()
    torch.testing.assert_close(problem.student_weight.grad, whole[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bitwise_deterministic(impl: str, device: str, reduction: str) -> None:
    problem = make_problem(50, 9, 700)
    settings: dict[str, Any] = {"options": KernelOptions(tile_rows=16), "reduction": reduction}
    first, one = run(problem, impl, device, torch.float32, **settings)
    second, two = run(problem, impl, device, torch.float32, **settings)
    assert torch.equal(first.loss, second.loss)
    for name, value in one.gradients().items():
        assert torch.equal(value, two.gradients()[name])


def test_autocast_casts_hidden_states_and_head(impl: str, device: str) -> None:
    problem = make_problem(8, 16, 60).to(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = loss_of(problem, impl)
    loss.backward()
    rounded = problem.to(device, torch.bfloat16)
    expected = loss_of(rounded, impl)
    expected.backward()
    assert torch.equal(loss, expected)
    assert problem.student_weight.grad is not None and rounded.student_weight.grad is not None
    assert problem.student_weight.grad.dtype == torch.float32
    assert torch.equal(problem.student_weight.grad, rounded.student_weight.grad.float())


def op_arguments(impl: str, per_row: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    problem = make_problem(7, 5, 13, bias=True, dtype=dtype)
    tensors = (
        problem.student_hidden,
        problem.student_weight,
        problem.student_bias,
        problem.teacher_hidden,
        None,
        None,
        torch.tensor([0.2, 0.0, 0.1, 0.3, 0.0, 0.1, 0.1]),
        torch.randint(0, 13, (7,)),
        None,
        torch.rand(7) + 0.5 if impl == "torch" else None,
        None,
        None,
        None,
    )
    call = Call(impl, 3, 0, 13, 0, *[not per_row] * 3, with_stats=True, per_row=per_row)
    return (*tensors, numbers_of(Objective()), encoded(Objective(), call.text))


@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_opcheck(impl: str, device: str, per_row: bool, dtype: torch.dtype) -> None:
    if device == "cuda":
        pytest.skip("opcheck runs on CPU here")
    torch.library.opcheck(linear_divergence, op_arguments(impl, per_row, dtype))


@pytest.mark.parametrize("case", ["scalar", "per_row", "split", "logits", "logprobs"])
def test_second_order_is_refused(case: str) -> None:
    problem = make_problem(4, 5, 40)
    if case == "logits":
        logits = problem.student_hidden @ problem.student_weight.t()
        loss = divergence_from_logits(logits, torch.randn(4, 40))
        assert isinstance(loss, Tensor)
    elif case == "logprobs":
        ids = torch.arange(4)
        loss = linear_logprobs(problem.student_hidden, problem.student_weight, ids).sum()
    else:
        columns = 16 if case == "split" else None
        reduction = "none" if case == "per_row" else "mean"
        options = KernelOptions(tile_columns=columns)
        loss = loss_of(problem, reduction=reduction, options=options).sum()
    with pytest.raises(RuntimeError, match=r"no second-order gradients.*create_graph=True"):
        torch.autograd.grad(loss, problem.student_hidden, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_checkpoint(reentrant: bool) -> None:
    """The check for second orders sees no grad mode in a checkpoint's backward pass."""
    problem = make_problem(4, 5, 40)
    leaves = [problem.student_hidden, problem.student_weight]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_divergence(hidden, weight, problem.teacher_hidden)

    loss(*leaves).backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_autocast_leaves_fp64_alone(impl: str) -> None:
    """As a linear layer does; only "torch" takes fp64."""
    problem = make_problem(8, 16, 60, dtype=torch.float64)
    expected = loss_of(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(problem)
    assert loss.dtype == torch.float64 and torch.equal(loss, expected)


def test_the_package_may_be_imported_again() -> None:
    code = """
import sys, torch, hero_kernels as first
for name in [name for name in sys.modules if name.partition(".")[0] == "hero_kernels"]:
    del sys.modules[name]
import hero_kernels as second
assert second is not first
states, head = (torch.randn(shape, requires_grad=True) for shape in ((2, 4), (8, 4)))
second.fused_linear_divergence(states, head, torch.randn(2, 4)).backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
