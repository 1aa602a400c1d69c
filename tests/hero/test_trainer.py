"""Whole runs on the tiny shop with a random model and the environment's own diagnoses.

Oracles: a run that was interrupted and resumed must end with the very weights of one that was not;
what a run writes must be there after a fault at any stage.
"""

from __future__ import annotations

import json
import os
import signal
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hero.envs.shop import ShopEnv
from hero.episodes import EnvironmentFault
from hero.evaluation import TeacherGate
from hero.interrupt import Interrupt
from hero.policy import Policy
from hero.report.tracking import read_jsonl
from hero.report.viewer import render
from tests.hero.short_runs import assert_same, settings, trainer, weights


def test_a_run_leaves_everything(model_path: Path, tmp_path: Path) -> None:
    summary = trainer(settings(model_path), tmp_path).run()
    steps = [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4]
    last = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert last["env_turns"] == 4 * 4 * 3 and last["optim/steps"] == 1
    assert 0 < last["reflection/non_empty_rate"] <= 1
    assert {"dev/success", "divergence/mean", "entropy", "agreement/recall"} <= last.keys()
    assert summary["before"]["per_task"].keys() == summary["after"]["per_task"].keys()
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] == "all 4 updates done"
    assert Policy.load(settings(tmp_path / "best").model).num_parameters > 0
    splits = {line["split"] for line in read_jsonl(tmp_path / "trajectories.jsonl")}
    assert splits == {"before", "train", "after"}


@pytest.mark.parametrize(
    "mode", ["hero+grpo", "env_only", "sdpo", "full_demo", "reinforce", "rloo"]
)
def test_every_kind_of_mode_runs(model_path: Path, tmp_path: Path, mode: str) -> None:
    config = settings(model_path, mode=mode, rollout={"group_size": 2, "tasks_per_update": 2})
    config.updates = 1
    trainer(config, tmp_path).run()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


class Lottery(ShopEnv):
    """A shop that pays for what is written, whatever it is: the episodes of a group differ."""

    def step(self, text: str) -> Any:
        observation, _, *rest = super().step(text)
        return observation, len(text) / 100, *rest


def test_turns_without_a_hint_are_recorded_as_what_they_are(
    model_path: Path, tmp_path: Path
) -> None:
    changes = {"rollout": {"group_size": 2}, "reflection": {"max_hint_tokens": 0},
               "loss": {"turns": "hinted"}, "updates": 1}  # fmt: skip
    for mode in ("hero+grpo", "hero"):  # no turn has a hint: the second has nothing to train
        config = settings(model_path, mode=mode, **changes)
        config.env.name = f"{__name__}:Lottery"
        trainer(config, tmp_path / mode).run()
        steps = read_jsonl(tmp_path / mode / "metrics.jsonl")[-1]["optim/steps"]
        records = read_jsonl(tmp_path / mode / "trajectories.jsonl")
        trained = [t["trained"] for r in records if r["split"] == "train" for t in r["turns"]]
        expected = ["policy gradient"] if mode == "hero+grpo" else []
        assert steps == len(expected) and trained == [expected] * 24
        report = render(tmp_path / mode).read_text(encoding="utf-8")
        assert ("no hint: not trained" in report) == (mode == "hero")


