"""Top-k, sampled token, teachers behind a server. Oracles: reference, full divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import DIVERGENCES, assert_agrees, make_problem, relative_error, run
from torch import Tensor

from hero_kernels import DivergenceOutput, KernelOptions, fused_linear_divergence, reference


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "renormalised"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_topk_agrees_with_reference(divergence: str, source: str, tail: bool, shared: bool) -> None:
    assert_agrees(
        make_problem(9, 6, 60, shared=shared, bias=True),
        "torch",
        "cpu",
        divergence=divergence,
        support="topk",
        top_k=5,
        top_k_source=source,
        top_k_tail=tail,
        target_ids=torch.randint(0, 60, (9,)),
        token_weights=torch.tensor([1, 1, 0, 2, 0.5, 0, 1, 1, 1]),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize("short_of_all", [0, 1])
def test_topk_of_all_is_the_full_divergence(
    divergence: str, source: str, short_of_all: int
) -> None:
    """With k = V - 1 the tail is the one token left; with k = V there is none."""
    problem = make_problem(9, 6, 40)
    common: dict[str, Any] = {"divergence": divergence, "options": KernelOptions(tile_rows=4)}
    full, exact = run(problem, "torch", "cpu", torch.float32, **common)
    chosen: dict[str, Any] = {"support": "topk", "top_k": 40 - short_of_all, "top_k_source": source}
    topk, student = run(problem, "torch", "cpu", torch.float32, **common, **chosen)
    torch.testing.assert_close(topk.per_token, full.per_token, rtol=1e-4, atol=1e-7)
    for name, value in exact.gradients().items():
        assert relative_error(student.gradients()[name], value) < 1e-4, name


def test_tail_keeps_it_non_negative_and_below_the_full_divergence() -> None:
    """Merging outcomes can only lower a divergence (data processing inequality)."""
    problem = make_problem(50, 6, 40)
    full, _ = run(problem, "torch", "cpu", torch.float32)
    for k in (1, 3, 10):
        topk, _ = run(problem, "torch", "cpu", torch.float32, support="topk", top_k=k)
        assert topk.per_token.min() >= 0
        assert (topk.per_token <= full.per_token * (1 + 1e-5)).all()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
def test_sampled_agrees_with_reference(shared: bool) -> None:
    assert_agrees(
        make_problem(9, 6, 60, shared=shared, bias=True),
        "torch",
        "cpu",
        divergence="reverse_kl",
        support="sampled",
        target_ids=torch.randint(0, 60, (9,)),
        old_logprobs=-torch.rand(9) * 8,
        is_clip=2.0,
    )


def test_sampled_gradient_is_that_of_the_reverse_kl_on_average() -> None:
    """The p_s-weighted sum over all tokens of the sampled gradients is that of the full KL."""
    problem = make_problem(1, 6, 12)
    _, exact = run(problem, "torch", "cpu", torch.float32, divergence="reverse_kl")
    p_s = (problem.student_hidden @ problem.student_weight.t()).softmax(-1)[0].detach()
    total = torch.zeros(1, 6)
    for token in range(12):
        _, one = run(
            problem,
            "torch",
            "cpu",
            torch.float32,
            divergence="reverse_kl",
            support="sampled",
            target_ids=torch.tensor([token]),
        )
        assert one.student_hidden.grad is not None
        total += p_s[token] * one.student_hidden.grad
    torch.testing.assert_close(total, exact.student_hidden.grad, rtol=1e-4, atol=1e-7)


def from_server(problem: Any, k: int) -> tuple[Tensor, Tensor]:
    logits = reference.scaled_logits(problem.teacher_hidden, problem.student_weight.detach())
    logprobs, ids = logits.log_softmax(-1).topk(k)
    return ids, logprobs


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "renormalised"])
def test_server_agrees_with_reference(divergence: str, tail: bool) -> None:
    problem = make_problem(9, 6, 60, bias=True)
    topk = from_server(problem, 7)
    weights = torch.tensor([1, 1, 0, 2, 0.5, 0, 1, 1, 1])
    settings: dict[str, Any] = {
        "divergence": divergence,
        "support": "topk",
        "top_k_tail": tail,
        "token_weights": weights,
        "target_ids": torch.randint(0, 60, (9,)),
    }
    ours, exact = problem.to("cpu", torch.float32), problem.to("cpu", torch.float64)
    got = fused_linear_divergence(
        ours.student_hidden,
        ours.student_weight,
        student_bias=ours.student_bias,
        teacher_topk=topk,
        return_stats=True,
        options=KernelOptions(tile_rows=4),
        **settings,
    )
    assert isinstance(got, DivergenceOutput)
    expected = reference.fused_linear_divergence(
        exact.student_hidden,
        exact.student_weight,
        student_bias=exact.student_bias,
        teacher_topk=(topk[0], topk[1].double()),
        **settings,
    )
    got.loss.backward()
    expected.loss.backward()
    assert relative_error(got.loss, expected.loss) < 1e-5
    for name, value in exact.gradients().items():
        assert relative_error(ours.gradients()[name], value) < 1e-4, name
    assert got.teacher_entropy is None and got.teacher_logprobs is None
    assert got.student_logprobs is not None and expected.student_logprobs is not None
    assert relative_error(got.student_logprobs, expected.student_logprobs * (weights != 0)) < 1e-5


def test_server_equals_local_teacher() -> None:
    """The teacher's own top-k, sent over a wire, is support="topk" with top_k_source="teacher"."""
    problem = make_problem(9, 6, 60)
    local, _ = run(
        problem, "torch", "cpu", torch.float32, support="topk", top_k=7, top_k_source="teacher"
    )
    remote = fused_linear_divergence(
        problem.student_hidden,
        problem.student_weight,
        support="topk",
        teacher_topk=from_server(problem, 7),
    )
    torch.testing.assert_close(remote, local.loss, rtol=1e-4, atol=1e-6)


