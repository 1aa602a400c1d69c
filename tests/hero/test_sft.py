"""What a warm start teaches. Oracle: diagnoses and right actions written by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from hero.checks import from_dict
from hero.config import SftConfig
from hero.envs.shop import ShopEnv
from hero.prompts import make_prompts
from hero.renderer import Renderer
from hero.scratch import build_tokenizer
from hero.sft import blank_samples, hindsight_samples, make_targets
from hero.types import Diagnosis, Trajectory

Episode = Callable[..., Trajectory]


def taught(
    renderer: Renderer, trajectory: Trajectory, diagnosis: Diagnosis, oracle: str
) -> set[str]:
    """The targets of a one-turn episode (its action is "act"), over many draws."""
    samples = [
        sample
        for seed in range(40)
        for sample in hindsight_samples(
            trajectory, [diagnosis], [oracle], (), make_prompts("standard"), renderer,
            random.Random(seed),
        )
    ]  # fmt: skip
    return {renderer.decode(sample.action_ids) for sample in samples}


@pytest.mark.parametrize(
    ("diagnosis", "oracle", "expected"),
    [
        (Diagnosis(turn=0, hint="look"), "go", {"go"}),
        (Diagnosis(turn=0, hint="look", corrected_action="stay"), "go", {"stay"}),
        (Diagnosis(turn=0, hint="look"), "", set()),  # nobody knows better
        (Diagnosis(turn=0, hint="look"), "act", set()),  # the oracle contradicts the hint
        (Diagnosis(turn=0, hint="look", corrected_action="act "), "go", set()),
        (Diagnosis(turn=0, source="rules"), "go", {"act"}),  # a good turn, by another way
        (Diagnosis(turn=0, valid=False), "go", set()),  # faulty, though without a hint
        (Diagnosis(turn=0, necessary=False), "go", set()),
        (Diagnosis(turn=0, failure_cause="too early"), "go", set()),
    ],
)
def test_the_wrong_action_is_never_taught(
    renderer: Renderer, episode: Episode, diagnosis: Diagnosis, oracle: str, expected: set[str]
) -> None:
    assert taught(renderer, episode(["s"]), diagnosis, oracle) == expected


def test_behind_a_blank_context_the_demonstrator_acts_as_ever(
    renderer: Renderer, episode: Episode
) -> None:
    trajectory, prompts = episode(["s"] * 200), make_prompts("compact")
    samples = blank_samples(trajectory, 0.3, prompts, renderer, random.Random(0))
    assert 40 < len(samples) < 80
    assert {renderer.decode(s.action_ids) for s in samples} == {
        "act" + renderer.decode([renderer.end_id])
    }
    assert {renderer.decode(s.privileged_ids) for s in samples} == {" | again"}
    assert blank_samples(trajectory, 0.0, prompts, renderer, random.Random(0)) == []


class Silent(ShopEnv):
    """A shop whose rules find faults and correct none."""

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        return [replace(found, corrected_action="") for found in super().diagnose(trajectory)]


def test_without_corrected_actions_the_same_actions_are_taught() -> None:
    renderer = Renderer(build_tokenizer(ShopEnv("tiny").vocabulary()))
    config = from_dict(
        {"prompts": "compact", "demonstrator_episodes": 15, "coverage_episodes": 15}, SftConfig
    )
    told, silent = (
        [
            [renderer.decode(sample.action_ids) for sample in samples]
            for samples in make_targets(config, env, renderer, lambda done, of: None)["hindsight"]
        ]
        for env in (ShopEnv("tiny"), Silent("tiny"))
    )
    assert told == silent and len(told) > 10
