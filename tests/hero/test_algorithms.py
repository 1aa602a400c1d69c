"""What each mode trains and what its teacher sees, against the table of modes in docs/method.md."""

from __future__ import annotations

import math

import pytest

from hero.algorithms import MODES, Episodes, make_algorithm
from hero.algorithms.grpo import group_advantages
from hero.teacher import TeacherContext
from hero.types import Diagnosis, Sample, Trajectory


@pytest.fixture
def episodes(played: list[Trajectory], hints: list[list[Diagnosis]]) -> Episodes:
    return Episodes(
        trajectories=played, diagnoses=hints, gold={"task-0": (("gold act", "gold seen"),)}
    )


def annotate(mode: str, context: TeacherContext, episodes: Episodes) -> list[Sample]:
    return make_algorithm(mode, context).annotate(episodes)


def block_text(sample: Sample, context: TeacherContext) -> str:
    return context.renderer.decode(sample.block_ids)


def turns(samples: list[Sample]) -> list[tuple[int, int]]:
    return [(s.trajectory, s.turn) for s in samples]


def test_hero_trains_the_turns_with_a_hint(context: TeacherContext, episodes: Episodes) -> None:
    samples = annotate("hero", context, episodes)
    assert turns(samples) == [(t, k) for t in range(4) for k in (0, 2)]
    text = block_text(samples[1], context)
    assert "seen 2" in text and "stop here" in text and "0.00" in text


def test_reflection_only_hides_observation_and_reward(
    context: TeacherContext, episodes: Episodes
) -> None:
    samples = annotate("reflection_only", context, episodes)
    text = block_text(samples[0], context)
    assert len(samples) == 8 and "look first" in text
    assert "seen" not in text and "reward" not in text


def test_env_only_hides_the_diagnosis_and_keeps_all_turns(
    context: TeacherContext, episodes: Episodes
) -> None:
    samples = annotate("env_only", context, episodes)
    assert len(samples) == 12
    assert "seen 0" in block_text(samples[0], context)
    assert "look first" not in block_text(samples[0], context)


def test_terminal_sees_only_the_outcome(context: TeacherContext, episodes: Episodes) -> None:
    samples = annotate("terminal", context, episodes)
    assert len(samples) == 12
    assert "failed in the end" in block_text(samples[0], context)
    assert "succeeded in the end" in block_text(samples[3], context)
    assert "seen" not in block_text(samples[0], context)


def test_full_demo_shows_a_sibling_or_the_gold_episode(
    context: TeacherContext, episodes: Episodes
) -> None:
    samples = annotate("full_demo", context, episodes)
    # Episode 0 has the successful sibling 1; 1 has none but gold; 2 has sibling 3; 3 has nothing.
    assert {s.trajectory for s in samples} == {0, 1, 2}
    sibling = episodes.trajectories[1].turns[0].action_text
    assert sibling in block_text(samples[0], context)
    assert "gold act" in block_text(next(s for s in samples if s.trajectory == 1), context)


def test_sdpo_trains_failed_episodes(context: TeacherContext, episodes: Episodes) -> None:
    samples = annotate("sdpo", context, episodes)
    assert {s.trajectory for s in samples} == {0, 2}
    assert "succeeded" in block_text(samples[0], context)  # the sibling's episode


def test_grpo_has_no_teacher(context: TeacherContext, episodes: Episodes) -> None:
    samples = annotate("grpo", context, episodes)
    assert len(samples) == 12
    assert all(s.distill_weight == 0 and not s.block_ids and s.policy_weight == 1 for s in samples)
    assert [s.advantage for s in samples[::3]] == pytest.approx([-1, 1, -1, 1])


def test_hero_grpo_is_both(context: TeacherContext, episodes: Episodes) -> None:
    samples = annotate("hero+grpo", context, episodes)
    assert len(samples) == 12 and all(s.policy_weight for s in samples)
    assert turns([s for s in samples if s.distill_weight]) == turns(
        annotate("hero", context, episodes)
    )


def test_advantages_by_hand_and_zero_without_variance(played: list[Trajectory]) -> None:
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


def test_an_empty_hint_masks_every_turn(context: TeacherContext, played: list[Trajectory]) -> None:
    none = [[Diagnosis(turn=k) for k in range(3)] for _ in played]
    episodes = Episodes(trajectories=played, diagnoses=none, gold={})
    assert annotate("hero", context, episodes) == []


def test_every_mode_is_there(context: TeacherContext) -> None:
    assert len(MODES) == 8
    with pytest.raises(ValueError, match="Unknown mode 'ppo'"):
        make_algorithm("ppo", context)
