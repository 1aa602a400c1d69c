"""The border of an environment: what it is asked goes through here, and nothing else comes back.

Types, finiteness, sizes, ids and splits are checked; whatever is wrong, and whatever the
environment raises, becomes one `EnvironmentFault` that names world, task and turn, what was got,
what was expected, and the line of the user's code.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np

from hero.config import redacted
from hero.envs.alarm import TimeUp, alarm, hangs
from hero.envs.base import Environment, HasDiagnosis, HasFacts, HasGenerator, HasTools, raised
from hero.text import harmless, shorten
from hero.types import Diagnosis, Fault, FeedbackKind, Trajectory

MAX_REWARD = 1e6
"""Size of one reward: squares and sums of larger ones leave the range of float32."""
MAX_CHARS = 1_000_000
"""Of one text where no context sets a smaller limit."""
MAX_DIAGNOSIS = 10_000
"""Of one text of a diagnosis."""
MAX_ID = 300
"""Characters of a task id."""
MAX_HANGS = 3
"""A method that gives no answer so often in a row ends the command, not its episode alone."""


class EnvironmentFault(Fault):
    """An environment raised or broke its contract: which one, in which task and turn, and where."""


class _Breach(Exception):
    """Something was got, something else expected."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a reset gave, checked."""

    world: str
    """Name of the environment's class, for messages."""
    rules: str
    observation: str
    instruction: str
    tools: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Step:
    """What a step gave, checked."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    success: bool
    valid: bool
    parse_ok: bool
    feedback_kind: FeedbackKind
    role: str
    next_prompt: str
    """The whole prompt of the next turn, instead of all that was said before and the observation;
    "" where the conversation goes on."""


def system_prompt(env: Environment) -> str:
    """The rules the agent is told; "" for none."""
    with _border(env, "system_prompt"):
        return _text("system_prompt", env.system_prompt, MAX_CHARS)


def tasks(env: Environment, split: str) -> list[str]:
    """Task ids of a split: at least one, each once, each a short printable text."""
    with _border(env, "tasks", f"split {split!r}"):
        found = env.tasks(split)
        if not isinstance(found, (list, tuple)) or not found:
            raise _breach(f"tasks({split!r})", found, "a list of at least one task id")
        for task in found:
            is_text = isinstance(task, str) and 0 < len(task) <= MAX_ID
            if not is_text or harmless(task) != task or "\n" in task or "\t" in task:
                what = f"text of 1 to {MAX_ID} characters without control characters as task id"
                raise _breach(f"tasks({split!r})", task, what)
        if len(set(found)) < len(found):
            twice = next(task for i, task in enumerate(found) if task in found[:i])
            raise _breach(f"tasks({split!r})", twice, "each task id once")
        return list(found)


def disjoint_tasks(env: Environment, splits: Sequence[str]) -> dict[str, list[str]]:
    """Task ids of several splits that share none."""
    found = {split: tasks(env, split) for split in splits}
    first: dict[str, str] = {}
    with _border(env, "tasks"):
        for split, ids in found.items():
            for task in ids:
                if first.setdefault(task, split) != split:
                    what = f"disjoint splits, but it is in {first[task]} too"
                    raise _breach(f"tasks({split!r})", task, what)
    return found


def reset(env: Environment, task: str, max_chars: int = MAX_CHARS) -> tuple[str, str]:
    """Start a task: its first observation and its instruction."""
    with _border(env, "reset", f"task {task!r}, turn 0"):
        answer = env.reset(task)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise _breach("reset()", answer, "(observation, info)")
        observation = _text("reset(): observation", answer[0], max_chars)
        info = _info("reset()", answer[1])
        said = info.get("instruction", observation)
        return observation, _text("reset(): info['instruction']", said, max_chars)


def begin(
    env: Environment, task: str, tool_format: str, generate: Any, max_chars: int = MAX_CHARS
) -> Beginning:
    """Start a task for a model that writes tool calls in `tool_format`.

    `generate` is for environments that let the model play another part (`HasGenerator`); None where
    the model cannot be reached.
    """
    if isinstance(env, HasTools):
        env.tool_format = tool_format
    if isinstance(env, HasGenerator) and generate is not None:
        with _border(env, "use_generator"):
            env.use_generator(generate)
    rules = system_prompt(env)
    observation, instruction = reset(env, task, max_chars)
    return Beginning(type(env).__name__, rules, observation, instruction, tools(env))


def step(env: Environment, text: str, task: str, turn: int, max_chars: int = MAX_CHARS) -> Step:
    """Take the agent's turn."""
    with _border(env, "step", f"task {task!r}, turn {turn}"):
        answer = env.step(text)
        if not isinstance(answer, tuple) or len(answer) != 5:
            what = "(observation, reward, terminated, truncated, info)"
            raise _breach("step()", answer, what)
        observation, reward, terminated, truncated, info = answer
        info = _info("step()", info)
        role, kind = info.get("role", "user"), info.get("feedback_kind", FeedbackKind.OK)
        if not isinstance(role, str) or role not in ("user", "tool"):
            raise _breach("step(): info['role']", role, "'user' or 'tool'")
        if not isinstance(kind, str) or kind not in list(FeedbackKind):
            what = f"one of {', '.join(FeedbackKind)}"
            raise _breach("step(): info['feedback_kind']", kind, what)
        return Step(
            observation=_text("step(): observation", observation, max_chars),
            reward=_reward(reward),
            terminated=_truth("terminated", terminated),
            truncated=_truth("truncated", truncated),
            success=_truth("info['success']", info.get("success", False)),
            valid=_truth("info['valid']", info.get("valid", True)),
            parse_ok=_truth("info['parse_ok']", info.get("parse_ok", True)),
            feedback_kind=FeedbackKind(kind),
            role=role,
            next_prompt=_text(
                "step(): info['next_prompt']", info.get("next_prompt", ""), max_chars
            ),
        )


