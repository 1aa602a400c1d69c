"""Does an environment keep its contract? `hero env check NAME` prints what was found.

Everything is asked through the border, as in training, so a fault reads here as it would there.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hero.envs import border
from hero.envs.alarm import TimeUp, alarm, set_limit
from hero.envs.base import Environment, HasDiagnosis, HasOracle, HasTools, make_env, raised
from hero.envs.border import EnvironmentFault
from hero.types import Fault, StopReason, Trajectory, Turn

SPLITS = ("train", "dev", "test")
MAX_TURNS = 200
"""An episode of the check stops here, whatever the environment says."""
NOT_A_TASK = "no-such-task"
JUNK = ("", "I do not know.", "[" * 500, "a\ud800\x00\x1b[31m", '{"name": "nothing"}', "x" * 5000)
"""What agents write sometimes."""


class Verdict(StrEnum):
    """Of one rule of the contract."""

    OK = "ok"
    FAULT = "FAULT"
    NONE = "-"  # optional, and not there


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    rule: str
    verdict: Verdict
    detail: str


def check(
    name: str, options: Mapping[str, Any], episodes: int = 20, seconds: float = 60.0
) -> list[Finding]:
    """Try every rule of the contract.

    Args:
        name: of the environment, or `module:Class`.
        options: of its constructor.
        episodes: played for each rule that needs some.
        seconds: in which it must answer each time, and be made.

    Raises:
        ValueError: it cannot be made at all.
        Fault: it is not made in time.
    """

    def make() -> Environment:
        try:
            with alarm():
                return make_env(name, **options)
        except TimeUp as late:
            raise Fault(f"{name} cannot be made: {raised(late)}") from None

    set_limit(seconds, "timeout")
    check_of = _Check(make(), make, episodes)
    return [check_of.find(rule, how) for rule, how in check_of.rules()]


def table(findings: list[Finding]) -> str:
    """The findings as aligned lines."""
    width = max(len(finding.rule) for finding in findings)
    return "\n".join(f"{f.rule:<{width}}  {f.verdict:<5}  {f.detail}" for f in findings)


class _Check:
    def __init__(self, env: Environment, make: Callable[[], Environment], episodes: int) -> None:
        self.env, self.make, self.episodes = env, make, episodes
        self.found: dict[str, list[str]] = {}

    def rules(self) -> Iterator[tuple[str, Callable[[], str | None]]]:
        yield "splits", self.splits
        if not self.found:
            return
        yield "system prompt", self.system_prompt
        yield "tools", self.tools
        yield "unknown task", self.unknown_task
        yield "reset", self.reset
        yield "junk is answered", self.junk
        yield "oracle", self.oracle
        yield "diagnosis", self.diagnosis
        yield "vocabulary", self.vocabulary
        yield "same again", self.determinism
        yield "pickling", self.pickling
        yield "speed", self.speed

    def find(self, rule: str, how: Callable[[], str | None]) -> Finding:
        try:
            detail = how()
        except (Fault, TimeUp, _Broken) as fault:
            return Finding(rule, Verdict.FAULT, str(fault))
        if detail is None:
            return Finding(rule, Verdict.NONE, "none")
        return Finding(rule, Verdict.OK, detail)

    def splits(self) -> str:
        found = border.disjoint_tasks(self.env, SPLITS)
        again = border.disjoint_tasks(self.make(), SPLITS)
        if found != again:
            raise _Broken("two instances list different tasks: draw them from a fixed seed")
        self.found = found
        return ", ".join(f"{split} {len(tasks)}" for split, tasks in found.items()) + ", disjoint"

    def system_prompt(self) -> str:
        return f"{len(border.system_prompt(self.env))} characters"

    def tools(self) -> str | None:
        border.reset(self.env, self._tasks()[0])
        return str(len(border.tools(self.env))) if isinstance(self.env, HasTools) else None

    def unknown_task(self) -> str:
        try:
            border.reset(self.env, NOT_A_TASK)
        except EnvironmentFault as fault:
            if isinstance(fault.__cause__, KeyError):
                return "KeyError, as it should be"
            raise _Broken(f"{fault} Expected KeyError.") from fault
        raise _Broken(f"reset({NOT_A_TASK!r}) started an episode; expected KeyError")

    def reset(self) -> str:
        sizes = [len(border.reset(self.env, task)[0]) for task in self._tasks()]
        return f"observations of {min(sizes)} to {max(sizes)} characters"

    def junk(self) -> str:
        """Whatever is written gets an answer that says what was wrong, and the episode goes on."""
        task = self._tasks()[0]
        page, _ = border.reset(self.env, task)
        silent = 0
        for number, text in enumerate(JUNK):
            step = border.step(self.env, text, task, number)
            silent += step.observation == page and not step.valid
            if step.terminated or step.truncated:
                border.reset(self.env, task)
        note = f"; {silent} of {len(JUNK)} only with the same page again" if silent else ""
        return f"{len(JUNK)} texts{note}"

    def oracle(self) -> str | None:
        if not isinstance(self.env, HasOracle):
            return None
        played = [self._play(task) for task in self._tasks()]
        share = sum(t.success for t in played) / len(played)
        if not share:
            raise _Broken(f"it solves none of {len(played)} tasks: {_ending(played[0])}")
        turns = sum(len(t.turns) for t in played) / len(played)
        reward = sum(t.reward for t in played) / len(played)
        return f"success {share:.0%}, reward {reward:.3f}, {turns:.1f} turns on {len(played)} tasks"

    def diagnosis(self) -> str | None:
        if not isinstance(self.env, HasDiagnosis):
            return None
        hints = bad = clean = 0
        for number, task in enumerate(self._tasks()):
            begins_badly = number % 2 == 0
            found = border.diagnose(self.env, self._play(task, 0 if begins_badly else -1))
            if begins_badly:
                bad += 1
                hints += bool(found[0].hint)
            else:
                clean += sum(bool(diagnosis.hint) for diagnosis in found)
        if not hints:
            raise _Broken(f"no hint for the action {JUNK[1]!r}")
        return f"{hints} hints for {bad} unreadable actions, {clean} elsewhere"

    def vocabulary(self) -> str | None:
        """All that a small agent made from the environment's words would read is made of them."""
        if not hasattr(self.env, "vocabulary"):
            return None
        try:
            words = border.vocabulary(self.env)
        except EnvironmentFault as fault:
            if type(fault.__cause__) is ValueError:  # as the contract has it
                return f"open: {fault.__cause__}"
            raise
        from hero.renderer import Renderer
        from hero.scratch import build_tokenizer

        renderer = Renderer(build_tokenizer(words))
        renderer.encode(border.system_prompt(self.env))
        for task in self._tasks():
            renderer.encode(border.reset(self.env, task)[0])
            for turn in self._play(task).turns:
                renderer.encode(turn.observation or "")
                renderer.encode(turn.action_text)
        if said := renderer.newly_unknown():
            raise _Broken(f"vocabulary() lacks words of its own texts. {said}")
        return f"{len(renderer.tokenizer)} tokens hold every word of {len(self._tasks())} episodes"

    def determinism(self) -> str:
        other = self.make()
        for task in self._tasks():
            played = self._play(task)
            if played != self._play(task, env=other, script=[t.action_text for t in played.turns]):
                raise _Broken(f"two instances play task {task!r} differently with equal actions")
        border.close(other)
        return f"two instances agree on {len(self._tasks())} episodes"

    def pickling(self) -> str | None:
        task = self._tasks()[0]
        border.reset(self.env, task)
        try:
            with alarm():
                twin = pickle.loads(pickle.dumps(self.env))
        except Exception as error:
            said = (type(self.env).__doc__ or "").lower()
            if "not picklable" in said or "cannot be pickled" in said:
                return None
            raise _Broken(
                f"{error!r}; if it cannot be pickled, its docstring says 'not picklable'"
            ) from error
        text = self._action(random.Random(0))
        if border.step(self.env, text, task, 0) != border.step(twin, text, task, 0):
            raise _Broken("a pickled episode goes on differently")
        return "also within an episode"

    def speed(self) -> str:
        steps, start = 0, time.perf_counter()
        resets = 0.0
        for task in self._tasks():
            began = time.perf_counter()
            border.reset(self.env, task)
            resets += time.perf_counter() - began
            rng = random.Random(task)
            for number in range(MAX_TURNS):
                steps += 1
                step = border.step(self.env, self._action(rng), task, number)
                if step.terminated or step.truncated:
                    break
        step_ms = (time.perf_counter() - start - resets) / steps * 1e3
        return f"{step_ms:.3f} ms a step, {resets / len(self._tasks()) * 1e3:.3f} ms a reset"

    # ---- playing ---------------------------------------------------------------------------------

    def _tasks(self) -> list[str]:
        return self.found["train"][: self.episodes]

    def _action(self, rng: random.Random, env: Environment | None = None) -> str:
        env = env or self.env
        if isinstance(env, HasOracle):
            return border.action(env, "oracle")
        return rng.choice(JUNK)

    def _play(
        self,
        task: str,
        junk_at: int = -1,
        env: Environment | None = None,
        script: list[str] | None = None,
    ) -> Trajectory:
        env = env or self.env
        rng = random.Random(task)
        _, instruction = border.reset(env, task)
        played = Trajectory(
            id=task, group_id=task, task_id=task, instruction=instruction, turns=[], reward=0.0,
            success=False, stop_reason=StopReason.MAX_TURNS,
        )  # fmt: skip
        for number in range(MAX_TURNS):
            text = JUNK[1] if number == junk_at else self._action(rng, env)
            if script is not None and number < len(script):
                text = script[number]
            step = border.step(env, text, task, number)
            played.turns.append(
                Turn(
                    prompt_ids=[], action_ids=[], sampled_logprobs=[], action_text=text,
                    observation=step.observation, feedback_kind=step.feedback_kind,
                    is_error=not step.valid, parse_ok=step.parse_ok,
                )
            )  # fmt: skip
            played.reward += step.reward
            if step.terminated or step.truncated:
                played.success = step.success
                played.stop_reason = StopReason.DONE if step.terminated else StopReason.TRUNCATED
                return played
        raise _Broken(f"task {task!r} has not ended after {MAX_TURNS} turns: let it be truncated")


class _Broken(Exception):
    """A rule is not kept."""


def _ending(trajectory: Trajectory) -> str:
    last = trajectory.turns[-1]
    return f"task {trajectory.task_id!r} ended with {last.action_text!r} -> {last.observation!r}"
