"""The studies of a language model, as far as a CPU can tell: a random model goes through them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shop_helpers import write_catalogue

from hero.envs.bfcl.package import data_folder
from hero.envs.shop import ShopEnv
from hero.scratch import ScratchConfig, build_tokenizer
from tests.hero.short_runs import saved

ROOT = Path(__file__).resolve().parents[2]


def call(out: Path, model: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "MODEL": str(model), "STATE": str(out / "state"), "OUT": str(out / "out"),
        "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more,
    }  # fmt: skip
    return subprocess.run(
        ["bash", "benchmarks/gpu_study.sh", *arguments], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not data_folder().is_dir(), reason="no data: hero envs get bfcl")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_studies_of_a_language_model(tmp_path: Path) -> None:
    """A call whose time runs out, and one that goes on from it to the end."""
    model = tmp_path / "model"
    model.mkdir()
    tokenizer = build_tokenizer(ShopEnv(profile="tiny").vocabulary())  # the rest is unknown
    saved(ScratchConfig(width=16, layers=1, heads=2, context=16000), tokenizer, model)
    write_catalogue(tmp_path / "webshop")

    cut = call(tmp_path, model, "--dry-run", LIMIT="10")
    assert cut.returncode == 3 and "call it again" in cut.stdout
    done = call(tmp_path, model, "--dry-run", WEBSHOP=str(tmp_path / "webshop"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for name in ("lm-shop", "lm-webshop", "lm-bfcl"):
        folder = tmp_path / "out" / name
        rows = [json.loads(path.read_text()) for path in folder.glob("rows/**/test-*.json")]
        assert len(rows) == 2 and all(0 < row["marks"][0]["turns"] <= 32 for row in rows)
        assert "grpo" in (folder / "report.md").read_text()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    refused = call(tmp_path, tmp_path)
    assert refused.returncode == 2
    assert f"config.json; got '{tmp_path}'" in refused.stderr
