"""Models, runs and places to write that are not there. Oracle: messages written by hand."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hero.models import existing_model, revision

CASES = [
    (["train", "quickstart", "--model.path", "empty"], "the folder holds no config.json"),
    (["eval", "empty", "--recipe", "quickstart"], "the folder holds no config.json"),
    (["rollout", "other", "--recipe", "quickstart"], "is not that of a transformers model"),
    (["eval", "young"], "a run without a best/ model"),
    (["train", "quickstart", "--model.path", "grown"], "whose model is in grown/best: name that"),
    (["eval", "broken"], "not the folder of a run: cannot read broken/config.json: expected"),
    (["train", "--resume", "broken"], "expected the settings env, eval, mode, model, rollout"),
    (["train", "quickstart", "--env.name", "shp"], "Unknown environment 'shp': expected one of"),
    (["sft", "tiny-shop", "--env.name", "shp"], "Unknown environment 'shp': expected one of"),
    (["rollout", "tiny-shop", "--env.name", "shp"], "Unknown environment 'shp': expected one of"),
    (["rollout", "tiny-shop", "--output", "empty"], "expected the name of a file to write"),
    (["merge", "empty", "--output", "new"], "holds no adapter"),
]
CODE = """
import contextlib, io, json, sys
from hero.cli import main
said = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main(arguments) == 1
    said.append(errors.getvalue())
assert "torch" not in sys.modules
print(json.dumps(said))
"""


def test_what_is_not_there_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    for name, content in (("other", '{"a": 1}'), ("young", '{"rollout": {}}'), ("broken", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    shutil.copytree(tmp_path / "young", tmp_path / "grown")
    for run in ("broken", "grown"):
        (tmp_path / run / "best").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    given = json.dumps([arguments for arguments, _ in CASES])
    done = subprocess.run(
        [sys.executable, "-c", CODE, given], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for (arguments, message), said in zip(CASES, json.loads(done.stdout), strict=True):
        assert message in said, arguments


def test_an_adapter_in_the_hub_s_cache_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "c" * 40
    cached = tmp_path / "models--me--adapter"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "adapter_config.json").write_text("{}")
    (cached / ".no_exist" / commit).mkdir(parents=True)
    (cached / ".no_exist" / commit / "config.json").touch()  # the hub has said that it is not there
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert existing_model("me/adapter") == "me/adapter" and revision("me/adapter") == commit
    (cached / "snapshots" / commit / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="Cannot load the model 'me/adapter'"):
        existing_model("me/adapter")


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: time.sleep(20))
    monkeypatch.setattr("hero.models.HUB_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"'me/silent'.*has not answered within 0\.3 s"):
        existing_model("me/silent")
    assert time.monotonic() - began < 5


def test_a_model_of_damaged_weights_is_not_played(tmp_path: Path) -> None:
    import torch

    from hero.config import ModelConfig
    from hero.policy import Policy

    policy = Policy.load(ModelConfig(device="cpu"))
    with torch.no_grad():
        policy.head.weight[0, 0] = torch.nan
    policy.save(tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"differ by nan.*its weights are damaged"):
        Policy.load(ModelConfig(path=str(tmp_path / "damaged"), device="cpu"))