def test_server_that_knows_everything_has_an_empty_tail() -> None:
    problem = make_problem(4, 6, 10)
    loss = fused_linear_divergence(
        problem.student_hidden,
        problem.student_weight,
        support="topk",
        divergence="reverse_kl",
        teacher_topk=from_server(problem, 10),
    )
    full, _ = run(problem, "torch", "cpu", torch.float32, divergence="reverse_kl")
    torch.testing.assert_close(loss, full.loss, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(loss, problem.student_hidden)[0].isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "renormalised"])
def test_server_fills_rows_up_with_sentinels(divergence: str, tail: bool) -> None:
    """A server pads rows that have fewer tokens by -inf. Oracle: the call without these columns."""
    problem = make_problem(5, 6, 30)
    ids, logprobs = from_server(problem, 4)
    padded = (
        torch.cat([ids, torch.stack([(ids.max(1).values + 1 + i) % 30 for i in range(2)], 1)], 1),
        torch.cat([logprobs, torch.full((5, 2), -torch.inf)], 1),
    )
    keep = [len(set(row.tolist())) == 6 for row in padded[0]]
    rows = torch.tensor(keep).nonzero()[:, 0]
    found = []
    for given in (padded, (ids, logprobs)):
        loss = fused_linear_divergence(
            problem.student_hidden[rows],
            problem.student_weight,
            support="topk",
            teacher_topk=(given[0][rows], given[1][rows]),
            divergence=divergence,
            top_k_tail=tail,
        )
        assert loss.isfinite()
        grad = torch.autograd.grad(loss, problem.student_hidden)[0]
        assert grad.isfinite().all()
        found.append((loss.detach(), grad))
    if tail and divergence == "forward_kl":
        # The student's mass on the sentinels leaves its tail, the teacher's does not.
        assert found[0][0] >= found[1][0]
    exact = problem.to("cpu", torch.float64)
    expected = reference.fused_linear_divergence(
        exact.student_hidden[rows],
        exact.student_weight,
        support="topk",
        teacher_topk=(padded[0][rows], padded[1][rows].double()),
        divergence=divergence,
        top_k_tail=tail,
    ).loss
    if divergence != "reverse_kl":  # infinite there, and bounded in the kernel
        torch.testing.assert_close(found[0][0], expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("source", ["student", "teacher"])
def test_tail_that_only_the_student_masks(divergence: str, source: str) -> None:
    """With k = V - 1 and a token that the student excludes: the full divergence again."""
    problem = make_problem(9, 6, 40, shared=False, bias=True)
    with torch.no_grad():
        problem.student_bias[7] = -torch.inf
        problem.teacher_weight[7] = 0.0
        problem.teacher_bias[7] = -9.0  # the teacher's least, and the tail of either source
    full, exact = run(problem, "torch", "cpu", torch.float32, divergence=divergence)
    chosen: dict[str, Any] = {"support": "topk", "top_k": 39, "top_k_source": source}
    topk, student = run(problem, "torch", "cpu", torch.float32, divergence=divergence, **chosen)
    torch.testing.assert_close(topk.per_token, full.per_token, rtol=1e-4, atol=1e-7)
    for name, value in exact.gradients().items():
        assert relative_error(student.gradients()[name], value) < 1e-4, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "renormalised"])
