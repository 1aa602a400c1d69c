"""What each token of a minibatch counts: worked out by hand, and shared by processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hero.config import LossConfig
from hero.loss import weigh
from hero.types import Sample


def make_sample(trajectory: int, length: int, weight: float = 1.0) -> Sample:
    return Sample(
        trajectory=trajectory, turn=0, prompt_ids=[1], action_ids=[1] * length,
        sampled_logprobs=[0.0] * length, distill_weight=weight,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", [1 / 7, 1 / 7, 1 / 7]),
        ("turn", [1 / 6, 1 / 3, 1 / 12]),
        ("trajectory", [1 / 8, 1 / 4, 1 / 8]),
    ],
)
def test_aggregations_by_hand(aggregation: str, expected: list[float]) -> None:
    """Trajectory 7: turns of 2 and 1 tokens; trajectory 9: a turn of 4 tokens and a masked one."""
    samples = [make_sample(7, 2), make_sample(7, 1), make_sample(9, 4), make_sample(9, 3, 0.0)]
    loss = LossConfig(loss_aggregation=aggregation)  # type: ignore[arg-type]
    weights = [item.distill for item in weigh(samples, loss)]
    assert [w.tolist() for w in weights] == [
        pytest.approx([w] * n) for w, n in zip(expected, [2, 1, 4], strict=True)
    ]


@pytest.mark.parametrize("aggregation", ["token", "turn", "trajectory"])
def test_processes_share_their_denominators(aggregation: Any) -> None:
    """What three processes hold of a minibatch is weighted as in the whole, also where one of them
    has nothing to train."""
    parts = [[make_sample(7, 2), make_sample(7, 1)], [make_sample(9, 4)], [make_sample(3, 2, 0.0)]]
    loss = LossConfig(loss_aggregation=aggregation, kl_to_start=0.3)
    whole = weigh([sample for part in parts for sample in part], loss)
    asked: list[list[float]] = []
    for part in parts:
        asked.append(own := [])
        weigh(part, loss, lambda value, own=own: own.append(value) or 1.0)  # type: ignore[misc]
    totals = [sum(values) for values in zip(*asked, strict=True)]
    got = []
    for part in parts:
        answers = iter(totals)
        got += weigh(part, loss, lambda value, answers=answers: next(answers))  # type: ignore[misc]
    for mine, wanted in zip(got, whole, strict=True):
        torch.testing.assert_close(mine.distill, wanted.distill)
        assert mine.kl_to_start == pytest.approx(wanted.kl_to_start)


def test_skip_first_token() -> None:
    [item] = weigh([make_sample(0, 3)], LossConfig(skip_first_token=True))
    assert item.distill.tolist() == pytest.approx([0.0, 0.5, 0.5])
