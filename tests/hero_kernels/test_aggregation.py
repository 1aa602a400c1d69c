"""Weights, turns and trajectories. Oracle: loops over them, written here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import make_problem, truth
from torch import Tensor

from hero_kernels import KernelOptions, fused_linear_divergence, token_coefficients

MASK = [1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 3.0, 1.0, 1.0]
TURNS = [0, 0, 0, 1, 1, -1, 2, 2, 2, 3, 4, 4, 4]
TRAJECTORIES = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1]
TURN_WEIGHTS = [1.0, 0.3, 1.0, 0.0, 2.0]


def aggregated(
    values: list[float],
    tokens: list[float],
    turns: list[int] | None,
    turn_weights: list[float] | None,
    trajectories: list[int] | None,
    aggregation: str,
    reduction: str = "mean",
    num_items: float | None = None,
) -> float:
    """The loss of the tokens' values, group by group."""
    rows = [
        row
        for row in range(len(values))
        if tokens[row] != 0
        and (turns is None or turns[row] >= 0)
        and (trajectories is None or trajectories[row] >= 0)
    ]

    def weight_of(turn: int) -> float:
        return 1.0 if turn_weights is None else turn_weights[turn]

    def mean_of(members: list[int]) -> float:
        return sum(tokens[i] * values[i] for i in members) / sum(tokens[i] for i in members)

    def turn_level(members: list[int]) -> tuple[float, float]:
        """Sum of weight · mean, and of the weights, over the turns among some rows."""
        if turns is None:
            return (mean_of(members), 1.0) if members else (0.0, 0.0)
        total = count = 0.0
        for turn in {turns[i] for i in members}:
            weight = weight_of(turn)
            total += weight * mean_of([i for i in members if turns[i] == turn])
            count += weight
        return total, count

    if aggregation == "token":
        factor = [1.0 if turns is None else weight_of(turns[row]) for row in rows]
        total = sum(tokens[r] * u * values[r] for r, u in zip(rows, factor, strict=True))
        count = sum(tokens[r] * u for r, u in zip(rows, factor, strict=True))
    elif aggregation == "turn":
        total, count = turn_level(rows)
    else:
        assert trajectories is not None
        total = count = 0.0
        for trajectory in {trajectories[row] for row in rows}:
            of_turns, weights = turn_level([r for r in rows if trajectories[r] == trajectory])
            if weights:
                total, count = total + of_turns / weights, count + 1
    if reduction == "sum":
        return total
    divisor = count if num_items is None else num_items
    return total / divisor if divisor else 0.0


def arguments(turns: bool, weights: bool, trajectories: bool, **changes: Any) -> dict[str, Any]:
    """Of `token_coefficients`."""
    chosen: dict[str, Any] = {"token_weights": torch.tensor(MASK, dtype=torch.float64)}
    if turns:
        chosen["turn_ids"] = torch.tensor(TURNS)
    if weights:
        chosen["turn_weights"] = torch.tensor(TURN_WEIGHTS, dtype=torch.float64)
    if trajectories:
        chosen["trajectory_ids"] = torch.tensor(TRAJECTORIES)
    return {**chosen, **changes}


SETTINGS = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in [
        ("token", False, False, False),
        ("token", True, False, False),
        ("token", True, True, True),
        ("turn", True, False, False),
        ("turn", True, True, False),
        ("turn", True, True, True),
        ("trajectory", False, False, True),
        ("trajectory", True, False, True),
        ("trajectory", True, True, True),
    ]
]


@pytest.mark.parametrize(("aggregation", "turns", "weights", "trajectories"), SETTINGS)
@pytest.mark.parametrize("num_items", [None, 7.0, 0.0])
def test_coefficients(
    aggregation: str, turns: bool, weights: bool, trajectories: bool, num_items: float | None
) -> None:
    """They depend on no value, so unit vectors as values read off each of them."""
    given = arguments(turns, weights, trajectories)
    got = token_coefficients(**given, loss_aggregation=aggregation, num_items=num_items)
    for row in range(len(MASK)):
        expected = aggregated(
            [float(i == row) for i in range(len(MASK))],
            MASK,
            TURNS if turns else None,
            TURN_WEIGHTS if weights else None,
            TRAJECTORIES if trajectories else None,
            aggregation,
            num_items=num_items,
        )
        assert math.isclose(got[row].item(), expected, rel_tol=1e-12, abs_tol=1e-15), row
    if num_items is None:
        assert got.sum().item() == pytest.approx(1.0)


def test_a_divisor_may_be_a_scalar_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    for count in (numpy.int64(4), numpy.float32(4)):
        got = token_coefficients(token_weights=torch.ones(3), num_items=count)
        assert torch.equal(got.float(), torch.full((3,), 0.25))
    with pytest.raises(TypeError, match=r"num_items must be a number"):
        token_coefficients(token_weights=torch.ones(3), num_items=numpy.True_)


