"""How far a call is from its arithmetic: what runs of this package, counted by the interpreter."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torch

import hero_kernels
from hero_kernels import fused_linear_divergence

PACKAGE = Path(hero_kernels.__file__).parent


def trace(function: Any) -> list[str]:
    """The file of each frame of the package that is entered, in order."""
    entered: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            entered.append(Path(frame.f_code.co_filename).name)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return entered


def test_a_forward_pass_is_short() -> None:
    """Warm; 300 rows, which are two tiles, as `impl="auto"` would have it."""
    hidden = torch.randn(300, 32, requires_grad=True)
    head, teacher = torch.randn(500, 32, requires_grad=True), torch.randn(300, 32)

    def call() -> None:
        fused_linear_divergence(hidden, head, teacher)

    call()
    entered = trace(call)
    assert 10 < len(entered) < 90, entered
    assert len(set(entered)) <= 8, set(entered)


def test_a_backward_pass_is_shorter() -> None:
    hidden = torch.randn(300, 32, requires_grad=True)
    loss = fused_linear_divergence(hidden, torch.randn(500, 32), torch.randn(300, 32))
    assert isinstance(loss, torch.Tensor)
    loss.backward(retain_graph=True)
    assert 0 < len(trace(loss.backward)) < 10


def test_the_signature_is_readable() -> None:
    assert len(inspect.signature(fused_linear_divergence).parameters) <= 24
