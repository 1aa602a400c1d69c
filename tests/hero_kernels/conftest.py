"""Every test that takes `impl` runs for each implementation that this machine has."""

from __future__ import annotations

import pytest
import torch
from problems import DEVICE, missing

from hero_kernels.backends import IMPLEMENTATIONS


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if not missing(name)])
def impl(request: pytest.FixtureRequest) -> str:
    """Name of an implementation that can run here; test_backends.py says which cannot, and why."""
    name: str = request.param
    return name


@pytest.fixture
def device(impl: str) -> str:
    """Where the implementation runs."""
    return DEVICE.get(impl, "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
