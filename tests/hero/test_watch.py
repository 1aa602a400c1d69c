"""Teacher and reflector during a run: refresh, agreement, lift, the end of what can be learnt.

Oracles: bounds and shares worked out by hand, the weights that a run saves.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import settings, trainer

from hero.checks import check, from_dict
from hero.config import TrainConfig
from hero.envs.shop import ShopEnv
from hero.evaluation import consistency
from hero.gate import gate_opens
from hero.reflection import Reflections
from hero.report.console import Console
from hero.report.tracking import read_jsonl
from hero.state import State
from hero.trainer import Trainer
from hero.types import Diagnosis


def evaluation(success: float, turns: float = 4.0, tokens: float = 6.0) -> dict[str, float]:
    return {
        "dev/success": success, "dev/turns": turns, "dev/turn_tokens": tokens,
        "dev/episodes": 100.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("then", "now", "opens"),
    [
        # sqrt(.3137 * .6863 + .4118 * .5882) / 10 = .0676, times 1.645 = .1112
        (evaluation(0.31), evaluation(0.42), False),
        (evaluation(0.31), evaluation(0.43), True),
        (evaluation(0.0), evaluation(0.02), False),
        # sqrt(.0098 * .9902 + .0392 * .9608) / 10 = .0217, times 1.645 = .0357
        (evaluation(0.0), evaluation(0.04), True),
        (evaluation(0.5), evaluation(0.3), False),
        (evaluation(0.3), evaluation(0.6, turns=6.1), False),
        (evaluation(0.3), evaluation(0.6, turns=5.9), True),
        (evaluation(0.3), evaluation(0.6, tokens=9.1), False),
    ],
)
def test_the_gate_opens_for_success_beyond_noise_at_bounded_length(
    then: dict[str, float], now: dict[str, float], opens: bool
) -> None:
    assert gate_opens(now, then) == opens


def watched(state: State, config: TrainConfig, success: float, **more: float) -> bool:
    metrics = {f"agreement/{k}" if k != "hints" else "reflection/non_empty_rate": v
               for k, v in more.items()}  # fmt: skip
    return state.watch(evaluation(success) | metrics, config)


def test_a_refresh_is_measured_from_the_last_one() -> None:
    config = from_dict({"teacher": {"refresh": "gated", "weights": "frozen"}})
    state = State()
    rising = [0.1, 0.15, 0.3, 0.35, 0.5, 0.5]
    assert [watched(state, config, p) for p in rising] == [False, False, True, False, True, False]
    assert state.refreshes == 2 and state.at_refresh["dev/success"] == 0.5


def test_a_blind_reflector_ends_the_run_unless_its_teacher_is_refreshed() -> None:
    config = from_dict(
        {
            "reflection": {"min_agreement": 0.5},
            "teacher": {"refresh": "gated", "weights": "frozen"},
        }
    )
    state = State()
    watched(state, config, 0.1)
    watched(state, config, 0.1, recall=0.6)
    assert not state.finished(config)
    assert watched(state, config, 0.4, recall=0.4)  # refreshed
    assert not state.finished(config)
    watched(state, config, 0.4, recall=0.4)
    assert state.finished(config)
    assert "with the rules on 40% of the faults, less than reflection.min_agreement=0.5" in (
        state.stopped
    )
    watched(state, config, 0.4, consistency=0.3)
    assert state.finished(config) and "agrees with itself on 30%" in state.stopped
    watched(state, config, 0.4, consistency=0.7)
    assert not state.finished(config)


def test_a_run_ends_when_nothing_is_left_to_learn() -> None:
    config, state = TrainConfig(), State()
    for success, hints in [(1.0, 0.0), (1.0, 0.0), (1.0, 0.01), (0.99, 0.0), (1.0, 0.0)]:
        watched(state, config, success, hints=hints)
        assert not state.finished(config)
    watched(state, config, 1.0, hints=0.0)
    assert state.finished(config) and "nothing is left to learn" in state.stopped


def test_consistency_by_hand() -> None:
    def row(*hinted: int) -> list[Diagnosis]:
        return [Diagnosis(turn=k, hint="no" if k in hinted else "") for k in range(4)]

    assert consistency([row(0, 1), row(3)], [row(1, 2), row(3)]) == {"agreement/consistency": 2 / 4}
    assert consistency([row()], [row()]) == {}


class Ripening(ShopEnv):
    """A shop in which nobody succeeds in the first 40 episodes: the probe, the first evaluation."""

    episodes = 0

    def reset(self, task_id: str) -> Any:
        Ripening.episodes += 1
        return super().reset(task_id)

    def step(self, text: str) -> Any:
        observation, reward, _, truncated, info = super().step(text)
        return observation, reward, True, truncated, info | {"success": Ripening.episodes > 40}


def test_a_teacher_is_refreshed_from_the_student(
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Ripening, "episodes", 0)
    config = settings(
        model_path, updates=3, teacher={"weights": "frozen", "refresh": "gated"},
        eval={"every": 1, "dev_tasks": 20, "test_tasks": 0}, optim={"warmup_steps": 0},
    )  # fmt: skip
    config.env.name = f"{__name__}:Ripening"
    kept: list[dict[str, torch.Tensor]] = []
    run: Trainer

    def keep(*_: Any) -> None:
        kept.append({n: p.detach().clone() for n, p in run.policy.trainable().items()})

    run = Trainer(config, tmp_path, callbacks=[keep])
    summary = run.run()
    assert summary["refreshes"] == 1
    refreshes = [line["teacher/refreshes"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert refreshes == [0, 1, 1, 1]
    teacher = load_file(tmp_path / "checkpoint" / "teacher.safetensors")
    assert all(torch.equal(teacher[name], kept[0][name]) for name in teacher)
    assert any(not torch.equal(teacher[name], kept[-1][name]) for name in teacher)


class Mute:
    """The shop without rules."""

    system_prompt = ""

    def __init__(self, **options: Any) -> None:
        self.shop = ShopEnv(**options)

    def tasks(self, split: str) -> list[str]:
        return self.shop.tasks(split)

    def reset(self, task_id: str) -> Any:
        return self.shop.reset(task_id)

    def step(self, text: str) -> Any:
        return self.shop.step(text)

    def close(self) -> None: ...


def test_without_rules_a_reflector_is_compared_with_itself(
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reflection = {"reflector": "self", "max_tokens": 20, "min_agreement": 0.9}
    config = settings(model_path, reflection=reflection, eval={"every": 1, "test_tasks": 0})
    config.env.name = f"{__name__}:Mute"
    run = trainer(config, tmp_path)
    seeds = []

    def reflect(trajectories: Any, seed: int) -> Any:
        """Finds fault with the first turn, and every other time with the second one too."""
        seeds.append(seed)
        read = Reflections.none(trajectories)
        rows = [
            [Diagnosis(turn=k, hint="no" if k == 0 or (k == 1 and len(seeds) % 2) else "")
             for k in range(len(t.turns))] for t in trajectories
        ]  # fmt: skip
        return Reflections(diagnoses=rows, stats=read.stats)

    monkeypatch.setattr(run.stages.reflector, "reflect", reflect)
    assert "agrees with itself on 50%" in run.run()["stopped"]
    assert len(set(seeds)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reflection": {"reflector": "self", "max_tokens": 20, "temperature": 0.0,
                         "min_agreement": 0.5}}, "at temperature 0 they are the same"),
        ({"mode": "reinforce", "reflection": {"min_agreement": 0.5}}, "needs a reflector"),
        ({"mode": "env_only", "eval": {"watch_teacher": True}}, "eval.watch_teacher needs"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_refused(
    model_path: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    config = settings(model_path, **changes)
    config.env.name = f"{__name__}:Mute"
    with pytest.raises(ValueError, match=message):
        trainer(config, tmp_path)


@pytest.mark.parametrize("teacher", [{"weights": "ema"}, {"weights": "frozen", "path": "other"}])
def test_only_a_frozen_copy_can_be_refreshed(teacher: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"expected --teacher\.weights frozen and no --t"):
        check(from_dict({"teacher": {**teacher, "refresh": "gated"}}))


def test_clean_turns_do_not_dilute_the_lift(model_path: Path, tmp_path: Path) -> None:
    """They are right without hindsight: only turns with a hint are probed, whatever is trained."""
    found = []
    for turns in ("hinted", "all"):
        loss = {"turns": turns, "kl_to_start": 0.1}
        config = settings(model_path, loss=loss, updates=1, eval={"test_tasks": 0})
        trainer(config, tmp_path / turns).run()
        first = read_jsonl(tmp_path / turns / "metrics.jsonl")[0]
        found.append({name: x for name, x in first.items() if name.startswith("probe/")})
    assert found[0] == found[1] and found[0]["probe/turns"] > 0


def test_the_lift_is_measured_at_every_evaluation(
    model_path: Path,
    tmp_path: Path,
) -> None:
    config = settings(model_path, eval={"every": 2, "watch_teacher": True, "test_tasks": 0})
    trainer(config, tmp_path).run()
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert ["probe/teacher_lift" in line for line in lines] == [True, False, True, False, True]


def test_a_reflector_that_writes_nothing_readable_ends_the_run(
    model_path: Path, tmp_path: Path
) -> None:
    """A random model reflects: every turn has an observation to learn from, and none a hint."""
    said = io.StringIO()
    reflection = {"reflector": "self", "max_tokens": 8, "retries": 0}
    config = settings(model_path, reflection=reflection, max_idle_updates=2)
    summary = Trainer(config, tmp_path, "test", Console(said)).run()
    last = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == 2 and last["optim/steps"] == 1 and last["reflection/read_rate"] == 0
    assert "no reflection could be read" in summary["stopped"]
    assert said.getvalue().count("  no reflection could be read") == 2
