"""Who plays the user: a script, or a model that reads the package's own guidelines.

Which one it is moves scores by more than ten points, so it stands in every result.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from hero.envs.tau.world import World
from hero.toolcalls import ToolCall, parse_calls, react
from hero.types import Fault, Message

GREETING = "Hi! How can I help you today?"
STOPS = ("###STOP###", "###TRANSFER###", "###OUT-OF-SCOPE###")
"""What a user writes to end the conversation."""
MAX_CALLS_OF_USER = 10
"""Calls of a user between two of its messages."""
GO_ON = "Yes, please go ahead."
MISSING = "You have not told me everything that I asked for."
FIRST_PERSON = {
    "you are": "I am", "you're": "I'm", "you were": "I was", "you've": "I've", "you'd": "I'd",
    "you'll": "I'll", "your": "my", "yours": "mine", "yourself": "myself", "you": "I",
}  # fmt: skip
SECOND = re.compile(r"\b(" + "|".join(sorted(FIRST_PERSON, key=len, reverse=True)) + r")\b", re.I)

Chat = Callable[[list[Message], int], str]
"""A model: messages and a seed to the text of an answer."""


class UserFault(Fault):
    """A simulated user wrote nothing that can be used: the fault is not the agent's."""


class User(Protocol):
    """A simulated user of one episode."""

    def answer(self, said: str, world: World) -> str:
        """What the user says to the agent's words; may call the user's tools in `world`."""
        ...


def stops(text: str) -> bool:
    return any(stop in text for stop in STOPS)


def first_person(text: str) -> str:
    """Instructions to a user as what that user says: "You want your money" -> "I want my money"."""
    return SECOND.sub(lambda match: FIRST_PERSON[match[0].lower()], text).strip()


@dataclass
class ScriptedUser:
    """Says what its instructions hold, part by part; deterministic and without a model.

    Reason of the call, what is known, wishes; then it agrees to questions, and ends the
    conversation at the first statement, once it was told what the task wants communicated (it asks
    once). A tool of its own that the agent names is called, with the gold arguments where there
    are some. It does not understand what it reads.
    """

    parts: list[str]
    told: list[str] = field(default_factory=list)
    asked: bool = False
    confirmed: int = 0
    called: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, task: Any) -> ScriptedUser:
        instructions = task.user_scenario.instructions
        if isinstance(instructions, str):
            return cls([first_person(instructions)])
        parts = [
            instructions.reason_for_call, instructions.known_info,
            "\n".join(filter(None, (instructions.unknown_info, instructions.task_instructions))),
        ]  # fmt: skip
        return cls([first_person(part) for part in parts if part])

    def answer(self, said: str, world: World) -> str:
        self.told.append(said.lower().replace(",", ""))
        done = self._act(said, world)
        if done:
            return "\n".join(done)
        if self.parts:
            return self.parts.pop(0)
        if "?" in said and self.confirmed < MAX_CALLS_OF_USER:
            self.confirmed += 1
            return GO_ON
        criteria = world.task.evaluation_criteria
        wanted = (criteria.communicate_info if criteria else None) or []
        if not self.asked and not all(
            any(info.lower() in text for text in self.told) for info in wanted
        ):
            self.asked = True
            return MISSING
        return f"Thank you, that is all. {STOPS[0]}"

    def _act(self, said: str, world: World) -> list[str]:
        """Call the tools that were named: one line for each answer."""
        tools = world.domain.base.user_tools
        if tools is None:
            return []
        words = set(re.findall(r"\w+", said))
        calls = [
            ToolCall(name=name, arguments=self._arguments(name, world.task))
            for name in tools.get_tools()
            if name in words
        ]
        lines = []
        for call in calls:
            ((answer, _),) = world.call([call], "user")
            lines.append(f"{call.name}: {answer}")
        return lines

    def _arguments(self, name: str, task: Any) -> dict[str, Any]:
        """Those of the next gold call of this tool; of the last one after that."""
        criteria = task.evaluation_criteria
        gold = [a for a in (criteria.actions if criteria else None) or [] if a.name == name]
        used = self.called.count(name)
        self.called.append(name)
        return dict(gold[min(used, len(gold) - 1)].arguments) if gold else {}


class ModelUser:
    """A model plays the user by the package's guidelines and the task's scenario."""

    def __init__(self, task: Any, chat: Chat, tools: list[dict[str, Any]]) -> None:
        from tau2.user.user_simulator import SYSTEM_PROMPT, get_global_user_sim_guidelines

        rules = SYSTEM_PROMPT.format(
            global_user_sim_guidelines=get_global_user_sim_guidelines(use_tools=bool(tools)),
            instructions=task.user_scenario,
        )
        self.messages: list[Message] = [{"role": "system", "content": rules}]
        if tools:
            self.messages[0]["content"] += "\n" + react.rules(tools).replace("user", "agent")
        self.chat: Chat | None = chat
        self.seed = zlib.crc32(task.id.encode())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "chat": None}  # a model is not pickled with an episode

    def answer(self, said: str, world: World) -> str:
        if self.chat is None:
            raise UserFault("A model's user does not survive pickling; reset the episode.")
        self.messages.append({"role": "user", "content": said})
        for _ in range(MAX_CALLS_OF_USER):
            text = self.chat(self.messages, self.seed + len(self.messages)).strip()
            parsed = parse_calls(text, "react")
            if not text or not parsed.parse_ok:
                raise UserFault(
                    f"The simulated user wrote {text[:200]!r}; expected words or a readable call "
                    f"({parsed.error or 'it is empty'}). Use a stronger model as the user."
                )
            self.messages.append({"role": "assistant", "content": text})
            if not parsed.calls:
                return parsed.text
            answers = world.call(list(parsed.calls), "user")
            seen = "\n".join(answer for answer, _ in answers)
            self.messages.append({"role": "user", "content": f"Observation: {seen}"})
        raise UserFault(f"The simulated user made {MAX_CALLS_OF_USER} calls without a word.")
