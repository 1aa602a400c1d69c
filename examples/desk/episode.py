"""One conversation: the desk's session, the customer and what the agent has seen so far."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from desk.customer import Customer
from desk.database import Database, initial_database
from desk.tasks import Request, Task
from desk.tools import Session, ToolError, execute
from hero.envs.base import StepResult
from hero.toolcalls import Parsed, parse_calls, write_calls
from hero.types import FeedbackKind


@dataclass(slots=True)
class Episode:
    task: Task
    session: Session
    customer: Customer
    initial: Database
    gold: Database
    context: str
    """All that was shown to the agent, joined: an id may be used once it occurs here."""
    max_steps: int
    tool_format: str
    """In which calls are written."""
    steps: int = 0
    ended: bool = False

    @classmethod
    def start(cls, task: Task, max_steps: int, patience: int, tool_format: str) -> Episode:
        database = initial_database(task.split)
        email = database.users[task.user_id].email
        customer = Customer(task.id, email, task.requests, patience)
        return cls(
            task=task,
            session=Session(database),
            customer=customer,
            initial=initial_database(task.split),
            gold=task.gold_database(),
            context=customer.open(),
            max_steps=max_steps,
            tool_format=tool_format,
        )

    @property
    def success(self) -> bool:
        """The records equal the gold records and the customer knows all that he wanted to know."""
        told = all(self.customer.told(request) for request in self.task.requests)
        return told and self.session.database == self.gold

    def carried_out(self, request: Request) -> bool:
        """Whether the records say about this request what the gold records say."""
        mine, gold = self.session.database, self.gold
        if request.kind == "transfer":
            return mine.transfers == gold.transfers
        return mine.orders[request.order_id] == gold.orders[request.order_id]

    def step(self, text: str) -> StepResult:
        self.steps += 1
        said = parse_calls(text, self.tool_format)
        observation, info, terminated = self._call(said) if said.calls else self._speak(said)
        self.context += f"\n{observation}"
        truncated = not terminated and self.steps >= self.max_steps
        self.ended = terminated or truncated
        reward = 0.0
        if self.ended:
            info["success"] = self.success
            reward = float(info["success"])
            if info["feedback_kind"] is FeedbackKind.OK:
                info["feedback_kind"] = FeedbackKind.DONE if terminated else FeedbackKind.BUDGET
        return observation, reward, terminated, truncated, info

    def _call(self, said: Parsed) -> tuple[str, dict[str, Any], bool]:
        """Run calls in order, up to the first that is refused."""
        info: dict[str, Any] = {
            "valid": True, "feedback_kind": FeedbackKind.OK, "parse_ok": True, "role": "tool",
            "executed_action": write_calls(said.calls, self.tool_format),
        }  # fmt: skip
        answers = []
        for call in said.calls:
            try:
                answers.append(json.dumps(execute(self.session, call)))
            except ToolError as error:
                answers.append(f"Error: {error}")
                info |= {"valid": False, "feedback_kind": FeedbackKind.INVALID_ACTION}
                break
        handed_over = bool(self.session.database.transfers)
        return "\n".join(answers), info, handed_over

    def _speak(self, said: Parsed) -> tuple[str, dict[str, Any], bool]:
        if said.parse_ok:
            reply = self.customer.reply(said.text, self.carried_out)
            kind = FeedbackKind.OK if reply.helpful else FeedbackKind.INSUFFICIENT
        else:
            reply = self.customer.not_understood()
            kind = FeedbackKind.PARSE_ERROR
        self.session.confirmed |= reply.confirms
        info: dict[str, Any] = {
            "valid": said.parse_ok, "feedback_kind": kind, "parse_ok": said.parse_ok,
            "role": "user", "executed_action": said.text if said.parse_ok else None,
        }  # fmt: skip
        return reply.text, info, reply.leaves
