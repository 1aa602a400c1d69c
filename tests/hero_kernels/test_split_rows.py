"""The sliced design. Oracles: the fp64 reference, the chunk loop, FLOP counts, the allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hero_kernels.chunked import Gradients, Head
from hero_kernels.divergence_loop import RowTensors
from hero_kernels.divergence_loop import run as run_loop
from hero_kernels.layout import Plan
from hero_kernels.options import Objective
from hero_kernels.sliced import HeadSlices, run_slices
from hero_kernels.workspace import DEFAULT_BUDGET, slice_width, workspace
from problems import (
    DIVERGENCES,
    Problem,
    ProductCounter,
    assert_agrees,
    make_problem,
    relative_error,
    run,
    truth,
)
from torch import Tensor

from hero_kernels import KernelOptions, explain, fused_linear_divergence, phases
from hero_kernels.autograd import linear_divergence

CPU = torch.device("cpu")
PLAIN = Objective(0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, 400, "full", 0, "student", True)


def budget_for(columns: int, rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> int:
    """The least that holds slices of so many columns."""
    space = workspace(
        rows,
        hidden,
        dtype=dtype,
        device=CPU,
        storage="float32",
        shared_head=True,
        compacted=True,
    )
    return space.bytes(columns)


def sliced(
    problem: Problem, columns: int = 128, dtype: torch.dtype = torch.float32, **options: Any
) -> KernelOptions:
    budget = budget_for(columns, *problem.student_hidden.shape, dtype=dtype)
    return KernelOptions(design="sliced", memory_budget=budget, **options)


def loss_of(problem: Problem, options: KernelOptions, **settings: Any) -> Tensor:
    loss = fused_linear_divergence(
        *problem.positional(), **problem.biases(), **settings, options=options
    )
    assert isinstance(loss, Tensor)
    return loss


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
    if name == "turns" and reduction == "none":
        pytest.skip("the reference has no per-token form of turn means")
    problem = make_problem(11, 7, 400, shared=shared, bias=True)
    settings = {**SETTINGS[name], "divergence": divergence, "reduction": reduction}
    assert_agrees(problem, "torch", "cpu", options=sliced(problem), **settings)


def test_slices_do_not_matter() -> None:
    problem = make_problem(9, 6, 1000, bias=True)
    whole, first = run(problem, "torch", "cpu", torch.float32)
    for columns in (128, 384, 1000):
        part, second = run(problem, "torch", "cpu", torch.float32, options=sliced(problem, columns))
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
    options = sliced(problem, 384, dtype)
    got, student = run(
        problem, "torch", "cpu", dtype, scale, divergence=divergence, options=options
    )
    expected, exact = truth(problem, divergence=divergence)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    for name, value in exact.gradients().items():
        assert relative_error(student.gradients()[name], scale * value) <= 3e-3, name


def test_nearby_and_equal_distributions() -> None:
    problem = make_problem(16, 32, 2048, distance=3e-5)
    got, student = run(problem, "torch", "cpu", torch.float32, options=sliced(problem))
    expected, exact = truth(problem)
    assert expected.loss.item() < 1e-8
    assert relative_error(got.per_token, expected.per_token) < 3e-4
    assert relative_error(student.student_hidden.grad, exact.student_hidden.grad) < 3e-4
    problem = make_problem(9, 16, 500, distance=0.0, bias=True)
    got, student = run(problem, "torch", "cpu", torch.float32, options=sliced(problem))
    assert got.loss.item() == 0.0
    assert all(value.eq(0).all() for value in student.gradients().values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    problem = make_problem(4, 3, 140, shared=False, bias=True, dtype=torch.float64)
    options = sliced(problem, dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = Problem(hidden, weight, problem.teacher_hidden, problem.teacher_weight, bias)
        return loss_of(changed, options, reduction=reduction)

    inputs = (problem.student_hidden, problem.student_weight, problem.student_bias)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_upstream_gradient_and_second_backward() -> None:
    problem = make_problem(6, 5, 300, bias=True)
    leaves = [problem.student_hidden, problem.student_weight, problem.student_bias]
    loss = loss_of(problem, sliced(problem))
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    threefold = torch.autograd.grad(3.0 * loss, leaves)
    for first, second, third in zip(once, again, threefold, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(third, 3 * first)


def test_upstream_zeros_drop_rows() -> None:
    """Rows whose loss is not used cost no product in the backward pass, and get no gradient."""
    problem = make_problem(8, 5, 300)
    upstream = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0])
    loss = loss_of(problem, sliced(problem), reduction="none")
    got = torch.autograd.grad(loss, problem.student_hidden, upstream)[0]
    loss = loss_of(problem, KernelOptions(), reduction="none")
    expected = torch.autograd.grad(loss, problem.student_hidden, upstream)[0]
    torch.testing.assert_close(got, expected)
    assert got[upstream == 0].eq(0).all()


def test_bitwise_deterministic() -> None:
    problem = make_problem(20, 9, 700)
    options = sliced(problem)
    first, one = run(problem, "torch", "cpu", torch.float32, options=options)
    second, two = run(problem, "torch", "cpu", torch.float32, options=options)
    assert torch.equal(first.loss, second.loss)
    for name, value in one.gradients().items():
        assert torch.equal(value, two.gradients()[name])


def test_masked_rows_may_hold_anything_and_no_rows() -> None:
    problem = make_problem(6, 5, 300)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    expected = loss_of(problem, sliced(problem), token_weights=weights)
    with torch.no_grad():
        problem.student_hidden[1], problem.teacher_hidden[3] = torch.nan, torch.inf
    loss = loss_of(problem, sliced(problem), token_weights=weights)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(value.isfinite().all() for value in problem.gradients().values())
    empty = make_problem(0, 5, 300)
    loss_of(empty, KernelOptions(design="sliced")).backward()
    assert empty.student_weight.grad is not None and empty.student_weight.grad.eq(0).all()


@pytest.mark.parametrize("kept", [False, True], ids=["forward", "saved"])
def test_masked_rows_that_are_not_dropped(kept: bool) -> None:
    """As on CUDA without a bound: their logits are computed, NaN here, and count nothing."""
    problem = make_problem(6, 5, 400)
    student, teacher, rows = objects(problem)
    rows = rows._replace(
        weights=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
        target_ids=torch.arange(6),
        old_logprobs=torch.full((6,), -6.0),
    )
    active = rows.weights != 0
    plan = Plan("torch", 0, "float32", 0, True, True, False, False, "sliced", 0)

    def gradients(teacher: Head) -> Gradients:
        saved = None
        for needed in (plan._replace(need_hidden=False, need_weight=False), plan)[not kept :]:
            slices = HeadSlices(student, teacher, active, PLAIN, needed, phases, False)
            _, grads, saved = run_slices(slices, rows, saved)
        return grads

    expected = gradients(teacher)
    spoilt = teacher._replace(hidden=teacher.hidden.masked_fill(~active[:, None], torch.nan))
    for ours, theirs in zip(gradients(spoilt)[:2], expected[:2], strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def objects(problem: Problem) -> tuple[Head, Head, RowTensors]:
    student = Head(problem.student_hidden.detach(), problem.student_weight.detach(), None)
    teacher = student._replace(hidden=problem.teacher_hidden)
    if problem.teacher_weight is not None:
        teacher = teacher._replace(weight=problem.teacher_weight)
    rows = RowTensors(torch.ones(len(student.hidden)), None, None, None, None)
    return student, teacher, rows


@pytest.mark.parametrize(
    ("trunk", "head"), [(True, True), (True, False), (False, True)], ids=["both", "trunk", "head"]
)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_gemm_count(trunk: bool, head: bool, shared: bool) -> None:
    """Four head GEMMs forward; backward two, and one each for trunk and head."""
    rows, hidden, vocab = 24, 8, 400
    problem = make_problem(rows, hidden, vocab, shared=shared)
    budget = budget_for(128, rows, hidden)
    plan = Plan("torch", 0, "float32", 0, False, False, False, False, "sliced", budget)
    unit = 2 * rows * hidden * vocab
    with ProductCounter() as counter:
        result = run_loop(*objects(problem), PLAIN, plan)
    assert counter.flops == 4 * unit
    backward = plan._replace(need_hidden=trunk, need_weight=head)
    with ProductCounter() as counter:
        run_loop(*objects(problem), PLAIN, backward, saved=result.saved)
    assert counter.flops == (2 + trunk + head) * unit


def peak_bytes(function: Any) -> int:
    """Most bytes that the CPU allocator held at once during a call, beyond those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    del result
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all_rows", "masked"])
def test_memory_stays_within_the_budget(shared: bool, dtype: torch.dtype, masked: bool) -> None:
    """Beyond the gradients, forward and backward together; and the bound is near what is taken."""
    rows, hidden, vocab = 512, 96, 6000
    problem = make_problem(rows, hidden, vocab, shared=shared, dtype=dtype)
    budget = 24 << 20
    weights = torch.ones(rows)
    weights[:40] = not masked
    options = KernelOptions(design="sliced", memory_budget=budget)

    def step() -> None:
        loss_of(problem, options, token_weights=weights).backward()

    gradients = (rows + vocab) * hidden * dtype.itemsize
    peak = peak_bytes(step)
    assert 0.8 * budget < peak - gradients <= budget


