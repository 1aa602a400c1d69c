"""`hero train`, `eval` and `rollout` on each world, with a tiny random chat model.

BFCL has its own (test_env_bfcl.py): its prompts are long.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hero.cli import main
from hero.config import ScratchConfig
from hero.envs.registry import worlds
from hero.scratch import build_model

BESIDE_THE_REPOSITORY = Path(__file__).parents[3] / "shared" / "data" / "webshop_1k"
WEBSHOP = Path(os.environ.get("HERO_WEBSHOP_DATA", BESIDE_THE_REPOSITORY))
WORLDS = {
    "shop": "profile tiny",
    "webshop": f"data_dir {WEBSHOP}",
    "tau": "domain mock user none max_steps 3",
    "gym": "id FrozenLake-v1",
    "textarena": "id GuessTheNumber-v0",
    "textworld": "",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    build_model(
        ScratchConfig(width=32, layers=1, heads=2, context=16000), tiny_tokenizer
    ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", WORLDS)
def test_train_eval_and_rollout(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [module for module in worlds()[name].modules if find_spec(module) is None]
    if missing or (name == "webshop" and not WEBSHOP.is_dir()):
        pytest.skip(f"{name} lacks {', '.join(missing) or 'its data: set HERO_WEBSHOP_DATA'}")
    monkeypatch.chdir(tmp_path)
    options = WORLDS[name].split()
    world = ["--env.name", name, *(["--env.options", *options] if options else [])]
    caps = "--rollout.max-turns 2 --rollout.max-turn-tokens 8 --rollout.batch-size 2"
    caps += " --rollout.max-episode-tokens 12000"
    train = "--mode env_only --updates 1 --threads 1 --rollout.tasks-per-update 2"
    train += " --eval.dev-tasks 1 --eval.test-tasks 0 --output-dir run --model.path"
    assert main(["train", *world, *caps.split(), *train.split(), model]) == 0
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["optim/steps"] == 1
    played = [*world, *caps.split(), "--tasks", "1"]
    assert main(["eval", model, "run", *played, "--output", "evals"]) == 0
    assert len(list(Path("evals").glob("*/eval.json"))) == 2
    assert main(["rollout", "run", *played, "--output", "episodes.jsonl"]) == 0
    [episode] = map(json.loads, Path("episodes.jsonl").read_text().splitlines())
    assert episode["turns"] and episode["stop_reason"] != "env_error"
