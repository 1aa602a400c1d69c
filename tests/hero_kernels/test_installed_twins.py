"""The drop-ins beside what they stand in for. Oracle: the installed liger-kernel and trl."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_helpers import gkd_trainer, installed

from hero_kernels.integrations import liger, trl


def parameters(function: Callable[..., Any], drop: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """Names in order, and defaults."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.name not in ("self", "ctx", *drop)]


def test_signatures_of_liger() -> None:
    theirs = installed("liger-kernel", "0.8.5", "liger_kernel.transformers")
    functional = importlib.import_module("liger_kernel.transformers.functional")
    assert parameters(liger.fused_linear_jsd) == parameters(functional.liger_fused_linear_jsd)
    twin, original = liger.FusedLinearJSD, theirs.LigerFusedLinearJSD
    assert parameters(twin.__init__) == parameters(original.__init__)
    mine = [name for name, _ in parameters(twin.forward)]
    assert mine == [name for name, _ in parameters(original.forward)]


def test_signatures_of_trl() -> None:
    gkd = installed("trl", "1.16.0", "trl.experimental.gkd")
    kernels = importlib.import_module("trl.kernels.chunked_divergence")
    original = kernels.ChunkedDivergenceFunction.forward
    assert parameters(trl.chunked_divergence) == parameters(original)
    original = gkd.GKDTrainer.generalized_jsd_loss
    assert parameters(trl.generalized_jsd_loss) == parameters(original)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_values_of_generalized_jsd_loss(
    beta: float, reduction: str, items: Any, with_labels: bool
) -> None:
    gkd = installed("trl", "1.16.0", "trl.experimental.gkd")
    student, teacher = torch.randn(2, 2, 5, 11, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 3, 4, 5], [-100, -100, 2, 1, 0]]) if with_labels else None
    arguments = (student, teacher, labels, beta, 1.3, reduction, items)
    expected = gkd.GKDTrainer.generalized_jsd_loss(*arguments)
    torch.testing.assert_close(trl.generalized_jsd_loss(*arguments), expected)


@pytest.mark.slow
def test_a_step_of_the_real_gkd_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps with accumulation, with TRL's loss and with ours: the same weights. By SGD: Adam
    would divide rounding errors by gradients near zero."""
    gkd = installed("trl", "1.16.0", "trl.experimental.gkd")
    weights: list[dict[str, torch.Tensor]] = []
    for ours in (False, True):
        trainer = gkd_trainer(gkd.GKDTrainer, tmp_path)
        if ours:
            calls = watched(monkeypatch, gkd.GKDTrainer)
        before = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert len(calls) == 4 and all(call["num_items_in_batch"] is not None for call in calls)
    assert (before - weights[0]["lm_head.weight"]).abs().max() > 1e-3
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-4, atol=1e-6)


def watched(monkeypatch: pytest.MonkeyPatch, trainer: Any) -> list[dict[str, Any]]:
    """Put our loss in TRL's place; what it is called with."""
    calls: list[dict[str, Any]] = []

    def loss(**named: Any) -> torch.Tensor:
        calls.append(named)
        return trl.generalized_jsd_loss(**named)

    monkeypatch.setattr(trainer, "generalized_jsd_loss", staticmethod(loss))
    return calls