def test_the_same_seed_gives_the_same_weights(model_path: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        trainer(settings(model_path), tmp_path / name).run()
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    trainer(settings(model_path, seed=1), tmp_path / "c").run()
    assert any(
        not torch.equal(v, weights(tmp_path / "a")[n]) for n, v in weights(tmp_path / "c").items()
    )


def test_resume_ends_with_the_weights_of_an_unbroken_run(model_path: Path, tmp_path: Path) -> None:
    trainer(settings(model_path), tmp_path / "whole").run()
    trainer(settings(model_path, updates=2), tmp_path / "parts").run()
    resumed = settings(model_path, resume=str(tmp_path / "parts"))
    trainer(resumed, tmp_path / "parts").run()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = (
        load_file(tmp_path / name / "checkpoint" / "teacher.safetensors")
        for name in ("whole", "parts")
    )
    assert_same(whole, parts)
    assert whole.keys() == weights(tmp_path / "whole").keys()  # the teacher's head is among them
    steps = [line["step"] for line in read_jsonl(tmp_path / "parts" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4]


class Faulty(ShopEnv):
    """A shop whose till breaks after some purchases."""

    steps_left = 40

    def step(self, text: str) -> Any:
        Faulty.steps_left -= 1
        if Faulty.steps_left < 0:
            raise RuntimeError("the till is broken")
        return super().step(text)


def test_an_environment_that_raises_loses_no_update(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 12 steps each for dev, test, probe, two updates and dev again: then the third update begins.
    monkeypatch.setattr(Faulty, "steps_left", 12 + 12 + 12 + 12 + 12 + 12 + 5)
    config = settings(model_path)
    config.env.name = f"{__name__}:Faulty"
    with pytest.raises(
        EnvironmentFault, match=r"All 4 .*Faulty, task .train-\d+., turn \d: step raised .*broken"
    ):
        trainer(config, tmp_path).run()
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert state["update"] == 2
    monkeypatch.setattr(Faulty, "steps_left", 10**6)
    config.resume = str(tmp_path)
    trainer(config, tmp_path).run()
    trainer(settings(model_path), tmp_path / "whole").run()
    assert_same(weights(tmp_path), weights(tmp_path / "whole"))


def test_ctrl_c_saves_and_can_be_resumed(model_path: Path, tmp_path: Path) -> None:
    broken = trainer(settings(model_path), tmp_path)
    rollout = broken.stages.rollout

    def interrupted(assignments: Any, **kwargs: Any) -> Any:
        if assignments[0].id.startswith("u3-"):
            os.kill(os.getpid(), signal.SIGINT)
        return rollout(assignments, **kwargs)

    broken.stages.rollout = interrupted  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["update"] == 2
    trainer(settings(model_path, resume=str(tmp_path)), tmp_path).run()
    trainer(settings(model_path), tmp_path / "whole").run()
    assert_same(weights(tmp_path), weights(tmp_path / "whole"))


def test_interrupt_waits_for_the_end_of_a_deferred_block() -> None:
    reached = False
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached


def test_a_budget_of_environment_turns_ends_the_run(model_path: Path, tmp_path: Path) -> None:
    summary = trainer(settings(model_path, max_env_turns=20), tmp_path).run()
    assert "budget of 20" in summary["stopped"]
    assert summary["env_turns"] == 18  # every episode takes all of its 3 turns: 4, then 2 of them


class Hasty(ShopEnv):
    """A shop that closes after one step in every second episode."""

    def step(self, text: str) -> Any:
        observation, reward, terminated, truncated, info = super().step(text)
        hurried = zlib.crc32(str(self._task_id).encode()) % 2 == 0
        return observation, reward, terminated or hurried, truncated, info


@pytest.mark.parametrize("group", [1, 2])
def test_a_budget_is_met_to_the_episode(model_path: Path, tmp_path: Path, group: int) -> None:
    config = settings(model_path, max_env_turns=32, rollout={"group_size": group}, updates=99)
    config.env.name = f"{__name__}:Hasty"
    summary = trainer(config, tmp_path).run()
    assert 32 - 3 * group < summary["env_turns"] <= 32
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    turns = [line["env_turns"] for line in lines if "env_turns" in line]
    assert turns[-1] == summary["env_turns"] and len(turns) <= 32 // (4 * group) + 1


def test_a_budget_that_holds_no_group_is_refused(model_path: Path, tmp_path: Path) -> None:
    config = settings(model_path, max_env_turns=5, rollout={"group_size": 2})
    with pytest.raises(ValueError, match="at least 6"):
        trainer(config, tmp_path)


class Generous(ShopEnv):
    """A shop that pays half for every step, and nobody succeeds."""

    def step(self, text: str) -> Any:
        observation, _, *rest, info = super().step(text)
        return observation, 0.5, *rest, info | {"success": False}


@pytest.mark.parametrize("reward", ["score", "success"])
def test_training_pays_what_it_is_told_to(model_path: Path, tmp_path: Path, reward: str) -> None:
    config = settings(model_path, env={"reward": reward}, updates=1)
    config.env.name = f"{__name__}:Generous"
    run = trainer(config, tmp_path)
    contexts = []
    annotate = run.stages.annotate

    def watched(trajectories: Any, reflections: Any) -> Any:
        samples = annotate(trajectories, reflections)
        contexts.extend(run.policy.renderer.decode(s.privileged_ids) for s in samples)
        return samples

    run.stages.annotate = watched  # type: ignore[method-assign]
    run.run()
    last = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert last["rewards/mean"] == (1.5 if reward == "score" else 0.0)
    assert last["dev/score"] == 1.5  # evaluations keep the environment's own
    expected = "reward 1.5" if reward == "score" else "reward 0.0"
    assert contexts and all(expected.replace(".", " . ") in text for text in contexts)


def test_reflections_are_counted_beside_environment_turns(model_path: Path, tmp_path: Path) -> None:
    config = settings(model_path, reflection={"reflector": "self", "max_tokens": 20}, updates=2)
    trainer(config, tmp_path).run()
    lines = read_jsonl(tmp_path / "metrics.jsonl")[1:]
    tokens = [line["reflection/generated_tokens"] for line in lines]
    seconds = [line["reflection/seconds"] for line in lines]
    assert tokens[0] > 0 and lines[-1]["reflection_tokens"] == sum(tokens)
    assert lines[-1]["reflection_seconds"] == pytest.approx(sum(seconds))


def test_the_last_weights_are_judged_when_the_budget_ends_the_run(
    model_path: Path, tmp_path: Path
) -> None:
    trainer(settings(model_path, max_env_turns=3), tmp_path).run()
    last = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert {"dev/success", "agreement/recall"} <= last.keys()


def test_an_interrupted_final_evaluation_keeps_the_last_weights(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(settings(model_path), tmp_path / "whole").run()
    broken = trainer(settings(model_path), tmp_path / "broken")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, "_after", stop)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_a_run_that_trains_nothing_stops_and_says_so(model_path: Path, tmp_path: Path) -> None:
    config = settings(model_path, mode="env_only", teacher={"observation": False}, updates=9)
    assert "nothing was trained" in trainer(config, tmp_path).run()["stopped"]


class Souring(ShopEnv):
    """A shop in which everybody succeeds at once, but only until training has begun: for the
    episodes of the probe and those of the first evaluation."""

    episodes = 0

    def reset(self, task_id: str) -> Any:
        Souring.episodes += 1
        return super().reset(task_id)

    def step(self, text: str) -> Any:
        observation, reward, _, truncated, info = super().step(text)
        return observation, reward, True, truncated, info | {"success": Souring.episodes <= 8}


@pytest.mark.parametrize("weights_of_teacher", ["ema", "frozen", "live"])
def test_a_collapse_goes_back_to_the_best_weights_at_half_the_rate(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_of_teacher: str
) -> None:
    def run(folder: str, updates: int, resume: str = "never") -> dict[str, Any]:
        config = settings(
            model_path, updates=updates, resume=resume, teacher={"weights": weights_of_teacher},
            eval={"every": 1, "rescues": 2}, optim={"warmup_steps": 0},
        )  # fmt: skip
        config.env.name = f"{__name__}:Souring"
        return trainer(config, tmp_path / folder).run()

    monkeypatch.setattr(Souring, "episodes", 0)
    summary = run("whole", 9)
    assert summary["stopped"].startswith("collapse: dev success was more than 0.30 below its best")
    assert (summary["best_update"], summary["rescues"]) == (0, 2)
    lines = read_jsonl(tmp_path / "whole" / "metrics.jsonl")[1:]
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])

    monkeypatch.setattr(Souring, "episodes", 0)
    for updates in (2, 3, 9):  # parts that end with a rescue, and after one
        run("parts", updates, resume="never" if updates == 2 else str(tmp_path / "parts"))
        if updates == 2:
            best = load_file(tmp_path / "parts" / "best" / "model.safetensors")
            saved = weights(tmp_path / "parts")
            assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_the_gate_stops_a_teacher_without_lift(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherGate, match="nothing to distil"):
        trainer(settings(model_path, eval={"min_teacher_lift": 0.5}), tmp_path).run()
