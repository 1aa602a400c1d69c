"""A LoRA run made a plain model, and gone on with. Oracle: W + (alpha / rank) B A, by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from short_runs import assert_same, settings, trainer, weights
from transformers import AutoModelForCausalLM

from hero.checkpoint import BrokenCheckpoint
from hero.cli import main
from hero.config import ModelConfig
from hero.policy import Policy

pytest.importorskip("peft", reason="LoRA needs peft")
LORA = {"lora_rank": 2, "lora_alpha": 6}


@pytest.fixture(scope="module")
def run(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    trainer(settings(model_path, model=LORA, optim={"learning_rate": 0.1}), folder).run()
    return folder


def test_the_merged_model_is_base_plus_adapter(
    run: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(run), "--output", str(tmp_path / "plain")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    adapter = load_file(run / "best" / "adapter_model.safetensors")
    changed = 0
    for name, weight in AutoModelForCausalLM.from_pretrained(model_path).state_dict().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if (down := adapter.get(f"{stem}.lora_A.weight")) is not None:
            weight = weight + 6 / 2 * adapter[f"{stem}.lora_B.weight"] @ down
            changed += 1
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)
    assert changed
    Policy.load(ModelConfig(path=str(tmp_path / "plain"), device="cpu", **LORA))  # trains again
    assert main(["merge", str(run), "--output", str(tmp_path / "plain")]) == 1
    assert "nothing in it is replaced" in capsys.readouterr().err


def test_an_adapter_is_played_but_not_trained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hero merge RUN"):
        trainer(settings(run / "best"), tmp_path)


def test_a_lora_run_that_was_stopped_goes_on_as_if_it_had_not(
    run: Path, model_path: Path, tmp_path: Path
) -> None:
    config = settings(model_path, model=LORA, optim={"learning_rate": 0.1}, updates=2)
    trainer(config, tmp_path).run()
    config.resume, config.updates = "auto", 4
    trainer(config, tmp_path).run()
    assert_same(weights(tmp_path), weights(run))


def test_a_base_that_has_changed_is_seen_when_a_lora_run_goes_on(
    model_path: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_path, base)
    config = settings(base, model=LORA, updates=2)
    trainer(config, tmp_path / "run").run()
    config.resume, config.updates = "auto", 3
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(base)
    with pytest.raises(BrokenCheckpoint, match=r"when --model\.path .* held another model"):
        trainer(config, tmp_path / "run").run()
    shutil.copytree(model_path, base, dirs_exist_ok=True)
    trainer(config, tmp_path / "run").run()


@pytest.mark.parametrize("kind", ["plain", "no base"])
def test_what_cannot_be_merged_is_said(
    run: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source = model_path
    if kind == "no base":
        source = tmp_path / "adapter"
        source.mkdir()
        text = (run / "best" / "adapter_config.json").read_text()
        (source / "adapter_config.json").write_text(text.replace(str(model_path), "/not/there"))
    assert main(["merge", str(source), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert ("holds no adapter" if kind == "plain" else "Cannot put") in said
    assert not (tmp_path / "out").exists()
