"""Who reflects: model, teacher, rules; and the shuffle control.

Only the language model is replaced, by scripted answers. Results and counts are written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from hero.config import ReflectionConfig
from hero.prompts import StandardPrompts
from hero.reflection import (
    ModelReflector,
    ShuffledReflector,
    make_reflector,
    shuffle_hints,
)
from hero.reflection.models import OwnModel
from hero.renderer import Renderer
from hero.sampler import Completion, Sampling
from hero.types import Diagnosis, Trajectory

BARE = '{"turn": 1, "hint": "h"}'
Episode = Callable[..., Trajectory]


class ScriptedModel:
    """A language model that answers by rote: `script(prompt text, number of the call)`."""

    def __init__(self, renderer: Renderer, script: Callable[[str, int], str]) -> None:
        self.renderer = renderer
        self.script = script
        self.calls: list[tuple[list[str], Sampling]] = []

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        texts = [self.renderer.decode(prompt) for prompt in prompts]
        self.calls.append((texts, sampling))
        answers = [self.script(text, len(self.calls)) for text in texts]
        ids = [[*self.renderer.encode(answer), self.renderer.end_id] for answer in answers]
        return [Completion(ids=i, logprobs=[-1.0] * len(i)) for i in ids]


def model_reflector(
    model: ScriptedModel, config: ReflectionConfig, **options: Any
) -> ModelReflector:
    own = OwnModel(model, model.renderer, config)
    return ModelReflector(
        own, config, StandardPrompts(), model.renderer, rules="be kind", **options
    )


def test_one_batch_and_a_retry_of_the_unreadable_only(renderer: Renderer, episode: Episode) -> None:
    def script(prompt: str, call: int) -> str:
        if "lamp" in prompt:
            return BARE
        return "no idea" if "chair" in prompt or call == 1 else '{"turn": 2, "hint": "late"}'

    model = ScriptedModel(renderer, script)
    trajectories = [
        episode(["s", "s"], instruction="buy a lamp"),
        episode(["s", "s"], instruction="buy a sofa"),
        episode([]),
        episode(["s"], instruction="buy a chair"),
    ]
    config = ReflectionConfig(temperature=0.5, max_tokens=33, retries=1)
    reflections = model_reflector(model, config).reflect(trajectories, seed=5)

    assert [[d.hint for d in of_turns] for of_turns in reflections.diagnoses] == [
        ["h", ""],
        ["", "late"],
        [],
        [""],
    ]
    assert [[d.source for d in of_turns] for of_turns in reflections.diagnoses] == [
        ["self", ""],
        ["", "self"],
        [],
        [""],
    ]
    (first, first_sampling), (second, second_sampling) = model.calls
    assert ["buy a lamp" in t for t in first] == [True, False, False]
    assert ["buy a sofa" in t for t in second] == [True, False]
    assert "Action: act\nThen observed: obs 1" in first[0]
    assert "be kind" in first[0]
    assert first_sampling == Sampling(max_tokens=33, seed=5, temperature=0.5)
    assert second_sampling.seed != first_sampling.seed
    stats = reflections.stats
    assert (stats.turns, stats.parsed, stats.non_empty, stats.retried) == (5, 2, 2, 2)
    words = [BARE, "no idea", "no idea", '{"turn": 2, "hint": "late"}', "no idea"]
    assert stats.generated_tokens == sum(len(word) + 1 for word in words)


def test_who_finds_no_fault_is_not_asked_again(renderer: Renderer, episode: Episode) -> None:
    model = ScriptedModel(renderer, lambda prompt, call: '{"turn": 0}' if call == 1 else BARE)
    stats = model_reflector(model, ReflectionConfig()).reflect([episode(["s", "s"])], 0).stats
    assert len(model.calls) == 1
    assert (stats.asked, stats.read, stats.parsed, stats.retried) == (1, 1, 0, 0)
    assert stats.metrics()["reflection/read_rate"] == 1


def test_perfect_episodes_can_be_left_out(renderer: Renderer, episode: Episode) -> None:
    model = ScriptedModel(renderer, lambda prompt, call: BARE)
    perfect, low, failed, refused = (episode(["s"], instruction=name) for name in "abcd")
    for trajectory, success, reward in ((perfect, True, 1.0), (low, True, 0.9), (refused, True, 1)):
        trajectory.success, trajectory.reward = success, reward
    refused.turns[0].is_error = True
    config = ReflectionConfig(episodes="imperfect")
    found = model_reflector(model, config).reflect([perfect, low, failed, refused], seed=0)
    assert [row[0].hint for row in found.diagnoses] == ["", "h", "h", "h"]
    assert found.stats.asked == found.stats.read == 3


@pytest.mark.parametrize(
    ("temperature", "retries", "calls"), [(0.7, 0, 1), (0.7, 2, 3), (0.0, 2, 1)]
)
def test_number_of_calls(
    renderer: Renderer, episode: Episode, temperature: float, retries: int, calls: int
) -> None:
    model = ScriptedModel(renderer, lambda prompt, call: "?")
    config = ReflectionConfig(temperature=temperature, retries=retries)
    stats = model_reflector(model, config).reflect([episode(["s"])], seed=0).stats
    assert len(model.calls) == calls
    assert (stats.parsed, stats.retried) == (0, calls - 1)


def test_nothing_to_read_asks_nothing(renderer: Renderer) -> None:
    model = ScriptedModel(renderer, lambda prompt, call: "?")
    assert model_reflector(model, ReflectionConfig()).reflect([], seed=0).diagnoses == []
    assert model.calls == []


def test_long_episodes_are_shortened_until_they_fit(renderer: Renderer, episode: Episode) -> None:
    model = ScriptedModel(renderer, lambda prompt, call: BARE)
    trajectory = episode(["s"])
    trajectory.turns[0].observation = "H" * 1000 + "T" * 1000
    config = ReflectionConfig(max_observation_tokens=900)
    model_reflector(model, config).reflect([trajectory], seed=0)
    free = model.calls[-1][0][0]
    assert free.count("H" * 10) == 60  # two thirds of the limit
    assert free.count("T" * 10) == 30  # one third

    frame = len(renderer.start([{"role": "user", "content": ""}]))
    room = frame + len(free.removeprefix("user\n").removesuffix("\nassistant\n")) - 1
    model_reflector(model, config, max_prompt_tokens=room).reflect([trajectory], seed=0)
    tight = model.calls[-1][0][0]
    assert (tight.count("H" * 10), tight.count("T" * 10)) == (30, 15)  # halved once

    with pytest.raises(ValueError, match="at most 50 fit"):
        model_reflector(model, config, max_prompt_tokens=50).reflect([trajectory], seed=0)


def test_the_teachers_weights_are_in_place_while_it_writes(
    renderer: Renderer, episode: Episode
) -> None:
    state = {"weights": "student"}
    seen: list[str] = []

    @contextmanager
    def teacher() -> Iterator[None]:
        state["weights"] = "teacher"
        yield
        state["weights"] = "student"

    def script(prompt: str, call: int) -> str:
        seen.append(state["weights"])
        return BARE

    for name in ("self", "teacher"):
        reflector = make_reflector(
            ReflectionConfig(reflector=name),  # type: ignore[arg-type]
            env=QuietEnv(),
            sampler=ScriptedModel(renderer, script),
            renderer=renderer,
            prompts=StandardPrompts(),
            teacher_weights=teacher,
            context=10**6,
        )
        assert reflector.reflect([episode(["s"])], seed=0).diagnoses[0][0].source == name
    assert seen == ["student", "teacher"]
    assert state["weights"] == "student"


# --- rules --------------------------------------------------------------------------------------


class QuietEnv:
    """An environment that cannot diagnose; nothing here steps it."""

    system_prompt = "be kind"

    def tasks(self, split: str) -> list[str]:
        return []

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        raise KeyError(task_id)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        raise KeyError(text)

    def close(self) -> None: ...


class TalkingEnv(QuietEnv):
    """An environment whose rule is that every turn but the last should have been the last."""

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        last = trajectory.turns[-1]
        return [
            Diagnosis(turn=k, hint=f"stop {trajectory.task_id}" if turn is not last else "")
            for k, turn in enumerate(trajectory.turns)
        ]


def rules(env: QuietEnv, renderer: Renderer, *, shuffle: bool = False) -> Any:
    return make_reflector(
        ReflectionConfig(reflector="rules", shuffle_hints="tasks" if shuffle else "off"),
        env=env,
        sampler=ScriptedModel(renderer, lambda prompt, call: ""),
        renderer=renderer,
        prompts=StandardPrompts(),
        teacher_weights=lambda: pytest.fail("rules need no weights"),
        context=10**6,
    )


def test_rules_of_the_environment(renderer: Renderer, episode: Episode) -> None:
    trajectories = [episode(["s"] * n, task=t) for n, t in [(3, "a"), (1, "b")]]
    reflections = rules(TalkingEnv(), renderer).reflect(trajectories, seed=0)
    assert [[d.hint for d in ds] for ds in reflections.diagnoses] == [
        ["stop a", "stop a", ""],
        [""],
    ]
    assert (reflections.stats.non_empty, reflections.stats.turns) == (2, 4)


def test_an_environment_without_rules_is_told_what_to_do(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match=r"QuietEnv has none.*reflection\.reflector self"):
        rules(QuietEnv(), renderer)


# --- shuffled hints -----------------------------------------------------------------------------


def test_shuffled_hints_come_from_other_tasks_and_stay_in_place(episode: Episode) -> None:
    trajectories = [episode(["s"] * 3, task=task) for task in "aabc"]
    diagnoses = [
        [Diagnosis(turn=k, hint=f"{t.task_id} {i} {k}" if (i + k) % 2 else "") for k in range(3)]
        for i, t in enumerate(trajectories)
    ]
    before = [[replace(d) for d in ds] for ds in diagnoses]
    shuffled = shuffle_hints(diagnoses, trajectories, seed=3)
    assert diagnoses == before
    donors = {d.hint for ds in diagnoses for d in ds}
    for trajectory, old, new in zip(trajectories, diagnoses, shuffled, strict=True):
        assert [d.turn for d in new] == [0, 1, 2]
        assert [bool(d.hint) for d in new] == [bool(d.hint) for d in old]
        assert {d.hint for d in new} <= donors
        assert not any(d.hint.startswith(trajectory.task_id) for d in new)
    assert shuffled == shuffle_hints(diagnoses, trajectories, seed=3)
    assert any(shuffled != shuffle_hints(diagnoses, trajectories, seed=s) for s in range(4, 8))


def test_shuffling_never_falls_back_to_the_right_hint(episode: Episode) -> None:
    lonely = [episode(["s"], task="a"), episode(["s"], task="a")]
    hint = [[Diagnosis(turn=0, hint="right")], [Diagnosis(turn=0)]]
    for kind in ("tasks", "causes", "unrelated"):  # the last batch of a budget may have one task
        assert shuffle_hints(hint, lonely, 0, kind) == [[Diagnosis(turn=0)], [Diagnosis(turn=0)]]
    lonely[1].task_id = "b"  # another task, but without a hint to give
    assert shuffle_hints(hint, lonely, seed=0) == [[Diagnosis(turn=0)], [Diagnosis(turn=0)]]


@pytest.mark.parametrize(
    ("kind", "taken"),
    [("tasks", {"late", "loop"}), ("causes", {"loop"}), ("unrelated", {"buy b", "buy c"})],
)
def test_controls_take_the_right_from_the_wrong(
    episode: Episode, kind: str, taken: set[str]
) -> None:
    trajectories = [episode(["s"], task=task, instruction=f"buy {task}") for task in "abc"]
    told = [("late", "early", "a"), ("late", "early", "b"), ("loop", "stuck", "c")]
    diagnoses = [
        [Diagnosis(turn=0, hint=hint, failure_cause=cause, corrected_action=f"do {task}")]
        for hint, cause, task in told
    ]
    drawn = [shuffle_hints(diagnoses, trajectories, seed, kind)[0][0] for seed in range(20)]
    assert {d.hint for d in drawn} == taken
    assert not any(d.corrected_action == "do a" for d in drawn)
    if kind == "unrelated":
        assert not any(d.corrected_action or d.failure_cause for d in drawn)


def test_no_other_cause_leaves_no_hint(episode: Episode) -> None:
    trajectories = [episode(["s"], task=task) for task in "ab"]
    diagnoses = [[Diagnosis(turn=0, hint="late", failure_cause="early")] for _ in "ab"]
    assert shuffle_hints(diagnoses, trajectories, 0, "causes") == [[Diagnosis(turn=0)]] * 2


def test_the_setting_shuffles(renderer: Renderer, episode: Episode) -> None:
    reflector = rules(TalkingEnv(), renderer, shuffle=True)
    assert isinstance(reflector, ShuffledReflector)
    trajectories = [episode(["s", "s"], task=task) for task in "ab"]
    reflections = reflector.reflect(trajectories, seed=0)
    assert [[d.hint for d in ds] for ds in reflections.diagnoses] == [
        ["stop b", ""],
        ["stop a", ""],
    ]
