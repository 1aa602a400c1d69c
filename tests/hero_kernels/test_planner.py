"""The planner against arithmetic done by hand, and its choices against what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hero_kernels import (
    KernelOptions,
    explain,
    fused_linear_divergence,
    linear_logprobs,
    machines,
    planner,
)
from hero_kernels.layout import Plan
from hero_kernels.machines import Machine, Products

MACHINE = Machine(
    "hand",
    "made up",
    False,
    dict.fromkeys(
        ("float32", "bfloat16"), Products(logits=1e9, hidden=2e9, weight=4e9, half_rows=64)
    ),
    {"cpu": {"jsd": 1e8}, "torch": {"jsd": 1e7}},
    bandwidth=1e9,
    fresh=1e9,
    chunk_seconds=0.001,
)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "machine_of", lambda _: MACHINE)


def problem(rows: int = 1000, budget: int = 0, **changes: object) -> planner.Problem:
    plan = Plan("torch", 100, "float32", 0, True, True, False, False, "chunked", budget)
    plan = plan._replace(**{k: v for k, v in changes.items() if k in Plan._fields})
    device = torch.device("cpu")
    return planner.Problem(rows, 64, 5000, device, torch.float32, True, "jsd", "full", False, plan)


def test_time_and_memory_of_the_chunk_loop(by_hand: None) -> None:
    """10 chunks of 100 rows: four products of 2·1000·64·5000 FLOP, slowed by 64 / 100 each."""
    chosen = planner.choose(problem())
    flop = 2 * 1000 * 64 * 5000
    products = (2 / 1e9 + 1 / 2e9 + 1 / 4e9) * flop * 1.64
    logits = 2 * 100 * 5000 * 4  # teacher and delta in fp32; the gradient takes delta's place
    rows, chunks = 1000 * 5000 / 1e7, 10 * 0.001
    assert chosen.bytes == logits  # dW is summed in its own type
    assert chosen.seconds == pytest.approx(products + rows + logits / 1e9 + chunks, rel=1e-6)
    frozen = planner.choose(problem(need_weight=False))
    assert chosen.seconds - frozen.seconds == pytest.approx(flop * 1.64 / 4e9, rel=1e-6)


def test_a_budget_makes_chunks_smaller_and_then_slices(by_hand: None) -> None:
    free = {"chunk_size": 0, "design": "auto", "impl": "auto"}
    roomy = planner.choose(problem(budget=1 << 30, **free))
    assert (roomy.design, roomy.size) == ("chunked", 256)
    tight = planner.choose(problem(budget=6_000_000, **free))
    assert tight.design == "chunked" and tight.size == 128 and tight.bytes <= 6_000_000
    with pytest.raises(ValueError, match="memory_budget=1000 bytes is too small for 1000 rows"):
        planner.choose(problem(budget=1000, **free))
    # Many rows: even 16 of them at a time, with dW's sum, take more than slices do.
    sixteen_bit = problem(rows=64, budget=1 << 26, **free)._replace(
        dtype=torch.float16, vocab_size=1 << 20, hidden_size=8
    )
    assert planner.choose(sixteen_bit).design == "sliced"


def test_the_plan_is_carried_out() -> None:
    """With a budget that rules the chunk loop out the call agrees with one without."""
    torch.manual_seed(0)
    hidden, head = torch.randn(200, 16), torch.randn(1 << 16, 16)
    budget = 64 << 20

    def call(options: KernelOptions) -> tuple[Tensor, Tensor, Tensor]:
        states, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = fused_linear_divergence(states, weight, hidden.flip(0), options=options)
        assert isinstance(loss, Tensor)
        return (loss.detach(), *torch.autograd.grad(loss, (states, weight)))

    assert "design: chunked" in explain(200, 16, 1 << 16)
    text = explain(200, 16, 1 << 16, options=KernelOptions(memory_budget=budget))
    assert text.count("<- taken") == 1 and "over the budget" in text
    for ours, theirs in zip(
        call(KernelOptions(memory_budget=budget)), call(KernelOptions()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("path", sorted(machines.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_every_file_of_costs(path: Path) -> None:
    machine = machines.load(path.stem)
    assert set(machine.products) == {"bfloat16", "float32"}
    assert all(rate > 0 for rates in machine.rows.values() for rate in rates.values())
    assert ("measured" in machine.source) and ("not measured" in machine.source) != machine.measured
    assert json.loads(path.read_text())["measured"] == machine.measured


def test_a_device_takes_the_newest_entry_that_is_not_newer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (((8, 6), "sm_80"), ((9, 0), "sm_90"), ((12, 0), "sm_100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert machines.machine_of(torch.device("cuda")).name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 8, "design": "sliced"}, "which design='sliced' has none of"),
        ({"storage": "mixed", "design": "fused"}, "has a storage of its own"),
    ],
    ids=["rows-of-slices", "storage-of-fused"],
)
def test_options_that_have_no_meaning_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelOptions(**options)


def test_what_is_refused_says_why() -> None:
    with pytest.raises(ValueError, match=r"design='fused' cannot serve this call: it runs on cuda"):
        explain(4, 4, 4, dtype=torch.bfloat16, options=KernelOptions(design="fused"))
    with pytest.raises(ValueError, match=r"design='fused' cannot serve .* not those of impl='cpu'"):
        explain(4, 4, 4, impl="cpu", options=KernelOptions(design="fused"))
    with pytest.raises(ValueError, match="design='sliced' has support='full'"):
        explain(4, 4, 4, support="topk", options=KernelOptions(design="sliced"))
    hidden, head, ids = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for options in (KernelOptions(memory_budget=1 << 20), KernelOptions(design="sliced")):
        with pytest.raises(ValueError, match="linear_logprobs has no"):
            linear_logprobs(hidden, head, ids, options=options)
    with pytest.raises(ValueError, match="design='fused' cannot serve this call: it runs on cuda"):
        linear_logprobs(hidden, head, ids, options=KernelOptions(design="fused"))
