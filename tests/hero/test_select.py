"""Which weights a run ends with. Oracle: the weights after each update, averaged by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import Souring, settings, trainer

from hero.config import EvalConfig, OptimConfig, TrainConfig
from hero.learner import AVERAGED, Learner
from hero.policy import Policy
from hero.teacher import TeacherWeights
from hero.trainer import Trainer


@pytest.mark.parametrize("select", ["best", "last", "averaged"])
def test_the_selected_weights_end_the_run(
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    select: str,
) -> None:
    """The start is best here, as everything sours: best, last and averaged all differ."""
    monkeypatch.setattr(Souring, "episodes", 0)
    config = settings(model_path, updates=3, eval={"every": 9, "select": select, "rescues": 0})
    config.optim.warmup_steps = 0
    config.env.name = "test_trainer:Souring"
    after_update: list[dict[str, torch.Tensor]] = []
    run: Trainer

    def keep(*_: Any) -> None:
        after_update.append({n: p.detach().clone() for n, p in run.policy.trainable().items()})

    run = Trainer(config, tmp_path, callbacks=[keep])
    start = {n: p.detach().clone() for n, p in run.policy.trainable().items()}
    summary = run.run()
    ended = run.policy.trainable()
    expected = {
        "best": start,
        "last": after_update[-1],
        "averaged": {
            name: torch.stack([weights[name] for weights in after_update]).mean(0) for name in start
        },
    }[select]
    for name, value in expected.items():
        torch.testing.assert_close(ended[name].detach(), value, atol=1e-7, rtol=1e-6)
    folder = tmp_path / ("best" if select == "best" else "selected")
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], ended[name].detach()) for name in saved)
    assert summary["selected"] == select
    assert summary["last"]["per_task"].keys() == summary["after"]["per_task"].keys()
    assert json.loads((tmp_path / "summary.json").read_text())["last"]["success"] >= 0
    if select == "last":
        assert summary["last"] == summary["after"]


def test_the_average_goes_over_the_last_updates(fresh_policy: Policy) -> None:
    """A weight that stands at 1, 2, 3, … : a plain mean at first, then with the rate 1/10."""
    config = TrainConfig(eval=EvalConfig(select="averaged"), optim=OptimConfig())
    learn = Learner(fresh_policy, TeacherWeights(fresh_policy, config.teacher), config)
    assert learn.average is not None
    name, parameter = next(iter(fresh_policy.trainable().items()))
    expected = 0.0
    for update in range(1, 31):
        parameter.data.fill_(float(update))
        learn.take_into_average()
        rate = 1 / min(update, AVERAGED)
        expected = (1 - rate) * expected + rate * update
        value = learn.average.state_dict()[name]
        torch.testing.assert_close(value, torch.full_like(value, expected))
        if update <= 10:
            assert expected == pytest.approx((update + 1) / 2)


def test_an_average_is_resumed(model_path: Path, tmp_path: Path) -> None:
    average = {"select": "averaged", "test_tasks": 0}
    trainer(settings(model_path, eval=average), tmp_path / "whole").run()
    trainer(settings(model_path, eval=average, updates=2), tmp_path / "parts").run()
    resumed = settings(model_path, eval=average, resume=str(tmp_path / "parts"))
    run = trainer(resumed, tmp_path / "parts")
    run.run()
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint" / "optimizer.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert whole["averaged"] == parts["averaged"] == 4
    assert all(torch.equal(v, parts["average"][n]) for n, v in whole["average"].items())
