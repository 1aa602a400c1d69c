"""A plain Python class as a world.

Oracles: the schema that OpenAI's format asks for, written out; an episode computed by hand.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hero.envs.base import Environment, HasTools, make_env
from hero.envs.check import Verdict, check
from hero.envs.tools import ToolsEnv
from hero.toolcalls import ToolCall, write_calls
from hero.types import FeedbackKind


class Calculator:
    """Reach a number by adding and doubling."""

    tasks: ClassVar = {split: [{"goal": goal} for goal in goals]
             for split, goals in {"train": (6, 7), "dev": (8,), "test": (9,)}.items()}  # fmt: skip
    system_prompt = "Reach the goal."

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def reset(self, goal: int) -> str:
        self.total, self.goal, self.done = self.start, goal, False
        return f"Reach {goal} from {self.total}."

    def add(self, number: int, note: str = "") -> str:
        """Add a number.

        Args:
            number: what to add.
            note: a remark.
        """
        self.total += number
        self.done = self.total == self.goal
        return f"The total is {self.total}."

    def facts(self) -> dict[str, int]:
        """Say all that is known."""
        return {"total": self.total}

    def reward(self) -> float:
        return float(self.total == self.goal)

    def _secret(self) -> None: ...


class Untold(Calculator):
    def spell(self, word):  # type: ignore[no-untyped-def]
        return word


def calls(*pairs: tuple[str, dict[str, Any]]) -> str:
    return write_calls([ToolCall(name=name, arguments=given) for name, given in pairs], "react")


def test_schemas_are_those_of_the_docstrings() -> None:
    env = ToolsEnv(Calculator)
    assert isinstance(env, Environment) and isinstance(env, HasTools)
    add, facts = env.tools()
    assert add == {
        "type": "function",
        "function": {
            "name": "add", "description": "Add a number.",
            "parameters": {
                "type": "object",
                "properties": {
                    "number": {"type": "integer", "description": "what to add."},
                    "note": {"type": "string", "description": "a remark."},
                },
                "required": ["number"],
            },
        },
    }  # fmt: skip
    assert facts["function"]["name"] == "facts"


def test_an_episode() -> None:
    env = ToolsEnv(Calculator, start=2)
    assert env.reset("train-1")[0] == "Reach 7 from 2." and env.system_prompt == "Reach the goal."
    seen, reward, terminated, truncated, info = env.step(calls(("add", {"number": 1})))
    assert (seen, reward, terminated, truncated) == ("The total is 3.", 0.0, False, False)
    assert info["valid"] and info["role"] == "tool" and not info["success"]
    assert env.step(calls(("facts", {})))[0] == '{"total": 3}'
    twin = pickle.loads(pickle.dumps(env))
    for one in (env, twin):
        seen, reward, terminated, _, info = one.step(calls(("add", {"number": 4})))
        assert (seen, reward, terminated, info["success"]) == ("The total is 7.", 1.0, True, True)
    with pytest.raises(RuntimeError, match="reset"):
        env.step("x")


def test_mistakes_are_answered() -> None:
    env = ToolsEnv(Calculator, max_steps=5)
    env.reset("train-0")
    for text, kind, said in [
        (calls(("subtract", {})), FeedbackKind.INVALID_ACTION, "no tool 'subtract'; there are add"),
        (calls(("_secret", {})), FeedbackKind.INVALID_ACTION, "no tool '_secret'"),
        (calls(("add", {"count": 1})), FeedbackKind.INVALID_ACTION, "TypeError"),
        ('Action: {"name": "add", ', FeedbackKind.PARSE_ERROR, "Write Action:"),
    ]:
        seen, _, terminated, truncated, info = env.step(text)
        assert said in seen and info["feedback_kind"] is kind and not info["valid"]
        assert info["parse_ok"] is (kind is not FeedbackKind.PARSE_ERROR)
        assert not terminated and not truncated
    assert env.step(calls(("facts", {})))[3]  # truncated at the fifth
    env.reset("train-0")
    assert env.step("I am done.")[1:3] == (0.0, True)  # no call: the episode is over


def test_rows_of_a_file(tmp_path: Path) -> None:
    rows = [{"goal": i, "prompt": f"Task {i}."} for i in range(30)]
    rows[5]["split"] = "test"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = ToolsEnv(Calculator, data=str(path))
    sizes = {split: len(env.tasks(split)) for split in ("test", "dev", "train")}
    assert sizes == {"test": 4, "dev": 3, "train": 23}
    first, info = env.reset("test-1")
    assert first == "Task 5.\nReach 5 from 0." and info["instruction"] == "Task 5."
    found = check("tools", {"factory": f"{__name__}:Calculator", "data": str(path)}, episodes=3)
    assert not [f for f in found if f.verdict is Verdict.FAULT]


@pytest.mark.parametrize(
    ("factory", "options", "said"),
    [
        ("", {}, "needs a class"),
        (Untold, {}, "The tool spell of Untold needs a type hint"),
        (dict, {}, "needs `tasks`"),
        (Calculator, {"data": "nowhere.jsonl"}, "cannot be read as JSON lines"),
        (Calculator, {"begin": 3}, "cannot be made with the options"),
        ("nowhere:Class", {}, "No module named 'nowhere'"),
    ],
)
def test_classes_that_cannot_be_used(factory: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_env("tools", factory=factory, **options)
