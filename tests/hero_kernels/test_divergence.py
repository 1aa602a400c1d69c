"""Values, statistics, gradients of every implementation. Oracle: the fp64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import (
    DIVERGENCES,
    active_tokens,
    assert_agrees,
    make_problem,
    relative_error,
    run,
    truth,
)

from hero_kernels import KernelOptions, fused_linear_divergence, reference, supports
from hero_kernels.backends import IMPLEMENTATIONS

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "beta": {"beta": 0.1},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 3.0},
    "everything": {"softcap": 5.0, "logit_scale": 0.4, "temperature": 1.7},
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("case", SETTINGS)
def test_agrees_with_reference(
    impl: str, device: str, divergence: str, shared: bool, bias: bool, case: str
) -> None:
    problem = make_problem(11, 7, 123, shared=shared, bias=bias)
    targets = torch.randint(0, 123, (11,))
    assert_agrees(
        problem, impl, device, divergence=divergence, target_ids=targets, **SETTINGS[case]
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_far_apart_and_peaked(
    impl: str, device: str, divergence: str, shared: bool, softcap: float | None
) -> None:
    """Logits that differ by hundreds: exp overflows unless the formulas are arranged for it."""
    problem = make_problem(6, 8, 200, shared=shared, distance=10.0, sharpness=8.0)
    chosen: dict[str, Any] = {"divergence": divergence, "softcap": softcap}
    assert_agrees(problem, impl, device, tolerance=2e-4, **chosen)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_very_far_apart(impl: str, device: str, divergence: str, shared: bool) -> None:
    """Logits that differ by thousands: gradients may be less than fp32 can show beside them."""
    problem = make_problem(6, 8, 200, shared=shared, distance=100.0, sharpness=8.0)
    got, student = run(problem, impl, device, torch.float32, divergence=divergence)
    expected, exact = truth(problem, divergence=divergence)
    assert relative_error(got.per_token, expected.per_token) < 1e-5
    for name, value in exact.gradients().items():
        assert relative_error(student.gradients()[name], value, floor=1.0) < 1e-3, name


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_teachers_favourite_vanishes(impl: str, device: str, divergence: str) -> None:
    """p_s spreads over what the teacher all but excludes: sum p_t exp(delta) - 1 rounds to -1."""
    logits = torch.zeros(1, 9)
    logits[0, 3] = 40.0
    problem = make_problem(1, 9, 9)
    problem.student_weight = torch.eye(9)
    problem.teacher_hidden = logits
    problem.student_hidden = logits - 80.0 * (logits > 0) + torch.linspace(0, 1, 9)
    assert_agrees(problem, impl, device, divergence=divergence)


@pytest.mark.parametrize("vocab", [32769, 151936])
def test_real_vocabularies(impl: str, device: str, vocab: int) -> None:
    assert_agrees(make_problem(3, 5, vocab), impl, device, tolerance=1e-4)


def test_more_rows_than_16_bits_count(impl: str, device: str) -> None:
    assert_agrees(make_problem(65_539, 2, 5), impl, device, tolerance=1e-4, reduction="sum")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_of_another_size(impl: str, device: str, divergence: str) -> None:
    problem = make_problem(5, 7, 40, shared=False, teacher_size=12, bias=True)
    assert_agrees(problem, impl, device, divergence=divergence)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_one_token_without_a_leading_shape(impl: str, device: str, shared: bool) -> None:
    problem = make_problem(1, 7, 48, shared=shared).to(device, torch.float32)
    student, weight, teacher, own = problem.positional()
    losses = [
        fused_linear_divergence(h_s, weight, h_t, own, impl=impl, reduction="none")
        for h_s, h_t in ((student, teacher), (student[0], teacher[0]))
    ]
    assert losses[1].shape == () and torch.equal(losses[0][0], losses[1])


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_padded_vocabulary(impl: str, device: str, shared: bool) -> None:
    problem = make_problem(5, 7, 48, shared=shared, bias=True, teacher_vocab=45)
    assert_agrees(problem, impl, device, vocab_size=41)
    _, student = run(problem, impl, device, torch.float32, vocab_size=41)
    assert student.gradients()["student_weight"][41:].eq(0).all()


def test_importance_ratio_multiplies_loss_and_gradient(impl: str, device: str) -> None:
    problem = make_problem(9, 7, 40)
    targets = torch.randint(0, 40, (9,))
    common: dict[str, Any] = {"target_ids": targets, "old_logprobs": -3.0 * torch.rand(9) - 2.0}
    assert_agrees(problem, impl, device, **common)
    assert_agrees(problem, impl, device, **common, is_clip=1.2)
    clipped, _ = run(problem, impl, device, torch.float32, **common, is_clip=1e-3)
    plain, _ = run(problem, impl, device, torch.float32, target_ids=targets)
    torch.testing.assert_close(clipped.loss, 1e-3 * plain.loss)


@pytest.mark.parametrize("aggregation", ["token", "turn", "trajectory"])
@pytest.mark.parametrize(
    ("reduction", "num_items"), [("mean", None), ("mean", 13.0), ("sum", None), ("none", None)]
)
def test_weights_and_aggregation(
    impl: str, device: str, aggregation: str, reduction: str, num_items: float | None
) -> None:
    """How coefficients reach rows; what they are: test_aggregation.py."""
    problem = make_problem(12, 5, 31)
    assert_agrees(
        problem,
        impl,
        device,
        token_weights=torch.tensor([1, 0.5, 0, 2, 1, 1, 0, 0, 0, 1, 3, 1]),
        turn_ids=torch.tensor([0, 0, 0, 1, 1, -1, 2, 2, 2, 3, 4, 4]),
        turn_weights=torch.tensor([1.0, 0.3, 1.0, 0.0, 2.0]),
        trajectory_ids=torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        loss_aggregation=aggregation,
        reduction=reduction,
        num_items=num_items,
    )


def test_trajectory_without_turns_is_one_turn(impl: str, device: str) -> None:
    assert_agrees(
        make_problem(5, 5, 31),
        impl,
        device,
        token_weights=torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0]),
        trajectory_ids=torch.tensor([1, 1, 1, 0, 0]),
        loss_aggregation="trajectory",
    )


def test_reduction_none_takes_any_upstream_gradient(impl: str, device: str) -> None:
    problem = make_problem(10, 6, 33, bias=True)
    weights, upstream = torch.rand(10), torch.randn(10)
    weights[3] = 0
    ours, exact = problem.to(device, torch.float32), problem.to("cpu", torch.float64)
    loss = fused_linear_divergence(
        *ours.positional(),
        **ours.biases(),
        token_weights=weights.to(device),
        reduction="none",
        impl=impl,
    )
    loss.backward(upstream.to(device))
    whole, _ = truth(problem, token_weights=weights, reduction="none")
    assert relative_error(loss, whole.loss) < 1e-5

    true = reference.fused_linear_divergence(
        *exact.positional(), **exact.biases(), token_weights=weights, reduction="none"
    )
    true.loss.backward(upstream.double())
    for name, value in exact.gradients().items():
        assert relative_error(ours.gradients()[name], value) < 1e-4, name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_problems(data: st.DataObject) -> None:
    """Shapes, masks, weights, divergences and tiles at random, for all implementations on CPU."""
    torch.manual_seed(0)  # for each example, or none could be reproduced
    rows = data.draw(st.integers(1, 40), label="rows")
    vocab = data.draw(st.integers(2, 300), label="vocab")
    problem = make_problem(
        rows,
        data.draw(st.integers(1, 33), label="hidden"),
        vocab,
        shared=data.draw(st.booleans(), label="shared"),
        bias=data.draw(st.booleans(), label="bias"),
        distance=data.draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0]), label="distance"),
    )
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 0.0, 1.0, 0.25, 7.0]), min_size=rows, max_size=rows),
        label="weights",
    )
    divergence = data.draw(st.sampled_from(DIVERGENCES), label="divergence")
    chosen: dict[str, Any] = {
        "divergence": divergence,
        "beta": data.draw(st.sampled_from([0.02, 0.5, 0.97]), label="beta"),
        "temperature": data.draw(st.sampled_from([0.5, 1.0, 2.0]), label="temperature"),
        "softcap": data.draw(st.sampled_from([None, 4.0]), label="softcap"),
        "token_weights": torch.tensor(weights),
        "target_ids": torch.randint(0, vocab, (rows,)),
    }
    options = KernelOptions(tile_rows=data.draw(st.integers(1, 50), label="tile"))
    expected, exact = truth(problem, **chosen)
    for name in IMPLEMENTATIONS:
        if supports(name) is not None:
            continue
        got, student = run(problem, name, "cpu", torch.float32, options=options, **chosen)
        assert relative_error(got.loss, expected.loss) < 2e-4, name
        active = torch.tensor(weights) != 0
        for column in ("per_token", "student_logprobs", "teacher_entropy"):
            ours, true = getattr(got, column), getattr(expected, column)
            assert relative_error(ours[active], true[active]) < 2e-4, (name, column)
            assert ours[~active].eq(0).all(), (name, column)
        for place, value in exact.gradients().items():
            # Gradients of all but equal distributions through far-apart heads are all but 0:
            # absolute there.
            error = (student.gradients()[place].double() - value).norm()
            assert error <= 5e-4 * value.norm() + 1e-9, (name, place)


GRADIENT_ERROR = {torch.float32: 5e-4, torch.bfloat16: 4e-3, torch.float16: 2e-3}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_trajectories(data: st.DataObject) -> None:
    """Types, masks, turns, trajectories, weights and reductions at random, on CPU.

    The reference sees the rounded inputs, in fp64. Bounds are those of test_precision.py and of
    test_random_problems, plus the rounding of the gradients to the inputs' type.
    """
    torch.manual_seed(0)
    dtype = data.draw(st.sampled_from(sorted(GRADIENT_ERROR, key=str)), label="dtype")
    rows = data.draw(st.integers(1, 24), label="rows")
    vocab = data.draw(st.integers(2, 200), label="vocab")
    problem = make_problem(
        rows,
        data.draw(st.integers(4, 24), label="hidden"),
        vocab,
        shared=data.draw(st.booleans(), label="shared"),
        bias=data.draw(st.booleans(), label="bias"),
        distance=data.draw(st.sampled_from([0.01, 0.3, 1.0]), label="distance"),
    ).to("cpu", dtype)

    def per_row(values: st.SearchStrategy[Any], name: str) -> torch.Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows), label=name))

    aggregation = data.draw(st.sampled_from(["token", "turn", "trajectory"]), label="aggregation")
    turns = data.draw(st.integers(1, 4), label="turns")
    trajectories = per_row(st.integers(-1, 2), "trajectories")
    turn_ids = per_row(st.integers(-1, turns - 1), "turn_ids")
    # A turn belongs to one trajectory.
    turn_ids = torch.where(turn_ids < 0, -1, 3 * turn_ids + trajectories.clamp(min=0))
    chosen: dict[str, Any] = {
        "divergence": data.draw(st.sampled_from(DIVERGENCES), label="divergence"),
        "token_weights": per_row(st.sampled_from([0.0, 0.0, 1.0, 0.25, 7.0]), "weights"),
        "turn_ids": turn_ids,
        "trajectory_ids": trajectories,
        "turn_weights": torch.tensor(
            data.draw(
                st.lists(st.sampled_from([0.0, 1.0, 0.3]), min_size=3 * turns, max_size=3 * turns),
                label="turn_weights",
            )
        ),
        "loss_aggregation": aggregation,
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"]), label="reduction"),
        "target_ids": torch.randint(0, vocab, (rows,)),
        "old_logprobs": -3.0 * torch.rand(rows) - 1.0,
        "is_clip": 1.5,
    }
    # Garbage where nothing counts must not be seen.
    masked = ~active_tokens(rows, **chosen)
    assume(not masked.all())  # test_masking.py has that case
    garbage = {
        "target_ids": chosen["target_ids"].where(~masked, 10**6),
        "old_logprobs": chosen["old_logprobs"].where(~masked, torch.nan),
        "options": KernelOptions(tile_rows=data.draw(st.integers(1, 30), label="tile")),
    }
    scale = 2.0**12 if dtype == torch.float16 else 1.0  # as GradScaler does
    expected, exact = truth(problem, **chosen)
    for name in IMPLEMENTATIONS:
        if supports(name) is not None:
            continue
        got, student = run(problem, name, "cpu", dtype, scale, **{**chosen, **garbage})
        assert relative_error(got.loss, expected.loss, floor=1e-9) < 2e-4, name
        assert relative_error(got.per_turn, expected.per_turn, floor=1e-9) < 2e-4, name
        assert got.per_token[masked].eq(0).all(), name
        for place, value in exact.gradients().items():
            error = relative_error(student.gradients()[place].double() / scale, value, floor=1e-6)
            assert error < GRADIENT_ERROR[dtype], (name, place)
