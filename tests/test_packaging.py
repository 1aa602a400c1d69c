"""What is packed: an sdist with everything, and wheels with what was built now and nothing else.

The sources are copied, and a wheel is made of the sdist, as an index would. nvcc and the compiler
are stood in for by the settings that leave them out, except where a library is looked at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
STALE = b"built from other sources"


def tracked() -> list[str]:
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git ls-files is needed: these are not the sources of a checkout")
    return done.stdout.decode().splitlines()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which earlier builds have left libraries and a deleted module."""
    folder = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder / name)
    left = folder / "build" / f"lib.{sys.platform}-x" / "hero_kernels"
    for place in (folder / "hero_kernels", left, folder / "build" / "lib" / "hero_kernels"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "_cuda.abi3.so").write_bytes(STALE)
        (place / "_C.abi3.so").write_bytes(STALE)
    (folder / "build" / "lib" / "hero_kernels" / "deleted.py").touch()
    return folder


def build(folder: Path, what: str, **settings: str) -> Path:
    """The archive that the build backend makes in `folder`."""
    code = f"""
from setuptools import build_meta
print("made", build_meta.build_{what}("made"))
"""
    (folder / "made").mkdir(exist_ok=True)
    environment = {**os.environ, "HERO_BUILD_CPP": "0", "HERO_BUILD_CUDA": "0", **settings}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "made" / done.stdout.split("made ")[-1].strip()


@pytest.fixture(scope="module")
def unpacked(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(tree, "sdist")) as archive:
        archive.extractall(folder, filter="data")
    [top] = folder.iterdir()
    return top


def test_the_sdist_holds_the_checkout(unpacked: Path) -> None:
    packed = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert set(tracked()) - {".gitignore"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("source", ["tree", "unpacked"])
def test_a_wheel_holds_no_library_that_was_not_built(
    source: str, request: pytest.FixtureRequest
) -> None:
    wheel = build(request.getfixturevalue(source), "wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith(".so") or "deleted" in name]
    data = [name for name in tracked() if name.startswith(("hero/", "hero_kernels/"))]
    assert set(data) <= set(names)


@pytest.mark.skipif(not shutil.which("c++"), reason="a C++ compiler (c++) is needed")
def test_a_wheel_holds_the_library_of_its_sources(tree: Path, unpacked: Path) -> None:
    for folder in (tree, unpacked):
        with zipfile.ZipFile(build(folder, "wheel", HERO_BUILD_CPP="1")) as archive:
            assert b"hero_divergence_rows" in archive.read("hero_kernels/_C.abi3.so")
            assert "hero_kernels/_cuda.abi3.so" not in archive.namelist()


NVCC = """#!/bin/sh
for last; do case "$previous" in -o) out=$last;; esac; previous=$last; done
case "$*" in
*--version*) echo release 12;;
*--list-gpu-arch*) echo compute_90;;
*) echo compiled >>calls; echo made >"$out";;
esac
"""


def test_a_cuda_library_is_rebuilt_if_its_sources_changed_and_only_then(
    unpacked: Path, tmp_path: Path
) -> None:
    """With a compiler that counts its calls; times of files are set to mislead."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(NVCC)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    folder = tmp_path / "sources"
    shutil.copytree(unpacked, folder)
    (folder / "hero_kernels" / "_cuda.abi3.so").write_bytes(STALE)  # newer than every source
    calls, source = folder / "calls", folder / "csrc" / "cuda" / "divergence_rows.cu"

    def times_compiled() -> int:
        wheel = build(folder, "wheel", HERO_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
        with zipfile.ZipFile(wheel) as archive:
            assert archive.read("hero_kernels/_cuda.abi3.so").startswith(b"made")
        return len(calls.read_text().splitlines())

    assert times_compiled() == 1
    os.utime(source)
    assert times_compiled() == 1
    source.write_text(source.read_text() + "\n")
    os.utime(source, (0, 0))
    assert times_compiled() == 2