def close(env: Environment) -> None:
    """Release what the environment holds."""
    with _border(env, "close"):
        env.close()


def tools(env: Environment) -> list[dict[str, Any]]:
    """OpenAI schemas of the tools of the present task; [] for an environment without tools."""
    if not isinstance(env, HasTools):
        return []
    with _border(env, "tools"):
        found = env.tools()
        if not isinstance(found, (list, tuple)):
            raise _breach("tools()", found, "a list of OpenAI schemas")
        for tool in found:
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise _breach("tools()", tool, '{"type": "function", "function": {"name": …}}')
        return list(found)


def facts(env: Environment) -> dict[str, str]:
    """What an environment's results depend on besides its options; {} if it says nothing."""
    if not isinstance(env, HasFacts):
        return {}
    with _border(env, "facts"):
        found = env.facts()
        if not isinstance(found, dict):
            raise _breach("facts()", found, "a dict of texts")
        return {_text("facts()", k, MAX_ID): _text("facts()", v, MAX_ID) for k, v in found.items()}


def action(env: Any, method: str, *arguments: Any, where: str = "") -> str:
    """The text of an action that the environment itself proposes: `oracle` and its like."""
    with _border(env, method, where):
        return _text(f"{method}()", getattr(env, method)(*arguments), MAX_CHARS)


def vocabulary(env: Any) -> list[str]:
    """Texts whose words a small agent is made of."""
    with _border(env, "vocabulary"):
        found = env.vocabulary()
        if not isinstance(found, (list, tuple, set, frozenset)) or not found:
            raise _breach("vocabulary()", found, "a list of texts")
        return [_text("vocabulary()", text, MAX_CHARS) for text in found]


def diagnose(env: HasDiagnosis, trajectory: Trajectory) -> list[Diagnosis]:
    """The environment's own diagnoses: one for each turn, in order."""
    number = len(trajectory.turns)
    with _border(env, "diagnose", f"task {trajectory.task_id!r}, {number} turns"):
        found = env.diagnose(trajectory)
        if not isinstance(found, (list, tuple)) or len(found) != number:
            raise _breach("diagnose()", found, f"a list of {number} Diagnosis, one for each turn")
        for turn, diagnosis in enumerate(found):
            if not isinstance(diagnosis, Diagnosis):
                raise _breach("diagnose()", diagnosis, f"a Diagnosis of turn {turn}")
            if type(diagnosis.turn) is not int or diagnosis.turn != turn:
                raise _breach("diagnose(): turn", diagnosis.turn, f"{turn}, as turns are in order")
            for field in fields(Diagnosis):
                name, value = field.name, getattr(diagnosis, field.name)
                if field.type == "str":
                    setattr(diagnosis, name, _text(f"diagnose(): {name}", value, MAX_DIAGNOSIS))
                elif field.type == "bool":
                    setattr(diagnosis, name, _truth(f"diagnose(): {name}", value))
        return list(found)


