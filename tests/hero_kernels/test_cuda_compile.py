"""Compiles the CUDA row kernel for GPUs this machine need not have; reads what ptxas made of it.

Also how setup.py deals with nvcc. test_cuda_emulator.py tests that the kernel computes the right
thing; how fast it is, neither does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="its wheel has the disassembler; triton is not installed")

from benchmarks.offline import cuda_rows, cuobjdump
from hero_kernels import cuda, supports

ROOT = Path(__file__).parents[2]
REGISTERS = 65536
"""Of a multiprocessor of every architecture below."""
MAX_THREADS = 512

needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") and cuobjdump()), reason="there is no nvcc, or no cuobjdump"
)


@needs_nvcc
@pytest.mark.slow  # beside test_gpu_bounds.py, which reads what is compiled here for 90a
@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_every_kernel(arch: str) -> None:
    kernels = cuda_rows(arch)
    usual = {(code, delta, False) for code in range(3) for delta in (False, True)}
    assert set(kernels) == usual | {(0, delta, True) for delta in (False, True)}  # JSD `leaves`
    instructions: Counter[str] = Counter()
    for kernel, compiled in kernels.items():
        print(f"sm_{arch}: {kernel} {compiled}")
        assert compiled.spills == 0
        assert compiled.registers * MAX_THREADS <= REGISTERS  # or it could not be launched
        assert compiled.shared == 0  # all of it is dynamic: `Plan.shared_bytes`
        instructions.update(line.name for line in compiled.code)

    def count(*words: str) -> int:
        return sum(
            n for name, n in instructions.items() if all(w in name.split(".") for w in words)
        )

    # A row's pieces of 16 bytes, in shared memory and on their way out.
    assert count("LDS", "128") >= 2 * len(kernels)
    assert count("STG", "E", "128") >= len(kernels)
    assert count("SYNCS") or arch == "80"  # mbarriers
    if arch == "80":
        assert count("LDGSTS") and not count("UBLKCP")
    else:
        assert count("UBLKCP") >= 2 * len(kernels)  # bulk copies: teacher and student
        assert not count("LDGSTS")
        # Barriers of a cluster, and stores into other blocks that report their arrival.
        assert any(name.startswith("UCGABAR") for name in instructions)
        assert count("STAS") >= 2 * len(kernels)


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext --inplace` in `folder`, without the C++ kernel."""
    variables = {**os.environ, "HERO_BUILD_CPP": "0", **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py reads, and a library that an earlier build left."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "hero_kernels").mkdir()
    library = tmp_path / "hero_kernels" / "_cuda.abi3.so"
    library.write_text("stale")
    os.utime(library, (0, 0))
    return tmp_path


def fake_nvcc(folder: Path, script: str) -> str:
    """A CUDA_HOME whose nvcc is this shell script."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n" + script)
    nvcc.chmod(0o755)
    return str(folder / "cuda")


def test_auto_without_nvcc_leaves_no_stale_library(checkout: Path) -> None:
    done = build(checkout, HERO_BUILD_CUDA="auto", CUDA_HOME=str(checkout / "none"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "CUDA" in line]
    assert len(lines) == 1 and "there is no nvcc in" in lines[0]
    assert not list(checkout.glob("hero_kernels/_cuda*"))


def test_auto_with_a_failing_nvcc_leaves_no_stale_library(checkout: Path) -> None:
    home = fake_nvcc(
        checkout,
        'test "$1" = --list-gpu-arch && echo compute_80 compute_90 && exit\n'
        "echo no space left >&2; exit 1\n",
    )
    done = build(checkout, HERO_BUILD_CUDA="auto", CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    assert "nvcc failed: no space left" in done.stderr
    assert not list(checkout.glob("hero_kernels/_cuda*"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", "there is no nvcc in"),
        ("echo compute_70 compute_80", "CUDA 11.8 or newer is needed"),
    ],
    ids=["none", "old"],
)
def test_demanded_without_a_usable_nvcc_is_an_error(
    checkout: Path, script: str, message: str
) -> None:
    home = fake_nvcc(checkout, script) if script else str(checkout / "none")
    done = build(checkout, HERO_BUILD_CUDA="1", CUDA_HOME=home)
    assert done.returncode != 0
    assert "HERO_BUILD_CUDA=1, but the CUDA row kernel cannot be built" in done.stderr
    assert message in done.stderr


def test_off_does_not_look_for_nvcc(checkout: Path) -> None:
    done = build(checkout, HERO_BUILD_CUDA="0", CUDA_HOME=str(checkout / "none"))
    assert done.returncode == 0 and "CUDA" not in done.stderr
    wrong = build(checkout, HERO_BUILD_CUDA="yes")
    assert "HERO_BUILD_CUDA must be auto, 1 or 0, got 'yes'" in wrong.stderr


def test_why_it_cannot_serve() -> None:
    assert supports("cuda") == "it runs on cuda, the tensors are on cpu"
    assert supports("cuda", device="cuda", dtype=torch.float64) == "it does not take torch.float64"
    reason = cuda.available()
    assert supports("cuda", device="cuda") == reason
    if not torch.cuda.is_available():
        assert "not built" in (reason or "") or reason == "torch sees no CUDA device"


def test_more_than_it_can_count_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"up to 1073741824 rows and columns, got \[1, 1073741825\]"
    ):
        cuda.check_size(torch.empty(1, 1).expand(1, (1 << 30) + 1))
