"""Worlds that break their contract. Oracle: the world itself, which knows what it did and where."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from hero.algorithms import MODES, Experience
from hero.config import ReflectionConfig, RolloutConfig
from hero.envs import border
from hero.envs.base import make_env
from hero.envs.border import EnvironmentFault
from hero.episodes import Assignment, rollout
from hero.policy import Policy
from hero.reflection.make import make_reflector
from hero.renderer import Renderer
from hero.report.metrics import update_metrics
from hero.sampler import Completion, HFSampler, Sampling
from hero.text import harmless, shorten
from hero.types import Diagnosis, StopReason, Trajectory

CONFIG = RolloutConfig(max_turns=3, max_turn_tokens=8, max_episode_tokens=400)
Answer = Callable[[], Any]


def leave() -> Any:
    sys.exit(0)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def broken() -> Any:
    raise ValueError("broke")


def unspeakable() -> Any:
    raise Unspeakable


class NeverTooMuch(float):
    """A number whose own comparisons say that all is well."""

    def __abs__(self) -> float:
        return NeverTooMuch(0)

    def __le__(self, other: object) -> bool:
        return True


class World:
    """Two turns and the end; in the task "bad" one method gives what `answer` gives."""

    system_prompt = ""

    def __init__(self, method: str = "", answer: Answer = leave) -> None:
        self.method, self.answer, self.task, self.turn = method, answer, "", 0

    def _or(self, method: str, value: Any) -> Any:
        return self.answer() if (self.method, self.task) == (method, "bad") else value

    def tasks(self, split: str) -> list[str]:
        self.task = "bad"
        return self._or("tasks", [f"{split}-{i}" for i in range(3)])  # type: ignore[no-any-return]

    def reset(self, task_id: str) -> Any:
        self.task, self.turn = task_id, 0
        return self._or("reset", ("start", {"instruction": "go"}))

    def step(self, text: str) -> Any:
        self.turn += 1
        done = self.turn == 2
        return self._or("step", (f"seen {text}", 0.5, done, False, {"success": done}))

    def diagnose(self, trajectory: Trajectory) -> Any:
        self.task = trajectory.task_id
        return self._or("diagnose", [Diagnosis(turn=k) for k in range(len(trajectory.turns))])

    def close(self) -> None: ...


class Talker:
    """Says "act" whatever it is asked."""

    def __init__(self, renderer: Renderer) -> None:
        self.ids = [*renderer.encode("act"), renderer.end_id]

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        return [Completion(ids=self.ids, logprobs=[-1.0] * len(self.ids)) for _ in prompts]


def play(renderer: Renderer, world: World, tasks: Sequence[str]) -> list[Trajectory]:
    assignments = [Assignment(id=f"{i}", group_id="g", task_id=t) for i, t in enumerate(tasks)]
    return rollout(
        assignments, envs=[world], sampler=Talker(renderer), renderer=renderer,  # type: ignore[arg-type]
        config=CONFIG, seed=0,
    )  # fmt: skip


def stepped(observation: Any = "o", reward: Any = 0.0, end: Any = True, **info: Any) -> Answer:
    return lambda: (observation, reward, end, False, info)


BROKEN: list[tuple[str, Answer, str]] = [
    ("step", leave, "SystemExit: 0"),
    ("step", lambda: 1 / 0, "ZeroDivisionError"),
    *((method, lambda: next(iter(())), f"{method} raised StopIteration")
      for method in ("step", "reset")),
    ("step", lambda: (_ for _ in ()).throw(GeneratorExit()), "step raised GeneratorExit"),
    ("step", unspeakable, "Unspeakable"),
    ("step", lambda: None, "got None"),
    ("step", lambda: ("o", 0.0, True, {}), "tuple of length 4"),
    *(
        ("step", stepped(reward=reward), "reward: got")
        for reward in (None, "1", object(), [1.0], 1j, float("nan"), float("-inf"), 1e300,
                       np.float32("nan"), np.ones(2), NeverTooMuch("nan"), 10**5000)
    ),
    ("step", stepped(reward=10**400), "reward: got"),
    *(("step", stepped(observation=o), "expected text") for o in (None, 3, b"bytes", ["o"], {})),
    *(("step", stepped(end=end), "True or False") for end in (None, "no", 2, [])),
    ("step", lambda: ("o", 0.0, True, False, None), "expected a dict"),
    ("step", stepped(success="yes"), r"info\['success'\]"),
    ("step", stepped(feedback_kind="odd"), "expected one of ok"),
    ("step", stepped(feedback_kind=np.ones(2)), "expected one of ok"),
    ("step", stepped(role="system"), "'user' or 'tool'"),
    ("reset", leave, "SystemExit"),
    ("reset", lambda: "start", r"expected \(observation, info\)"),
    ("reset", lambda: ("start", None), "expected a dict"),
    ("reset", lambda: (None, {}), "expected text"),
    ("reset", lambda: ("start", {"instruction": 7}), "expected text"),
    ("reset", lambda: ("x" * 399, {}), "rollout.max_episode_tokens=400"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "answer", "said"), BROKEN)
def test_a_broken_episode_ends_alone(
    renderer: Renderer, method: str, answer: Answer, said: str
) -> None:
    world = World(method, answer)
    good, bad, other = play(renderer, world, ["a", "bad", "b"])
    assert (bad.stop_reason, bad.success, bad.reward) == (StopReason.ENV_ERROR, False, 0.0)
    assert re.search(said, bad.error)
    assert "World, task 'bad'" in bad.error
    if "max_episode_tokens" not in said:
        assert __file__ in bad.error and method in bad.error
    assert [t.stop_reason for t in (good, other)] == [StopReason.DONE] * 2
    assert good.success and other.reward == 1.0


def test_the_line_is_that_of_the_world(renderer: Renderer) -> None:
    _, start = inspect.getsourcelines(broken)
    _, bad = play(renderer, World("step", broken), ["a", "bad"])
    assert bad.error.endswith(f"ValueError: broke. See {__file__}, line {start + 1}.")
    _, start = inspect.getsourcelines(World.step)
    _, bad = play(renderer, World("step", lambda: None), ["a", "bad"])
    assert bad.error.endswith(f"See {__file__}, line {start}.")


def test_a_fault_is_kept_without_its_password(renderer: Renderer) -> None:
    address = "http://me:hunter2@host/v1"

    def refused() -> Any:
        raise ConnectionError(f"{'no ' * 152} answer of {address}")

    for answer in (refused, stepped(observation=[address])):
        _, bad = play(renderer, World("step", answer), ["a", "bad"])
        assert bad.error and "hunter" not in bad.error


def test_what_numbers_worlds_give(renderer: Renderer) -> None:
    for reward in (True, 1, np.float32(1.0), np.int64(1), np.float64(1.0)):
        answer = stepped("o", reward, np.bool_(True), success=np.bool_(True))
        [played] = play(renderer, World("step", answer), ["bad"])
        assert (played.reward, played.success) == (1.0, True)
        assert type(played.reward) is float and type(played.success) is bool


def test_a_batch_of_broken_episodes_stops(renderer: Renderer) -> None:
    with pytest.raises(EnvironmentFault, match=r"All 2 episodes of a batch failed.*SystemExit"):
        play(renderer, World("step"), ["bad", "bad"])


def test_ctrl_c_is_no_fault(renderer: Renderer) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(renderer, World("step", interrupt), ["bad"])


@pytest.mark.parametrize("mode", ["env_only", "grpo", "reinforce", "rloo"])
def test_a_broken_episode_is_not_trained(renderer: Renderer, mode: str, context: Any) -> None:
    played = play(renderer, World("step", stepped(reward=None)), ["a", "bad", "b"])
    played[0].reward = 3.0
    samples = MODES[mode](context).annotate(
        Experience(trajectories=played, diagnoses=[[], [], []], gold={})
    )
    assert {sample.trajectory for sample in samples} == {0, 2}
    if mode != "env_only":  # what is compared are the two that ended: their advantages cancel
        assert samples[0].advantage == -samples[-1].advantage > 0


def test_broken_episodes_are_counted(renderer: Renderer) -> None:
    from hero.learner import Learned

    played = play(renderer, World("step", leave), ["a", "bad", "b"])
    metrics = update_metrics(played, renderer.stop_ids, Learned())
    assert metrics["rollout/env_errors"] == 1
    assert metrics["rewards/mean"] == 1.0


DIAGNOSES: list[Answer] = [
    leave,
    lambda: 1 / 0,
    lambda: None,
    list,
    lambda: [Diagnosis(turn=0)] * 3,
    lambda: [{"turn": 0}, {"turn": 1}],
    lambda: [Diagnosis(turn=0), Diagnosis(turn=2)],
    lambda: [Diagnosis(turn=0), Diagnosis(turn="1")],  # type: ignore[arg-type]
    lambda: [Diagnosis(turn=0), Diagnosis(turn=1, hint=None)],  # type: ignore[arg-type]
    lambda: [Diagnosis(turn=0), Diagnosis(turn=1, valid="no")],  # type: ignore[arg-type]
    lambda: iter([Diagnosis(turn=0), Diagnosis(turn=1)]),
]


@pytest.mark.parametrize("answer", DIAGNOSES)
def test_a_broken_diagnosis_breaks_its_episode(renderer: Renderer, answer: Answer) -> None:
    world = World("diagnose", answer)
    reflector = make_reflector(
        ReflectionConfig(reflector="rules"), env=world, sampler=Talker(renderer),  # type: ignore[arg-type]
        renderer=renderer, prompts=None, teacher_weights=None, context=9,  # type: ignore[arg-type]
    )  # fmt: skip
    played = play(renderer, world, ["a", "bad"])
    reflections = reflector.reflect(played, seed=0)
    assert [t.failed for t in played] == [False, True]
    assert "World, task 'bad', 2 turns" in played[1].error and __file__ in played[1].error
    assert [len(row) for row in reflections.diagnoses] == [2, 2]


@pytest.mark.parametrize(
    "answer",
    [
        leave, list, lambda: None, lambda: "abc", lambda: [1, 2], lambda: ["a", None],
        lambda: ["a", "b", "a"], lambda: [""], lambda: ["a\n"], lambda: ["a\x1b[31m"],
        lambda: ["\ud800"],
        lambda: ["x" * 10_000], lambda: {"a": 1}, lambda: range(3),
    ],
)  # fmt: skip
def test_task_ids_are_checked(answer: Answer) -> None:
    with pytest.raises(EnvironmentFault, match=r"World, split 'dev'.*(expected|SystemExit).*line"):
        border.tasks(World("tasks", answer), "dev")


def test_splits_are_disjoint() -> None:
    assert set(border.disjoint_tasks(World(), ["train", "dev"])) == {"train", "dev"}
    world = World("tasks", lambda: ["same"])
    with pytest.raises(EnvironmentFault, match=r"got 'same'.*disjoint splits, but it is in train"):
        border.disjoint_tasks(world, ["train", "dev"])


def test_worlds_that_cannot_be_made(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaver.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "maker.py").write_text(
        "class Bad:\n    def __init__(self):\n        {}['k']\nclass Poor:\n    pass\n"
    )
    for name, said in [
        ("leaver:World", r"cannot be imported: SystemExit: 0\. See .*leaver\.py, line 2"),
        ("maker:Bad", r"KeyError: 'k'\. See .*maker\.py, line 3"),
        ("maker:Poor", r"missing: system_prompt, tasks, reset, step, close"),
    ]:
        with pytest.raises(ValueError, match=said):
            make_env(name)


def test_long_observations_are_cut_before_they_are_tokenised(renderer: Renderer) -> None:
    seen = []

    class Counting(Renderer):
        def encode(self, text: str) -> list[int]:
            seen.append(len(text))
            return super().encode(text)

    size = 10_000_000
    world = World("step", stepped("a" * size, end=False))
    [played] = play(Counting(renderer.tokenizer), world, ["bad"])
    assert played.stop_reason is StopReason.MAX_TOKENS
    limit = 8 * CONFIG.max_episode_tokens
    assert max(seen) < limit + 100
    assert f"[{size - limit} characters cut]" in (played.turns[0].observation or "")
    assert shorten("abcdef", 3) == "ab\n[3 characters cut]\nf"


def test_a_world_may_give_the_whole_next_prompt(renderer: Renderer) -> None:
    answers = iter([
        ("seen", 0.0, False, False, {"next_prompt": "ab"}),
        ("more", 0.0, False, False, {}),
        ("end", 0.0, True, False, {}),
    ])  # fmt: skip
    world = World("step", lambda: next(answers))
    [played] = play(renderer, world, ["bad"])
    first, second, third = played.turns
    rules = [{"role": "system", "content": world.system_prompt}] if world.system_prompt else []
    assert second.prompt_ids == renderer.start([*rules, {"role": "user", "content": "ab"}])
    assert first.observation == "seen"  # what teacher and reflector read
    assert third.prompt_ids[: len(second.prompt_ids)] == second.prompt_ids


def test_no_control_character_passes() -> None:
    for code in [*range(0x3000), *range(0xD800, 0xE000)]:
        out = harmless(f"a{chr(code)}b")
        out.encode("utf-8")
        assert not any((c < " " and c not in "\t\n") or "\x7f" <= c <= "\x9f" for c in out), code
    assert harmless("\x1b[31;1mred\x1b[0m \x1b]0;title\x07end\x1b]8;;u\x1b\\") == "red end"
    assert harmless("a\r\nb\rc\u2028d\te") == "a\nb\nc\nd\te"
    assert harmless("null\x00 half\ud800") == "null\ufffd half\ufffd"
    assert harmless("Grüße 🏳️‍🌈 日本") == "Grüße 🏳️‍🌈 日本"


def test_episodes_do_not_depend_on_who_runs_beside_them(policy: Policy) -> None:
    tasks = [f"{i}" for i in range(7)]
    assignments = [Assignment(id=t, group_id=t, task_id=t) for t in tasks]

    def play(size: int) -> list[list[int]]:
        worlds: list[Any] = [World() for _ in range(size)]
        played = rollout(
            assignments, envs=worlds, sampler=HFSampler(policy, size), renderer=policy.renderer,
            config=RolloutConfig(max_turn_tokens=8, max_episode_tokens=400), seed=0,
        )  # fmt: skip
        assert [t.task_id for t in played] == tasks
        return [turn.action_ids for t in played for turn in t.turns]

    alone = play(1)
    assert alone == play(3) == play(7)
    assert len({tuple(ids) for ids in alone}) == len(alone)
