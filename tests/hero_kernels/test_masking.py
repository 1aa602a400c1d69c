"""Rows that do not count. Oracle: the same call without them."""

from __future__ import annotations

import pytest
import torch
from problems import Problem, ProductCounter, make_problem, run

from hero_kernels import KernelOptions, fused_linear_divergence, linear_logprobs, supports
from hero_kernels.call import Call
from hero_kernels.divergence import active_rows, divergence
from hero_kernels.objective import Objective
from hero_kernels.types import Head, RowTensors

MASK = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0])


def test_masked_rows_equal_absent_rows_whatever_they_hold(impl: str, device: str) -> None:
    problem = make_problem(8, 6, 50, bias=True)
    kept = MASK.bool()
    few = make_problem(4, 6, 50, bias=True)
    few.student_weight, few.student_bias = problem.student_weight, problem.student_bias
    few.student_hidden, few.teacher_hidden = (
        problem.student_hidden[kept],
        problem.teacher_hidden[kept],
    )
    expected, absent = run(few, impl, device, torch.float32)
    with torch.no_grad():
        problem.student_hidden[~kept] = torch.nan
        problem.teacher_hidden[~kept] = torch.inf
    got, masked = run(problem, impl, device, torch.float32, token_weights=MASK)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.per_token[kept], expected.per_token)
    assert got.per_token[~kept].eq(0).all()
    for name, value in absent.gradients().items():
        ours = masked.gradients()[name]
        if name == "student_hidden":
            assert ours[~kept].eq(0).all()
            ours = ours[kept]
        torch.testing.assert_close(ours, value)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5], ids=["no_rows", "all_masked"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_nothing_to_learn_is_zero(
    impl: str, device: str, reduction: str, rows: int, shared: bool
) -> None:
    problem = make_problem(rows, 6, 50, shared=shared, bias=True)
    output, student = run(
        problem,
        impl,
        device,
        torch.float32,
        reduction=reduction,
        token_weights=torch.zeros(rows),
        turn_ids=torch.zeros(rows, dtype=torch.long),
        turn_weights=torch.ones(2),
    )
    assert output.loss.sum().item() == 0.0
    assert output.per_turn is not None and output.per_turn.tolist() == [0.0, 0.0]
    assert set(student.gradients()) == {"student_hidden", "student_weight", "student_bias"}
    assert all(value.eq(0).all() for value in student.gradients().values())


def test_fractional_weights_give_a_weighted_mean(impl: str, device: str) -> None:
    """The divisor is the sum of the weights even where that is below 1."""
    problem = make_problem(4, 6, 50)
    output, _ = run(problem, impl, device, torch.float32, token_weights=torch.full((4,), 0.01))
    torch.testing.assert_close(output.loss, output.per_token.mean())


def test_bool_mask_and_turn_without_weight(impl: str, device: str) -> None:
    problem = make_problem(8, 6, 50)
    by_mask, _ = run(problem, impl, device, torch.float32, token_weights=MASK.bool())
    by_turn, _ = run(
        problem,
        impl,
        device,
        torch.float32,
        turn_ids=1 - MASK.long(),
        turn_weights=torch.tensor([1.0, 0.0]),
    )
    by_absence, _ = run(problem, impl, device, torch.float32, turn_ids=MASK.long() - 1)
    torch.testing.assert_close(by_turn.loss, by_mask.loss)
    torch.testing.assert_close(by_absence.loss, by_mask.loss)


def test_masked_rows_cost_no_gemm() -> None:
    problem = make_problem(8, 6, 50)
    head = Head(problem.student_hidden.detach(), problem.student_weight.detach(), None)
    teacher = head._replace(hidden=problem.teacher_hidden)
    call = Call("torch", 256, 0, 50, need_hidden=True, need_weight=True)
    with ProductCounter() as counter:
        divergence(head, teacher, RowTensors(MASK), Objective(), call)
    assert counter.flops == 4 * 2 * int(MASK.sum()) * 6 * 50


def test_bound_is_checked_on_cpu() -> None:
    kept, overflow = active_rows(MASK, 4)
    assert kept is not None and kept.tolist() == [0, 3, 4, 6] and overflow is None
    problem = make_problem(8, 6, 50)
    with pytest.raises(
        ValueError, match="4 rows have a non-zero weight, more than max_active_rows=3"
    ):
        fused_linear_divergence(
            problem.student_hidden,
            problem.student_weight,
            problem.teacher_hidden,
            token_weights=MASK,
            options=KernelOptions(max_active_rows=3),
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bound", [4, 6, 8, 3])
def test_bound_on_cuda_drops_rows_without_looking(bound: int) -> None:
    problem = make_problem(8, 6, 50)
    expected, exact = run(problem, "torch", "cpu", torch.float32, token_weights=MASK)
    options = KernelOptions(max_active_rows=bound)
    got, student = run(problem, "torch", "cuda", torch.float32, token_weights=MASK, options=options)
    if bound == 3:
        assert got.loss.isnan()
        return
    torch.testing.assert_close(got.loss.cpu(), expected.loss)
    for name, value in exact.gradients().items():
        torch.testing.assert_close(student.gradients()[name].cpu(), value)


def test_logprobs_of_masked_rows_are_zero() -> None:
    hidden = torch.randn(8, 6)
    hidden[~MASK.bool()] = torch.nan
    hidden.requires_grad_()
    weight = torch.randn(20, 6, requires_grad=True)
    targets = torch.where(MASK.bool(), 3, -100)
    logprobs, entropy = linear_logprobs(
        hidden, weight, targets, token_mask=MASK, return_entropy=True
    )
    assert logprobs[~MASK.bool()].eq(0).all() and entropy[~MASK.bool()].eq(0).all()
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad[~MASK.bool()].eq(0).all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_ids_of_any_integer_type(dtype: torch.dtype) -> None:
    """As an index uint8 would be a mask. Oracle: the same ids in int64."""
    problem = make_problem(9, 5, 40)
    turns, trajectories = torch.arange(9) // 2, torch.arange(9) // 4
    losses = [
        fused_linear_divergence(
            *problem.positional(),
            turn_ids=turns.to(kind),
            turn_weights=torch.rand(5, generator=torch.Generator().manual_seed(0)),
            trajectory_ids=trajectories.to(kind),
            loss_aggregation="trajectory",
            return_stats=True,
        )
        for kind in (torch.int64, dtype)
    ]
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert torch.equal(losses[0].per_turn, losses[1].per_turn)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
@pytest.mark.parametrize("columns", [None, 16], ids=["whole_rows", "split_rows"])
def test_a_vocabulary_masked_by_its_bias(shared: bool, columns: int | None) -> None:
    """-inf in the bias: as if these tokens did not exist, for entropies too."""
    problem = make_problem(8, 6, 50, shared=shared, bias=True)
    kept = torch.rand(50) < 0.6
    smaller = Problem(
        problem.student_hidden,
        problem.student_weight.detach()[kept],
        problem.teacher_hidden,
        None if problem.teacher_weight is None else problem.teacher_weight[kept],
        problem.student_bias.detach()[kept],
        None if problem.teacher_bias is None else problem.teacher_bias[kept],
    )
    with torch.no_grad():
        for bias in (problem.student_bias, problem.teacher_bias):
            if bias is not None:
                bias[~kept] = -torch.inf
    options = KernelOptions(tile_columns=columns)
    got, student = run(problem, "torch", "cpu", torch.float32, options=options)
    expected, exact = run(smaller, "torch", "cpu", torch.float32)
    for name in ("loss", "per_token", "student_entropy", "teacher_entropy", "top1_agreement"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    gradients, exact_gradients = student.gradients(), exact.gradients()
    torch.testing.assert_close(gradients["student_hidden"], exact_gradients["student_hidden"])
    for name in ("student_weight", "student_bias"):
        torch.testing.assert_close(gradients[name][kept], exact_gradients[name])
        assert gradients[name][~kept].eq(0).all()


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("columns", [None, 16], ids=["whole_rows", "split_rows"])
def test_a_token_without_a_distribution(impl: str, side: str, columns: int | None) -> None:
    """Logits of -inf throughout: NaN for this token, and no trace of it where it is masked."""
    if columns and impl == "cpu":
        pytest.skip("impl='cpu' sees whole rows only")
    if reason := supports(impl):
        pytest.skip(f"{impl}: {reason}")
    problem = make_problem(4, 6, 50, shared=False)
    getattr(problem, f"{side}_weight").data.abs_()
    getattr(problem, f"{side}_hidden").data[2] = -torch.inf
    options = KernelOptions(tile_columns=columns)
    whole, _ = run(problem, impl, "cpu", torch.float32, reduction="none", options=options)
    assert whole.loss[2].isnan() and whole.loss[[0, 1, 3]].isfinite().all()
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    masked, student = run(
        problem, impl, "cpu", torch.float32, token_weights=weights, options=options
    )
    assert masked.loss.isfinite() and masked.per_token[2] == 0
    assert all(value.isfinite().all() for value in student.gradients().values())
