"""What each mode trains and what its teacher sees, against the table of modes in docs/method.md."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest

from hero.algorithms import MODES, Experience
from hero.algorithms.grpo import group_advantages
from hero.checks import check, from_dict
from hero.config import LossConfig, TeacherConfig
from hero.teacher import TeacherContext
from hero.types import Diagnosis, Sample, Trajectory


@pytest.fixture
def experience(played: list[Trajectory], hints: list[list[Diagnosis]]) -> Experience:
    return Experience(
        trajectories=played, diagnoses=hints, gold={"task-0": (("gold act", "gold seen"),)}
    )


def annotate(mode: str, context: TeacherContext, experience: Experience) -> list[Sample]:
    return MODES[mode](context, LossConfig(turns="hinted")).annotate(experience)


def hindsight_text(sample: Sample, context: TeacherContext) -> str:
    return context.renderer.decode(sample.privileged_ids)


def turns(samples: list[Sample]) -> list[tuple[int, int]]:
    return [(s.trajectory, s.turn) for s in samples]


def test_hero_trains_the_turns_with_a_hint(context: TeacherContext, experience: Experience) -> None:
    samples = annotate("hero", context, experience)
    assert turns(samples) == [(t, k) for t in range(4) for k in (0, 2)]
    text = hindsight_text(samples[1], context)
    assert "seen 2" in text and "stop here" in text and "0.00" in text


@pytest.mark.parametrize(
    ("look_ahead", "expected"),
    [(1, {0: [0], 2: [2]}), (2, {0: [0, 1], 2: [2]}), (8, {0: [0, 1, 2], 2: [2]})],
)
def test_look_ahead_shows_what_came_later(
    context: TeacherContext, experience: Experience, look_ahead: int, expected: dict[int, list[int]]
) -> None:
    """Of an episode of three turns, no further than its end."""
    for shown in (True, False):
        config = TeacherConfig(look_ahead=look_ahead, observation=shown)
        far = TeacherContext(config, context.renderer, context.prompts)
        found = {}
        for sample in annotate("hero", far, experience)[:2]:
            text = hindsight_text(sample, far)
            found[sample.turn] = [k for k in range(3) if f": seen {k}" in text]
        assert found == (expected if shown else {0: [], 2: []})


def test_reflection_only_hides_observation_and_reward(
    context: TeacherContext, experience: Experience
) -> None:
    samples = annotate("reflection_only", context, experience)
    text = hindsight_text(samples[0], context)
    assert len(samples) == 8 and "look first" in text
    assert "seen" not in text and "reward" not in text


def test_env_only_hides_the_diagnosis_and_keeps_all_turns(
    context: TeacherContext, experience: Experience
) -> None:
    samples = annotate("env_only", context, experience)
    assert len(samples) == 12
    assert "seen 0" in hindsight_text(samples[0], context)
    assert "look first" not in hindsight_text(samples[0], context)


def test_terminal_sees_only_the_outcome(context: TeacherContext, experience: Experience) -> None:
    samples = annotate("terminal", context, experience)
    assert len(samples) == 12
    assert "failed in the end" in hindsight_text(samples[0], context)
    assert "succeeded in the end" in hindsight_text(samples[3], context)
    assert "seen" not in hindsight_text(samples[0], context)


def test_full_demo_shows_a_sibling_or_the_gold_episode(
    context: TeacherContext, experience: Experience
) -> None:
    samples = annotate("full_demo", context, experience)
    # Episode 0 has the successful sibling 1; 1 has none but gold; 2 has sibling 3; 3 has nothing.
    assert {s.trajectory for s in samples} == {0, 1, 2}
    sibling = experience.trajectories[1].turns[0].action_text
    assert sibling in hindsight_text(samples[0], context)
    assert "gold act" in hindsight_text(next(s for s in samples if s.trajectory == 1), context)


def test_sdpo_trains_failed_episodes(context: TeacherContext, experience: Experience) -> None:
    samples = annotate("sdpo", context, experience)
    assert {s.trajectory for s in samples} == {0, 2}
    assert "succeeded" in hindsight_text(samples[0], context)  # the sibling's episode


def test_grpo_has_no_teacher(context: TeacherContext, experience: Experience) -> None:
    samples = annotate("grpo", context, experience)
    assert len(samples) == 12
    assert all(s.distill_weight == 0 and not s.privileged_ids and s.pg_weight == 1 for s in samples)
    assert [s.advantage for s in samples[::3]] == pytest.approx([-1, 1, -1, 1])


def test_hero_grpo_is_both(context: TeacherContext, experience: Experience) -> None:
    samples = annotate("hero+grpo", context, experience)
    assert len(samples) == 12 and all(s.pg_weight for s in samples)
    assert turns([s for s in samples if s.distill_weight]) == turns(
        annotate("hero", context, experience)
    )


def test_the_weight_of_grpo_beside_hero(context: TeacherContext, experience: Experience) -> None:
    samples = MODES["hero+grpo"](context, LossConfig(pg_weight=0.25)).annotate(experience)
    assert [s.advantage for s in samples[::3]] == pytest.approx([-0.25, 0.25, -0.25, 0.25])
    assert all(s.pg_weight == 1 for s in samples)  # a weight of all turns would cancel in the mean


def test_advantages_by_hand_and_zero_without_variance(played: list[Trajectory]) -> None:
    played = copy.deepcopy(played)
    rewards = [0.0, 1.0, 1.0, 0.5]
    for trajectory, reward in zip(played, rewards, strict=True):
        trajectory.group_id = "one"
        trajectory.reward = reward
    mean = 0.625
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 4)
    assert group_advantages(played) == pytest.approx([(r - mean) / std for r in rewards])
    for trajectory in played:
        trajectory.reward = 0.7
    assert group_advantages(played) == [0.0] * 4


def paid(played: list[Trajectory]) -> list[Trajectory]:
    """Rewards 0, 1 in the first group and 0.5, 1 in the second."""
    played = copy.deepcopy(played)
    for trajectory, reward in zip(played, [0.0, 1.0, 0.5, 1.0], strict=True):
        trajectory.reward = reward
    return played


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("reinforce", [-0.625, 0.375, -0.125, 0.375]), ("rloo", [-1.0, 1.0, -0.5, 0.5])],
)
def test_baselines_by_hand(
    context: TeacherContext, played: list[Trajectory], mode: str, expected: list[float]
) -> None:
    samples = annotate(
        mode, context, Experience(trajectories=paid(played), diagnoses=[[]] * 4, gold={})
    )
    assert len(samples) == 12 and all(s.pg_weight == 1 and not s.distill_weight for s in samples)
    assert [s.advantage for s in samples[::3]] == pytest.approx(expected)


def test_rloo_takes_the_mean_of_the_others_only(
    context: TeacherContext, played: list[Trajectory]
) -> None:
    trajectories = paid(played)
    for trajectory in trajectories:
        trajectory.group_id = "one"
    samples = annotate(
        "rloo", context, Experience(trajectories=trajectories, diagnoses=[], gold={})
    )
    expected = [0.0 - 2.5 / 3, 1.0 - 1.5 / 3, 0.5 - 2.0 / 3, 1.0 - 1.5 / 3]
    assert [s.advantage for s in samples[::3]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "tasks", "group", "remedy"),
    [
        ("rloo", 8, 1, "--rollout.group-size 8"),
        ("reinforce", 1, 1, "--rollout.tasks-per-update"),
        ("reinforce", 8, 1, None),
        ("reinforce", 1, 2, None),
        ("rloo", 1, 2, None),
    ],
)
def test_what_a_baseline_needs_to_compare(
    mode: str, tasks: int, group: int, remedy: str | None
) -> None:
    config = from_dict({"mode": mode, "rollout": {"tasks_per_update": tasks, "group_size": group}})
    with pytest.raises(ValueError, match=remedy) if remedy else nullcontext():
        check(config)


def test_an_empty_hint_masks_every_turn(context: TeacherContext, played: list[Trajectory]) -> None:
    none = [[Diagnosis(turn=k) for k in range(3)] for _ in played]
    experience = Experience(trajectories=played, diagnoses=none, gold={})
    assert annotate("hero", context, experience) == []


def test_unknown_mode_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of hero, .*rloo.*; got 'heros'"):
        check(from_dict({"mode": "heros"}))
