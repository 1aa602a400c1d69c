"""Every test that takes `impl` runs for each implementation that this machine has."""

from __future__ import annotations

import pytest
import torch
from problems import DEVICE

from hero_kernels import supports
from hero_kernels.backends import IMPLEMENTATIONS


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    """Name of an implementation; skips, with the reason, where it cannot run."""
    name: str = request.param
    if DEVICE.get(name) == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if reason := supports(name, device=DEVICE.get(name, "cpu")):
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture
def device(impl: str) -> str:
    """Where the implementation runs."""
    return DEVICE.get(impl, "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
