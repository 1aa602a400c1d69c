"""Rows whose vocabulary is seen in tiles. Oracles: the fp64 reference, whole rows, FLOP counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import (
    DIVERGENCES,
    Problem,
    ProductCounter,
    assert_agrees,
    check_second_backward,
    loss_of,
    make_problem,
    relative_error,
    run,
    truth,
)
from torch import Tensor

from hero_kernels import KernelOptions, explain, fused_linear_divergence
from hero_kernels.autograd import linear_divergence
from hero_kernels.call import Call, encoded, numbers_of
from hero_kernels.divergence import divergence
from hero_kernels.objective import Objective
from hero_kernels.types import Head, RowTensors

SPLIT = KernelOptions(tile_columns=128)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transformed": {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3, "beta": 0.2},
    "padded": {"vocab_size": 290},
    "masked": {"token_weights": torch.arange(11) % 3},
    "all_masked": {"token_weights": torch.zeros(11)},
    "ratio": {
        "target_ids": torch.arange(11) * 30,
        "old_logprobs": torch.full((11,), -6.0),
        "is_clip": 2.0,
    },
    "turns": {
        "turn_ids": torch.arange(11) // 4,
        "turn_weights": torch.tensor([0.5, 0.0, 1.0]),
        "loss_aggregation": "turn",
    },
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", SETTINGS)
def test_agrees_with_reference(divergence: str, shared: bool, reduction: str, name: str) -> None:
    problem = make_problem(11, 7, 400, shared=shared, bias=True)
    settings = {**SETTINGS[name], "divergence": divergence, "reduction": reduction}
    assert_agrees(problem, "torch", "cpu", options=SPLIT, **settings)


def test_tiles_do_not_matter() -> None:
    problem = make_problem(9, 6, 1000, bias=True)
    whole, first = run(problem, "torch", "cpu", torch.float32)
    for rows, columns in ((None, 1), (4, 128), (None, 384), (2, 999), (None, 1000)):
        options = KernelOptions(tile_rows=rows, tile_columns=columns)
        part, second = run(problem, "torch", "cpu", torch.float32, options=options)
        torch.testing.assert_close(part.per_token, whole.per_token, rtol=1e-5, atol=1e-7)
        for name, value in first.gradients().items():
            assert relative_error(second.gradients()[name], value) < 1e-5, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("distance", [1.0, 0.1, 3e-3])
def test_16_bit_gradients_within_three_permille(
    divergence: str, dtype: torch.dtype, distance: float
) -> None:
    scale = 2.0**14 if dtype == torch.float16 else 1.0  # as GradScaler does
    problem = make_problem(48, 32, 1024, distance=distance, sharpness=1.5).to("cpu", dtype)
    options = KernelOptions(tile_columns=384)
    got, student = run(
        problem, "torch", "cpu", dtype, scale, divergence=divergence, options=options
    )
    expected, exact = truth(problem, divergence=divergence)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    for name, value in exact.gradients().items():
        assert relative_error(student.gradients()[name], scale * value) <= 3e-3, name


def test_nearby_and_equal_distributions() -> None:
    problem = make_problem(16, 32, 2048, distance=3e-5)
    got, student = run(problem, "torch", "cpu", torch.float32, options=SPLIT)
    expected, exact = truth(problem)
    assert expected.loss.item() < 1e-8
    assert relative_error(got.per_token, expected.per_token) < 3e-4
    assert relative_error(student.student_hidden.grad, exact.student_hidden.grad) < 3e-4
    problem = make_problem(9, 16, 500, distance=0.0, bias=True)
    got, student = run(problem, "torch", "cpu", torch.float32, options=SPLIT)
    assert got.loss.item() == 0.0
    assert all(value.eq(0).all() for value in student.gradients().values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    problem = make_problem(4, 3, 140, shared=False, bias=True, dtype=torch.float64)
    options = SPLIT

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = Problem(hidden, weight, problem.teacher_hidden, problem.teacher_weight, bias)
        return loss_of(changed, options=options, reduction=reduction)

    inputs = (problem.student_hidden, problem.student_weight, problem.student_bias)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_upstream_gradient_and_second_backward() -> None:
    problem = make_problem(6, 5, 300, bias=True)
    leaves = [problem.student_hidden, problem.student_weight, problem.student_bias]
    loss = loss_of(problem, options=SPLIT)
    check_second_backward(loss, leaves)


def test_upstream_zeros_drop_rows() -> None:
    """Rows whose loss is not used cost no product in the backward pass, and get no gradient."""
    problem = make_problem(8, 5, 300)
    upstream = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0])
    loss = loss_of(problem, options=SPLIT, reduction="none")
    got = torch.autograd.grad(loss, problem.student_hidden, upstream)[0]
    loss = loss_of(problem, reduction="none")
    expected = torch.autograd.grad(loss, problem.student_hidden, upstream)[0]
    torch.testing.assert_close(got, expected)
    assert got[upstream == 0].eq(0).all()


def test_bitwise_deterministic() -> None:
    problem = make_problem(20, 9, 700)
    options = SPLIT
    first, one = run(problem, "torch", "cpu", torch.float32, options=options)
    second, two = run(problem, "torch", "cpu", torch.float32, options=options)
    assert torch.equal(first.loss, second.loss)
    for name, value in one.gradients().items():
        assert torch.equal(value, two.gradients()[name])


def test_masked_rows_may_hold_anything_and_no_rows() -> None:
    problem = make_problem(6, 5, 300)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    expected = loss_of(problem, options=SPLIT, token_weights=weights)
    with torch.no_grad():
        problem.student_hidden[1], problem.teacher_hidden[3] = torch.nan, torch.inf
    loss = loss_of(problem, options=SPLIT, token_weights=weights)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(value.isfinite().all() for value in problem.gradients().values())
    empty = make_problem(0, 5, 300)
    loss_of(empty, options=SPLIT).backward()
    assert empty.student_weight.grad is not None and empty.student_weight.grad.eq(0).all()


@pytest.mark.parametrize(
    ("trunk", "head"), [(True, True), (True, False), (False, True)], ids=["both", "trunk", "head"]
)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_gemm_count(trunk: bool, head: bool, shared: bool) -> None:
    """Four head GEMMs forward; backward two, and one each for trunk and head."""
    rows, hidden, vocab = 24, 8, 400
    problem = make_problem(rows, hidden, vocab, shared=shared)
    student = Head(problem.student_hidden.detach(), problem.student_weight.detach(), None)
    teacher = student._replace(hidden=problem.teacher_hidden)
    if problem.teacher_weight is not None:
        teacher = teacher._replace(weight=problem.teacher_weight)
    given = student, teacher, RowTensors(torch.ones(rows)), Objective()
    call, unit = Call("torch", 0, 128, vocab), 2 * rows * hidden * vocab
    with ProductCounter() as counter:
        saved = divergence(*given, call).saved
    assert counter.flops == 4 * unit
    with ProductCounter() as counter:
        divergence(*given, call.with_needs((trunk, head, False)), saved)
    assert counter.flops == (2 + trunk + head) * unit


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [128, None], ids=["split_rows", "whole_rows"])
def test_upstream_garbage_of_masked_rows(upstream: float, columns: int | None) -> None:
    """What arrives for a masked token is not even looked at. Oracle: an upstream of 0 there."""
    problem = make_problem(6, 5, 300, bias=True)
    leaves = [problem.student_hidden, problem.student_weight, problem.student_bias]
    mask, options = torch.tensor([1, 0, 1, 1, 0, 1]), KernelOptions(tile_columns=columns)
    loss = loss_of(problem, options=options, reduction="none", token_weights=mask)
    expected, got = (
        torch.autograd.grad(
            loss, leaves, torch.full((6,), 2.0).where(mask > 0, value), retain_graph=True
        )
        for value in (0.0, upstream)
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs) and theirs.isfinite().all()


@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per_row"])
def test_opcheck(per_row: bool) -> None:
    problem = make_problem(7, 5, 300, bias=True)
    call = Call("torch", 3, 128, 290, with_stats=True, per_row=per_row)
    weights, ids = torch.tensor([0.2, 0.0, 0.1, 0.3, 0.0, 0.1, 0.1]), torch.randint(0, 290, (7,))
    torch.library.opcheck(
        linear_divergence,
        (
            problem.student_hidden,
            problem.student_weight,
            problem.student_bias,
            problem.teacher_hidden,
            None,
            None,
            weights,
            ids,
            *[None] * 5,
            numbers_of(Objective()),
            encoded(Objective(), call.text),
        ),
    )


def test_compiled_equals_eager() -> None:
    problem = make_problem(9, 6, 300)

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        loss = fused_linear_divergence(hidden, weight, problem.teacher_hidden, options=SPLIT)
        assert isinstance(loss, Tensor)
        return 2 * loss

    leaves = (problem.student_hidden, problem.student_weight)
    eager = function(*leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(eager, compiled)
    expected = torch.autograd.grad(eager, leaves)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_explain() -> None:
    text = explain(
        8192, 4096, 151936, device="cuda", dtype=torch.bfloat16, impl="torch", options=SPLIT
    )
    assert "8192 of 8192 rows x 128 of 151936 columns (as asked for)" in text
    assert "products with the head: 8, gradients in the backward pass" in text
    frozen = explain(64, 8, 300, trainable_head=False, impl="torch", options=SPLIT)
    assert "products with the head: 7" in frozen


def test_as_many_columns_as_there_are_is_whole_rows() -> None:
    options = KernelOptions(tile_columns=300)
    assert "products with the head: 4" in explain(64, 8, 300, options=options)
    problem = make_problem(6, 5, 300)
    assert torch.equal(loss_of(problem, options=options), loss_of(problem))


@pytest.mark.parametrize("split", [True, False], ids=["split_rows", "whole_rows"])
def test_teacher_of_inference_mode(split: bool) -> None:
    problem = make_problem(6, 5, 300, shared=False)
    expected = loss_of(problem)
    with torch.inference_mode():
        problem.teacher_hidden = problem.teacher_hidden * 1
    torch.testing.assert_close(loss_of(problem), expected)
    reduction, options = ("mean", SPLIT) if split else ("none", KernelOptions())
    with pytest.raises(
        ValueError, match=r"teacher_hidden was made .*no_grad.*teacher_hidden\.clone"
    ):
        loss_of(problem, options=options, reduction=reduction)
    problem.teacher_hidden = problem.teacher_hidden.clone()
    loss_of(problem, options=options, reduction=reduction).sum().backward()
    with torch.inference_mode():
        problem.teacher_weight = problem.teacher_weight * 1
    with pytest.raises(ValueError, match=r"teacher_weight was made under torch\.inference_mode"):
        loss_of(problem, options=options, reduction=reduction)
    with torch.no_grad():
        loss_of(problem, options=options, reduction=reduction)
