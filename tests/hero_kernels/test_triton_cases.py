"""Runs the triton_*_cases.py in Triton's interpreter, and on the GPU where there is one.

Each in a process of its own: TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
CASES = pytest.mark.parametrize("cases", ["rows", "logprob", "fused"])


def run_cases(cases: str, **environment: str) -> None:
    """Fails with pytest's own output."""
    path = Path(__file__).with_name(f"triton_{cases}_cases.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@CASES
def test_in_the_interpreter(cases: str) -> None:
    run_cases(cases, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@CASES
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu(cases: str) -> None:
    run_cases(cases, TRITON_INTERPRET="0")
