"""The contract every environment keeps, and `make_env`, which builds one by its name.

`reset(task_id) -> (observation, info)`; `step(text) -> (observation, reward, terminated, truncated,
info)`. A task is named by its id, never by a worker's index; its goal is drawn from a fixed seed.
The last observation is returned too: it is the last turn's feedback. `truncated` is the
environment's own limit.

An attribute `workers` says who should run it in a rollout: "inline" (a step takes less than a
millisecond, or uses the model), "threads" (without the attribute) or "processes".

Keys of `info`: after `reset` `task_id`, `instruction`; after `step` `valid` (bool), `feedback_kind`
(FeedbackKind), `parse_ok` (bool), `executed_action` (str | None), `role` ("user" | "tool", the role
under which the observation is shown, default "user"), `success` (bool, when the episode has ended),
`next_prompt` (str: the whole prompt of the next turn, for worlds that do not show a conversation).
"""

from __future__ import annotations

import inspect
import reprlib
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol, cast, runtime_checkable

from hero.config import redacted
from hero.envs import alarm
from hero.envs.alarm import TimeUp
from hero.envs.registry import find, load
from hero.types import Diagnosis, Message, Trajectory

StepResult = tuple[str, float, bool, bool, dict[str, Any]]


@runtime_checkable
class Environment(Protocol):
    """A multi-turn text environment; an instance holds one episode."""

    @property
    def system_prompt(self) -> str:
        """The rules, tools and action format the agent is told; "" for none."""
        ...

    def tasks(self, split: str) -> list[str]:
        """Task ids of `split` in a fixed order: "train", "dev" and "test" are disjoint."""
        ...

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        """Start the task; raises KeyError naming the task if there is none of that id."""
        ...

    def step(self, text: str) -> StepResult:
        """Take the agent's turn; a bad action gets feedback and never raises."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class HasOracle(Protocol):
    """Environments that know how their tasks are solved."""

    def oracle(self) -> str:
        """The text of a best action in the present state."""
        ...


@runtime_checkable
class HasTools(Protocol):
    """Environments whose actions are tool calls; other text is said to the user.

    The model's chat template decides how calls are written: whoever plays sets `tool_format`, one
    of hero.toolcalls.FORMATS, before `reset`. `step` reads it, and `oracle` writes it.
    """

    tool_format: str

    def tools(self) -> list[dict[str, Any]]:
        """OpenAI schemas of the tools of the task that was reset last; of the world before one."""
        ...


@runtime_checkable
class HasGenerator(Protocol):
    """Environments that may let the generator that plays the agent play another part too."""

    def use_generator(self, generate: Callable[[list[Message], int], str]) -> None:
        """Set before `reset`: messages and a seed to the text of an answer."""
        ...


@runtime_checkable
class HasFacts(Protocol):
    """Environments whose results depend on more than their options."""

    def facts(self) -> dict[str, str]:
        """What stands in every result: versions of data, who played the user."""
        ...


@runtime_checkable
class HasDiagnosis(Protocol):
    """Environments that supply their own deterministic reflector (`reflection.reflector=rules`)."""

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        """One diagnosis for each turn; leaves the running episode alone."""
        ...


CONTRACT = ("system_prompt", "tasks", "reset", "step", "close")
OURS = (__file__, alarm.__file__)
"""Where nothing of a world can be at fault."""


def make_env(name: str, **options: Any) -> Environment:
    """Build an environment by its name (hero.envs.registry) or by `"package.module:Class"`.

    Raises:
        ValueError: unknown name, something not installed, or options that it does not take.
    """
    world = find(name)
    try:
        factory = load(world)
    except (Exception, SystemExit) as error:
        raise ValueError(f"Environment {name!r} cannot be imported: {raised(error)}") from error
    try:
        env = factory(**options)
    except ValueError:  # of options: it says itself what is wrong
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"Environment {name!r} cannot be made with the options {redacted(options)}: "
            f"{raised(error)}"
        ) from error
    missing = [name for name in CONTRACT if inspect.getattr_static(env, name, None) is None]
    if missing or isinstance(env, type):
        raise ValueError(
            f"{name} is not an environment: it gave {reprlib.repr(env)}, expected an object with "
            f"{', '.join(CONTRACT)}; missing: {', '.join(missing) or 'nothing, but it is a class'}."
        )
    return cast(Environment, env)


def raised(error: BaseException, module: ModuleType | None = None) -> str:
    """What an exception says, and where it came from: a line of `module` if it passed there."""
    late = isinstance(error, TimeUp)
    said = str(error) if late else "".join(traceback.format_exception_only(error)).strip()
    said = redacted(said)[:500]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == getattr(module, "__file__", None)]
    others = [f for f in frames if f.filename not in OURS and "importlib" not in f.filename]
    if not (places := own or others):
        return f"{said}."
    return f"{said}. See {places[-1].filename}, line {places[-1].lineno}."