@pytest.mark.parametrize("known", [39, 40])
def test_server_and_a_token_that_only_the_student_masks(
    divergence: str, tail: bool, known: int
) -> None:
    """Kept by the server. Oracle: the full divergence; a server that knows less keeps its tail."""
    problem = make_problem(9, 6, 40, bias=False)
    topk = from_server(problem, known)
    bias = torch.zeros(40)
    bias[topk[0][0, 0]] = -torch.inf
    loss = fused_linear_divergence(
        problem.student_hidden,
        problem.student_weight,
        student_bias=bias,
        support="topk",
        top_k_tail=tail,
        teacher_topk=topk,
        divergence=divergence,
        reduction="none",
    )
    if tail or known == 40:
        full = fused_linear_divergence(
            problem.student_hidden,
            problem.student_weight,
            problem.teacher_hidden,
            problem.student_weight.detach().clone(),
            student_bias=bias,
            divergence=divergence,
            reduction="none",
        )
        torch.testing.assert_close(loss, full, rtol=1e-3, atol=1e-4)
    assert loss.isfinite().all() and (loss >= 0).all()
    gradient = torch.autograd.grad(loss.sum(), problem.student_hidden)[0]
    assert gradient.isfinite().all()


THREE = torch.arange(3).expand(4, 3)
PAIRS: dict[str, tuple[Tensor, Tensor, str]] = {
    "swapped": (
        torch.full((4, 3), -2.0),
        THREE,
        "teacher_topk is of torch.float32 and torch.int64; expected integer ids first",
    ),
    "gradient": (
        THREE,
        torch.full((4, 3), -2.0, requires_grad=True),
        r"teacher_topk\[1\]\.detach\(\)",
    ),
    "repeats": (THREE // 2, torch.full((4, 3), -2.0), "names a token twice in a row"),
    "mass": (THREE, torch.full((4, 3), -0.5), r"teacher_topk\[1\] holds a mass of 1\.8196"),
    "probabilities": (THREE, torch.full((4, 3), 0.3), r"numbers above 0.*pass their \.log\(\)"),
    "nan": (THREE, torch.full((4, 3), torch.nan), "holds NaN"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_a_server_cannot_have_sent(name: str) -> None:
    """In rows that count; in a masked row it may stand."""
    ids, logprobs, message = PAIRS[name]
    given: dict[str, Any] = {"teacher_topk": (ids, logprobs), "support": "topk"}
    hidden, weight = torch.randn(4, 6), torch.randn(20, 6)
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(hidden, weight, **given)
    if name not in ("swapped", "gradient"):
        loss = fused_linear_divergence(hidden, weight, **given, token_weights=torch.zeros(4))
        assert loss == 0
