"""The experiments on a tiny synthetic case, and that their page shows what their files hold.

Oracles: fp64 products of the whole gradient, and numbers that can be read off by hand.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks.experiments import column_skipping as skipping  # noqa: E402
from benchmarks.experiments import fp8_delta as fp8  # noqa: E402
from benchmarks.experiments import tables  # noqa: E402
from benchmarks.experiments.states import (  # noqa: E402
    DIVERGENCES,
    fp64_truth,
    gaussian,
    gradient_of,
    smollm2,
)
from benchmarks.problem import relative_error  # noqa: E402
from hero_kernels import gemm  # noqa: E402

WIDE_SUMS = gemm.takes_16_bit(torch.device("cpu"), torch.bfloat16)
SUM_ERROR = 1e-5 if WIDE_SUMS else 5e-3
"""Of dW: elsewhere torch rounds each chunk's product to bf16."""
STATES = gaussian(tokens=24, hidden=32, vocab=300, distance=0.03)


def test_rules_keep_what_they_say() -> None:
    # |G| = 5, |G[0]| = 5, |G[1]| = 0.005; columns' norms 4, 3, 0.005, 0.001.
    grad = torch.tensor([[4.0, 3.0, 0.0, 0.001], [0.0, 0.0, 0.005, 0.0]])
    assert skipping.by_peak(grad, 0.7).tolist() == [True, False, False, False]
    assert skipping.by_peak(grad, 1e-3).tolist() == [True, True, False, False]
    assert skipping.by_row(grad, 0.7).tolist() == [True, False, True, False]
    assert skipping.by_mass(grad, 0.61).tolist() == [True, False, False, False]
    assert skipping.by_mass(grad, 0.59).tolist() == [True, True, False, False]
    assert skipping.by_mass(grad, 5e-4).tolist() == [True, True, True, False]


def test_no_rule_keeps_a_zero_gradient() -> None:
    for rule in skipping.RULES.values():
        assert not rule(torch.zeros(3, 7), 1e-6).any()


@pytest.mark.parametrize("rule", skipping.RULES)
def test_a_tiny_threshold_changes_nothing(rule: str) -> None:
    grad, _ = gradient_of(STATES, "jsd")
    dense = skipping.dense_backward(grad, STATES, 10, skipping.Stopwatch())
    result = skipping.skipping_backward(grad, STATES, 10, rule, 1e-12, skipping.Stopwatch())
    assert result.share == result.block_share == 1.0
    torch.testing.assert_close(result.hidden, dense.hidden)
    assert relative_error(result.weight, dense.weight) < SUM_ERROR


def test_mass_bounds_the_error_of_the_gradient_and_skipped_rows_are_zero() -> None:
    grad, _ = gradient_of(STATES, "forward_kl")
    result = skipping.skipping_backward(grad, STATES, 24, "mass", 0.3, skipping.Stopwatch())
    keep = skipping.by_mass(grad, 0.3)
    assert result.share == int(keep.sum()) / 300 < 1
    assert grad[:, ~keep].float().norm() <= 0.3 * grad.float().norm()
    expected = (grad.double() * keep).t() @ STATES.student.double()
    assert relative_error(result.weight, expected) < SUM_ERROR
    assert torch.count_nonzero(result.weight[~keep]) == 0
    torch.testing.assert_close(result.row_sums, (grad.float() * keep).sum(1))


def test_centring_takes_out_what_all_rows_of_the_head_share() -> None:
    # With a large common vector in W the plain dX is off by it, the centred one is not.
    states = STATES._replace(weight=(STATES.weight.float() + 4.0).bfloat16())
    grad, _ = gradient_of(states, "jsd")
    result = skipping.skipping_backward(grad, states, 24, "mass", 0.1, skipping.Stopwatch())
    errors = skipping.Yardstick(states, "jsd").errors(result)
    assert errors["dX_centred"] < 0.2 < errors["dX"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_without_skipping_the_error_is_that_of_rounding(divergence: str) -> None:
    rows = list(skipping.measure_errors("tiny", STATES, (divergence,), (8,)))
    assert [row["rule"] for row in rows].count("mass") == len(skipping.THRESHOLDS)
    assert rows[0]["rule"] == "none"
    assert rows[0]["dX"] < 0.005 and rows[0]["dW"] < 0.005
    tightest = rows[-1]
    assert tightest["threshold"] == 1e-6 and tightest["dW"] == pytest.approx(rows[0]["dW"], rel=0.1)


def test_times_name_their_stages() -> None:
    rows = list(skipping.measure_times("tiny", STATES, (8,), rounds=1))
    assert [row["rule"] for row in rows] == ["none", *(rule for rule, _ in skipping.TIMED)]
    assert set(rows[0]["stages_ms"]) == {"products"}
    for row in rows[1:]:
        assert set(row["stages_ms"]) == {"choice", "gather", "products", "scatter"}
        assert row["total_ms"] == pytest.approx(sum(row["stages_ms"].values()))


def test_truth_is_the_whole_problem_at_once() -> None:
    truth = fp64_truth(STATES, "jsd")
    student = STATES.student.double().requires_grad_()
    logits = student @ STATES.weight.double().t()
    p = logits.softmax(-1)
    q = (STATES.teacher.double() @ STATES.weight.double().t()).softmax(-1)
    m = (p + q) / 2
    loss = (p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2
    (d_hidden,) = torch.autograd.grad(loss, student)
    assert truth.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close(truth.hidden, d_hidden, rtol=1e-9, atol=1e-15)


def test_e4m3_and_int8_by_hand() -> None:
    # The row's scale brings 7 to 448: 1 is 64, exact; 1.07 is 68.48, between 64 and 72.
    row = torch.tensor([[7.0, 1.0, 1.07, -1.07, 0.0]])
    expected = torch.tensor([[7.0, 1.0, 1.125, -1.125, 0.0]])
    torch.testing.assert_close(fp8.e4m3(row, fp8.ROW), expected)
    torch.testing.assert_close(
        fp8.int8(127 * row, fp8.ROW), torch.tensor([[889, 126, 133, -133, 0.0]])
    )
    # Blocks of two: each has its own scale, the last one is half empty.
    blocks = torch.tensor([[448.0, 33.0, 448e-6, 33e-6, 5.0]])
    expected = torch.tensor([[448.0, 32.0, 448e-6, 32e-6, 5.0]])
    torch.testing.assert_close(fp8.e4m3(blocks, (1, 2)), expected)
    assert torch.equal(fp8.e4m3(torch.zeros(3, 5), (2, 2)), torch.zeros(3, 5))


def test_fp8_is_coarser_than_bf16_and_bf16_than_fp16() -> None:
    rows = list(fp8.measure("tiny", STATES, scales=(1.0,)))
    error = {r["operands"]: r["dX"] for r in rows if r["divergence"] == "forward_kl"}
    assert error["fp16"] < 0.005 and error["bf16"] < 0.01
    assert 0.01 < error["e4m3, row"] < 0.1 and 0.01 < error["products"] < 0.1
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["dW"]) for row in rows)


def test_a_missing_model_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.experiments.states.MODEL", ROOT / "no-such-folder")
    with pytest.raises(ValueError, match="hero model smollm2-135m"):
        smollm2("hint", 8)


def test_the_page_shows_what_the_files_hold() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page) == page
    with pytest.raises(ValueError, match="expected 1"):
        tables.filled("no table")
