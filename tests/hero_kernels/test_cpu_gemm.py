"""The bf16 products of csrc/bf16_gemm.cpp against fp64, by every kind that this machine has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hero_kernels import cpu_gemm, gemm

pytestmark = pytest.mark.skipif(
    cpu_gemm.kind() == "none", reason="this processor does not multiply bf16 numbers"
)
SHAPES = pytest.mark.parametrize(
    ("rows", "hidden", "vocab"),
    [(1, 8, 1), (37, 45, 123), (64, 64, 128), (300, 130, 2049), (33, 576, 1500)],
)
EXACT = 1e-6
ROUNDED = 2.5e-3  # one rounding to bf16


@pytest.fixture(params=["amx", "avx512"], autouse=True)
def each_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine with AMX has AVX-512's bf16 products too."""
    if cpu_gemm.KINDS.index(request.param) > cpu_gemm.KINDS.index(cpu_gemm.kind()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(cpu_gemm, "kind", lambda: request.param)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def random(*shape: int, spare: int = 0) -> Tensor:
    """bf16, in rows with `spare` NaN behind each."""
    matrix = torch.full((shape[0], shape[1] + spare), torch.nan, dtype=torch.bfloat16)
    matrix[:, : shape[1]] = torch.randn(*shape)
    return matrix[:, : shape[1]]


@SHAPES
@pytest.mark.parametrize("sides", [1, 2])
def test_logits(rows: int, hidden: int, vocab: int, sides: int) -> None:
    weight = random(vocab, hidden, spare=3)
    lefts = [random(rows, hidden, spare=4 * side) for side in range(sides)]
    outs = [torch.full((rows, vocab + 5), torch.nan)[:, :vocab] for _ in range(sides)]
    gemm.logits_into(weight, *zip(outs, lefts, strict=True))
    for left, out in zip(lefts, outs, strict=True):
        assert relative_error(out, left.double() @ weight.double().t()) < EXACT


@SHAPES
def test_hidden_gradient(rows: int, hidden: int, vocab: int) -> None:
    grad, weight = random(rows, vocab, spare=7), random(vocab, hidden, spare=1)
    got = gemm.hidden_gradient(grad, weight)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, grad.double() @ weight.double()) < ROUNDED


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
    grad, hidden_states = random(rows, vocab, spare=7), random(rows, hidden)
    total = torch.full((vocab, hidden), torch.nan, dtype=dtype)
    gemm.weight_gradient_into(total, grad, hidden_states, accumulate=False)
    expected = grad.double().t() @ hidden_states.double()
    assert relative_error(total, expected) < (EXACT if dtype == torch.float32 else ROUNDED)
    if dtype == torch.float32:
        gemm.weight_gradient_into(total, grad, hidden_states, accumulate=True)
        assert relative_error(total, 2 * expected) < EXACT


def test_no_tokens_give_a_gradient_of_zero() -> None:
    total = torch.full((20, 8), torch.nan)
    cpu_gemm.weight_gradient_into(total, random(0, 20), random(0, 8), accumulate=False)
    assert total.eq(0).all()


def test_the_number_of_threads_does_not_matter() -> None:
    grad, weight, hidden = random(70, 900), random(900, 100), random(70, 100)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits, total = torch.empty(70, 900), torch.empty(900, 100)
            gemm.logits_into(weight, (logits, hidden))
            gemm.weight_gradient_into(total, grad, hidden, accumulate=False)
            results.append((logits, gemm.hidden_gradient(grad, weight), total))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_operands_that_do_not_fit_are_refused() -> None:
    """Of more than they hold the kernels would read memory that is not theirs."""
    grad, weight, hidden = random(6, 20), random(20, 8), random(6, 8)
    logits = torch.empty(6, 20)
    for call in (
        lambda: cpu_gemm.logits_into(random(20, 9), (logits, hidden)),
        lambda: cpu_gemm.logits_into(weight, (torch.empty(6, 19), hidden)),
        lambda: cpu_gemm.hidden_gradient(grad, random(21, 8)),
        lambda: cpu_gemm.add_hidden_gradient(torch.zeros(5, 8), grad, weight),
        lambda: cpu_gemm.weight_gradient_into(torch.empty(20, 8), grad, random(7, 8), False),
        lambda: cpu_gemm.weight_gradient_into(torch.empty(20, 9), grad, hidden, False),
    ):
        with pytest.raises(ValueError, match="which must be equal, and give"):
            call()
    with pytest.raises(
        ValueError, match=r"same types and shapes; got \[6, 8\] to \[6, 20\] and \[5, 8\]"
    ):
        cpu_gemm.logits_into(weight, (logits, hidden), (logits, random(5, 8)))
    total = torch.zeros(20, 8)
    for call in (
        lambda: cpu_gemm.logits_into(weight, (logits.bfloat16(), hidden)),
        lambda: cpu_gemm.logits_into(weight, (logits, hidden.to(torch.int8))),
        lambda: cpu_gemm.hidden_gradient(grad, weight.to(torch.float8_e4m3fn)),
        lambda: cpu_gemm.add_hidden_gradient(torch.zeros(6, 8).bfloat16(), grad, weight),
        lambda: cpu_gemm.weight_gradient_into(total.bfloat16(), grad, hidden, accumulate=True),
        lambda: cpu_gemm.weight_gradient_into(total.double(), grad, hidden, accumulate=False),
    ):
        with pytest.raises(TypeError, match=r"expected torch\.bfloat16 twice"):
            call()
