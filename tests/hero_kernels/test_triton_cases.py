"""Runs the triton_*_cases.py in Triton's interpreter, and on the GPU where there is one.

In a process of their own: TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


def run_cases(**environment: str) -> None:
    """Fails with pytest's own output."""
    paths = sorted(Path(__file__).parent.glob("triton_*_cases.py"))
    assert len(paths) == 2
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")