@pytest.mark.parametrize("in_torch", [True, False], ids=["torch", "triton"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_half_a_gigabyte_at_the_size_of_qwen3_8b(in_torch: bool, shared: bool) -> None:
    """(8192, 4096, 151936) in bf16 on CUDA: by the formula that the test above checks."""
    space = workspace(
        8192,
        4096,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        storage="float32",
        shared_head=shared,
        in_torch=in_torch,
    )
    width = slice_width(151936, 8192, space, 0)
    assert width >= 1024
    assert space.bytes(width) <= DEFAULT_BUDGET < 0.5e9


@pytest.mark.parametrize("columns", [0, 1, 127, 128, 1000, 49152, 151936])
def test_slice_widths(columns: int) -> None:
    space = workspace(64, 32, dtype=torch.float32, device=CPU, storage="float32", shared_head=True)
    assert slice_width(columns, 64, space, space.bytes(columns)) == columns
    for room in (128, 200, 1 << 20):
        width = slice_width(columns, 64, space, space.bytes(room))
        assert width <= min(columns, max(room, 128))
        assert width == columns or width % 128 == 0
    narrow = workspace(
        1 << 20, 4096, dtype=torch.float32, device=CPU, storage="float32", shared_head=True
    )
    assert slice_width(columns, 1 << 20, narrow, 0) <= 1024
    if columns:
        with pytest.raises(ValueError, match=r"cannot hold a slice of .* columns for 64 rows"):
            slice_width(columns, 64, space, space.fixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("main", [None, torch.float32], ids=["grad", "main_grad"])
def test_accumulates_the_weight_gradient(dtype: torch.dtype, main: torch.dtype | None) -> None:
    """Over two micro-batches: what autograd accumulates, and nothing left for autograd."""
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    problem = make_problem(10, 6, 300, bias=True).to("cpu", dtype)
    ours = problem.to("cpu", dtype)
    weight = ours.student_weight
    if main is not None:
        weight.main_grad = torch.zeros(weight.shape, dtype=main)  # type: ignore[attr-defined]
    exact = problem.to("cpu", torch.float64)
    for part in (slice(0, 4), slice(4, 10)):
        for copy, options in (
            (ours, sliced(problem, dtype=dtype, accumulate_weight_grad=True)),
            (exact, KernelOptions()),
        ):
            loss = fused_linear_divergence(
                copy.student_hidden[part],
                copy.student_weight,
                copy.teacher_hidden[part],
                **copy.biases(),
                options=options,
                num_items=10.0,
            )
            assert isinstance(loss, Tensor)
            (scale * loss).backward()
    assert exact.student_weight.grad is not None
    got = weight.grad if main is None else weight.main_grad  # type: ignore[attr-defined]
    assert got is not None and (main is None) == (weight.grad is not None)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # two sums
    assert relative_error(got, exact.student_weight.grad) < rounding[dtype]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    for name in ("student_hidden", "student_bias"):
        assert relative_error(ours.gradients()[name], exact.gradients()[name]) < tolerance, name


def test_accumulation_needs_a_parameter() -> None:
    problem = make_problem(4, 5, 40)
    options = KernelOptions(design="sliced", accumulate_weight_grad=True)
    with pytest.raises(ValueError, match="needs student_weight to be a parameter"):
        fused_linear_divergence(
            problem.student_hidden,
            problem.student_weight * 1,
            problem.teacher_hidden,
            options=options,
        )
    with pytest.raises(ValueError, match="accumulate_weight_grad needs design='sliced'"):
        KernelOptions(accumulate_weight_grad=True)


@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per_row"])
def test_opcheck(per_row: bool) -> None:
    problem = make_problem(7, 5, 300, bias=True)
    plan = Plan(
        "torch", 3, "float32", 0, False, False, False, True, "sliced", budget_for(128, 7, 5)
    )
    torch.library.opcheck(
        linear_divergence,
        (
            problem.student_hidden,
            problem.student_weight,
            problem.student_bias,
            problem.teacher_hidden,
            None,
            None,
            torch.tensor([0.2, 0.0, 0.1, 0.3, 0.0, 0.1, 0.1]),
            torch.randint(0, 300, (7,)),
            None,
            None,
            None,
            *PLAIN._replace(vocab_size=290),
            *plan,
            per_row,
            None,
        ),
    )


def test_compiled_equals_eager() -> None:
    problem = make_problem(9, 6, 300)
    options = sliced(problem)

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        loss = fused_linear_divergence(hidden, weight, problem.teacher_hidden, options=options)
        assert isinstance(loss, Tensor)
        return 2 * loss

    leaves = (problem.student_hidden, problem.student_weight)
    eager = function(*leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(eager, compiled)
    expected = torch.autograd.grad(eager, leaves)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"support": "topk", "top_k": 3}, "needs support='full', got support='topk': use design="),
        ({"pointwise_clip": 0.1}, "has no pointwise_clip, got 0.1: leave it None, or use design="),
        ({"impl": "cpu"}, r"impl='cpu' cannot serve design='sliced'.*sees whole rows only"),
        ({"impl": "none"}, "Unknown impl 'none'"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(make_problem(3, 2, 20), KernelOptions(design="sliced"), **settings)


def test_options() -> None:
    with pytest.raises(ValueError, match="'auto', 'chunked', 'fused' or 'sliced'; got 'rows'"):
        KernelOptions(design="rows")
    with pytest.raises(ValueError, match=r"memory_budget must be at least 1.*got 0"):
        KernelOptions(memory_budget=0)
    with pytest.raises(ValueError, match="memory_budget=1000 bytes cannot hold a slice of 20"):
        loss_of(make_problem(3, 2, 20), KernelOptions(design="sliced", memory_budget=1000))


def test_explain() -> None:
    options = KernelOptions(design="sliced")
    text = explain(
        8192, 4096, 151936, device="cuda", dtype=torch.bfloat16, impl="torch", options=options
    )
    assert "design: sliced" in text and "design: chunked" in explain(10, 10, 10)
    assert "head GEMMs: 8 (4 forward, 4 backward: 2 for logits, dX, dW)" in text
    assert "sum of dW" not in text
    frozen = explain(64, 8, 300, trainable_head=False, impl="torch", options=options)
    assert "head GEMMs: 7 (4 forward, 3 backward: 2 for logits, dX)" in frozen


@pytest.mark.parametrize("kept", ["checkpoint", "save_on_cpu"])
@pytest.mark.parametrize("main", [False, True], ids=["grad", "main_grad"])
def test_accumulates_under_saved_tensor_hooks(kept: str, main: bool) -> None:
    """They hand the backward pass a copy of the weight. Oracle: the call without them."""
    problem = make_problem(10, 6, 300)
    weight = problem.student_weight
    expected = torch.autograd.grad(loss_of(problem, sliced(problem)), weight)[0]
    if main:
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    options = sliced(problem, accumulate_weight_grad=True)
    if kept == "checkpoint":
        loss = torch.utils.checkpoint.checkpoint(loss_of, problem, options, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(problem, options)
    loss.backward()
    got = weight.main_grad if main else weight.grad  # type: ignore[attr-defined]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("main", ["transposed", "fp64"])
def test_accumulates_into_any_main_grad(dtype: torch.dtype, main: str) -> None:
    problem = make_problem(10, 6, 300).to("cpu", dtype)
    weight = problem.student_weight
    options = sliced(problem, dtype=dtype)
    expected = torch.autograd.grad(loss_of(problem, options), weight)[0]
    total = torch.zeros(300, 6, dtype=torch.float64 if main == "fp64" else torch.float32)
    if main == "transposed":
        total = total.t().contiguous().t()
    weight.main_grad = total  # type: ignore[attr-defined]
    options = sliced(problem, dtype=dtype, accumulate_weight_grad=True)
    loss_of(problem, options).backward()
    assert relative_error(total, expected) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("design", ["sliced", "chunked"])
def test_teacher_of_inference_mode(design: str) -> None:
    problem = make_problem(6, 5, 300, shared=False)
    expected = loss_of(problem, KernelOptions())
    with torch.inference_mode():
        problem.teacher_hidden = problem.teacher_hidden * 1
    torch.testing.assert_close(loss_of(problem, KernelOptions(design="chunked")), expected)
    reduction = "none" if design == "chunked" else "mean"
    with pytest.raises(
        ValueError, match=r"teacher_hidden was made .*no_grad.*teacher_hidden\.clone"
    ):
        loss_of(problem, KernelOptions(design=design), reduction=reduction)
    problem.teacher_hidden = problem.teacher_hidden.clone()
    loss_of(problem, KernelOptions(design=design), reduction=reduction).sum().backward()
    with torch.inference_mode():
        problem.teacher_weight = problem.teacher_weight * 1
    with pytest.raises(ValueError, match=r"teacher_weight was made under torch\.inference_mode"):
        loss_of(problem, KernelOptions(design=design), reduction=reduction)
    with torch.no_grad():
        loss_of(problem, KernelOptions(design=design), reduction=reduction)