@pytest.mark.filterwarnings("ignore:num_items with loss_aggregation")
@pytest.mark.parametrize(("aggregation", "turns", "weights", "trajectories"), SETTINGS)
@pytest.mark.parametrize(("reduction", "num_items"), [("mean", None), ("mean", 5.0), ("sum", None)])
def test_loss(
    aggregation: str,
    turns: bool,
    weights: bool,
    trajectories: bool,
    reduction: str,
    num_items: float | None,
) -> None:
    problem = make_problem(len(MASK), 5, 31, dtype=torch.float64)
    plain, _ = truth(problem, reduction="none")
    given = arguments(turns, weights, trajectories)
    loss = fused_linear_divergence(
        *problem.positional(),
        **given,
        loss_aggregation=aggregation,
        reduction=reduction,
        num_items=num_items,
    )
    expected = aggregated(
        plain.loss.tolist(),
        MASK,
        TURNS if turns else None,
        TURN_WEIGHTS if weights else None,
        TRAJECTORIES if trajectories else None,
        aggregation,
        reduction,
        num_items,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("aggregation", ["token", "turn", "trajectory"])
@pytest.mark.parametrize("name", ["turn_ids", "trajectory_ids"])
def test_a_negative_id_masks_in_every_aggregation(aggregation: str, name: str) -> None:
    """Oracle: the same call without these tokens."""
    given = arguments(True, True, True)
    given["turn_ids"] = given["turn_ids"].clamp(min=0)
    given["trajectory_ids"] = given["trajectory_ids"].clamp(min=0)
    # Five turns of two or three tokens; each lies in one trajectory.
    given["trajectory_ids"] = torch.tensor([0, 0, 1, 1, 2])[given["turn_ids"]]
    lost = torch.tensor([1, 4, 10])
    given[name] = given[name].index_fill(0, lost, -1)
    got = token_coefficients(**given, loss_aggregation=aggregation)
    assert got[lost].eq(0).all()
    kept = given[name] >= 0
    shorter = {k: v if k == "turn_weights" else v[kept] for k, v in given.items()}
    expected = token_coefficients(**shorter, loss_aggregation=aggregation)
    torch.testing.assert_close(got[kept], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", ["turn", "trajectory"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_any_size_and_type(aggregation: str, dtype: torch.dtype) -> None:
    """Ids are names: oracle, the same with small ones. No memory of the size of the largest."""
    small = arguments(True, False, True)
    del small["token_weights"]
    if dtype == torch.uint8:
        small = {name: ids.clamp(min=0) for name, ids in small.items()}
        small["trajectory_ids"] = torch.tensor([0, 0, 1, 1, 2])[small["turn_ids"]]
    step = {torch.int64: 10**12, torch.int32: 10**8, torch.int16: 5000, torch.uint8: 50}[dtype]
    large = {
        name: torch.where(ids < 0, -1, (ids + 1) * step).to(dtype) for name, ids in small.items()
    }
    weights = torch.tensor(MASK)
    got, expected = (
        token_coefficients(weights, **ids, loss_aggregation=aggregation) for ids in (large, small)
    )
    assert torch.equal(got, expected)


def test_a_turn_cut_over_micro_batches() -> None:
    """Coefficients of the whole batch, with sums over its parts, give loss and gradient of the
    whole, wherever it is cut."""
    given = arguments(True, True, True)
    problem = make_problem(len(MASK), 5, 31, dtype=torch.float64)
    leaves = [problem.student_hidden, problem.student_weight]
    whole = fused_linear_divergence(*problem.positional(), **given, loss_aggregation="trajectory")
    expected = torch.autograd.grad(whole, leaves)
    coefficients = token_coefficients(**given, loss_aggregation="trajectory")
    total = torch.zeros(())
    for part in (slice(0, 2), slice(2, 4), slice(4, 11), slice(11, 13)):
        total = total + fused_linear_divergence(
            problem.student_hidden[part],
            problem.student_weight,
            problem.teacher_hidden[part],
            token_weights=coefficients[part],
            reduction="sum",
        )
    torch.testing.assert_close(total, whole.detach(), check_dtype=False)
    for ours, theirs in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_per_turn_means() -> None:
    problem = make_problem(len(MASK), 5, 31, dtype=torch.float64)
    output = fused_linear_divergence(
        *problem.positional(), **arguments(True, True, True), return_stats=True
    )
    values = output.per_token.tolist()
    for turn in range(5):
        rows = [
            i
            for i in range(len(MASK))
            if TURNS[i] == turn and MASK[i] and TRAJECTORIES[i] >= 0 and TURN_WEIGHTS[turn]
        ]
        weight = sum(MASK[i] for i in rows)
        mean = sum(MASK[i] * values[i] for i in rows) / weight if weight else 0.0
        assert output.per_turn[turn].item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_signed_weights_where_nothing_is_divided(reduction: str) -> None:
    """Advantages, of which the sum may be 0."""
    problem = make_problem(4, 5, 31, dtype=torch.float64)
    plain, _ = truth(problem, reduction="none")
    signed = torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.float64)
    loss = fused_linear_divergence(*problem.positional(), token_weights=signed, reduction=reduction)
    assert loss.sum().item() == pytest.approx((signed * plain.loss).sum().item(), rel=1e-9)
    mean = fused_linear_divergence(*problem.positional(), token_weights=signed, num_items=4)
    assert mean.item() == pytest.approx((signed * plain.loss).sum().item() / 4, rel=1e-9)


@pytest.mark.parametrize("divided", [{"reduction": "sum"}, {"reduction": "none"}, {"num_items": 1}])
@pytest.mark.parametrize(
    ("name", "aggregation"),
    [("token_weights", "turn"), ("token_weights", "trajectory"), ("turn_weights", "trajectory")],
)
@pytest.mark.filterwarnings("ignore:num_items with loss_aggregation")
def test_signed_weights_are_refused_where_a_group_divides(
    name: str, aggregation: str, divided: dict[str, Any]
) -> None:
    """Advantages of 1 and -1 in one turn have the sum 0, of 1 and -0.9 a tenth."""
    hidden, head = torch.randn(4, 5), torch.randn(31, 5)
    given = {"turn_ids": torch.tensor([0, 0, 1, 1]), "trajectory_ids": torch.zeros(4).long()}
    given[name] = torch.tensor([1.0, -0.9, 1.0, 1.0])
    message = rf"{name} has negative entries, and loss_aggregation='{aggregation}' divides"
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(
            hidden, head, hidden + 1, loss_aggregation=aggregation, **given, **divided
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turn_ids": torch.zeros(2).long()}, r"turn_ids is \[2\]; expected \[13\]"),
        ({"turn_weights": torch.ones(5)}, "turn_weights needs turn_ids"),
        ({"loss_aggregation": "turn"}, "needs turn_ids"),
        ({"loss_aggregation": "trajectory"}, "needs trajectory_ids"),
        ({"loss_aggregation": "batch"}, "'token', 'turn', 'trajectory'; got 'batch'"),
        ({"num_items": -1.0}, "num_items must be"),
        (
            {
                "turn_ids": torch.tensor(TURNS),
                "trajectory_ids": torch.arange(13) % 2,
                "loss_aggregation": "trajectory",
            },
            "in more than one trajectory",
        ),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_coefficients(torch.tensor(MASK), **changes)


@pytest.mark.parametrize("aggregation", ["turn", "trajectory"])
def test_a_mean_over_turns_that_may_be_cut_warns_or_is_refused(aggregation: str) -> None:
    hidden, head, ids = torch.randn(3, 8), torch.randn(20, 8), torch.zeros(3, dtype=torch.int64)
    given = (hidden, head, hidden + 0.3)
    named = {"turn_ids": ids, "trajectory_ids": ids, "loss_aggregation": aggregation}
    with pytest.raises(ValueError, match="token_coefficients as token_weights"):
        fused_linear_divergence(*given, **named, num_items=2, options=KernelOptions(validate=True))
    with pytest.warns(UserWarning, match="token_coefficients as token_weights"):
        half = fused_linear_divergence(*given, **named, num_items=2)
    torch.testing.assert_close(half, fused_linear_divergence(*given, **named) / 2)


@pytest.mark.parametrize(
    "weights", [torch.zeros(4), torch.zeros(0), torch.zeros(4, dtype=torch.bool)], ids=len
)
@pytest.mark.parametrize("aggregation", ["token", "turn", "trajectory"])
def test_nothing_to_weigh(weights: Tensor, aggregation: str) -> None:
    ids = torch.zeros(len(weights), dtype=torch.int64)
    got = token_coefficients(
        weights, turn_ids=ids, trajectory_ids=ids, loss_aggregation=aggregation
    )
    assert got.dtype == torch.float32 and got.eq(0).all() and got.shape == weights.shape


def test_any_leading_shape() -> None:
    weights, turns = torch.rand(2, 3), torch.arange(6).view(2, 3) // 2
    got = token_coefficients(weights, turn_ids=turns, loss_aggregation="turn")
    flat = token_coefficients(weights.flatten(), turn_ids=turns.flatten(), loss_aggregation="turn")
    assert torch.equal(got, flat.view(2, 3))
    with pytest.raises(TypeError, match=r"token_weights must be a tensor .* got list"):
        token_coefficients([1.0, 2.0])