def stop_if_failed(
    trajectories: Sequence[Trajectory], share: float = 1.0, beside: Sequence[bool] = ()
) -> None:
    """Raise EnvironmentFault with the first cause if all failed, or more than `share` of them.

    `beside`: of each further episode of the batch, whether it failed.
    """
    causes = [t.error for t in trajectories if t.failed]
    failed, number = len(causes) + sum(beside), len(trajectories) + len(beside)
    if causes and (failed == number or failed > share * number):
        some = "All" if failed == number else f"{failed} of"
        bound = f", more than rollout.max_env_errors={share:g}" if failed < number else ""
        raise EnvironmentFault(
            f"{some} {number} episodes of a batch failed{bound}. The first: {causes[0]}"
        )


# ---- checks --------------------------------------------------------------------------------------


def _breach(what: str, got: Any, expected: str) -> _Breach:
    try:
        size = f" of length {len(got)}" if isinstance(got, (list, tuple, dict, str)) else ""
        shown = f"{reprlib.repr(got)} ({type(got).__name__}{size})"
    except Exception:  # code of the world, or an integer of thousands of digits
        shown = f"a value that cannot be shown ({type(got).__name__})"
    return _Breach(f"{what}: got {shown}; expected {expected}")


def _text(what: str, value: Any, limit: int) -> str:
    if not isinstance(value, str):
        raise _breach(what, value, "text (str)")
    return harmless(shorten(str(value), limit))


def _truth(what: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _breach(what if "(" in what else f"step(): {what}", value, "True or False")
    return bool(value)


def _reward(value: Any) -> float:
    expected = f"a finite number from -{MAX_REWARD:.0e} to {MAX_REWARD:.0e}"
    try:  # a plain number first, whose comparisons are no code of the world
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_REWARD:  # NaN fails too
        raise _breach("step(): reward", value, expected)
    return number


def _info(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _breach(f"{what}: info", value, "a dict")
    return value


@contextmanager
def _border(env: Any, method: str, where: str = "") -> Iterator[None]:
    """Whatever goes wrong inside becomes one EnvironmentFault; Ctrl-C stays what it is."""
    at = f"{type(env).__name__}, {where}" if where else type(env).__name__
    method_of = (type(env), method)
    try:
        with alarm():
            yield
        hangs.pop(method_of, None)
    except KeyboardInterrupt:
        raise
    except TimeUp as late:
        hangs[method_of] += 1
        said = harmless(f"{at}: {method} gave {raised(late, inspect.getmodule(type(env)))}")
        if hangs[method_of] >= MAX_HANGS:
            raise Fault(f"{said} It was so {MAX_HANGS} times in a row.") from None
        raise EnvironmentFault(said) from None
    except _Breach as breach:
        said = f"{at}: {breach}.{_defined(env, method)}"
        raise EnvironmentFault(harmless(redacted(said))) from None
    except BaseException as error:  # sys.exit in a step must not end a run, and not as a success
        said = f"{at}: {method} raised {raised(error, inspect.getmodule(type(env)))}"
        # A RuntimeError caused by a StopIteration would be taken for that one by contextlib.
        raise EnvironmentFault(harmless(said)) from (
            None if isinstance(error, StopIteration) else error
        )


def _defined(env: Any, method: str) -> str:
    """Where the user wrote a method."""
    found = inspect.getattr_static(type(env), method, None)
    code = getattr(inspect.unwrap(getattr(found, "fget", None) or found), "__code__", None)
    return f" See {code.co_filename}, line {code.co_firstlineno}." if code else ""
