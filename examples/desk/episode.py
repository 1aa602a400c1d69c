"""One conversation: the desk's session, the customer and what the agent has seen so far."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from desk.actions import Action, ToolCall, parse_action
from desk.customer import Customer, Reply
from desk.database import Database, initial_database
from desk.tasks import Request, Task
from desk.tools import Session, ToolError, execute
from hero.envs.base import StepResult
from hero.types import FeedbackKind


@dataclass(slots=True)
class Episode:
    task: Task
    session: Session
    customer: Customer
    initial: Database
    gold: Database
    gold_digest: str
    context: str
    """All that was shown to the agent, joined: an id may be used once it occurs here."""
    max_steps: int
    steps: int = 0
    ended: bool = False

    @classmethod
    def start(cls, task: Task, max_steps: int, patience: int) -> Episode:
        database = initial_database(task.split)
        email = database.users[task.user_id].email
        customer = Customer(task.id, email, task.requests, patience)
        gold = task.gold_database()
        return cls(
            task=task,
            session=Session(database),
            customer=customer,
            initial=initial_database(task.split),
            gold=gold,
            gold_digest=gold.digest(),
            context=customer.open(),
            max_steps=max_steps,
        )

    @property
    def success(self) -> bool:
        """The records equal the gold records and the customer knows all that he wanted to know."""
        return (
            all(self.customer.told(request) for request in self.task.requests)
            and self.session.database.digest() == self.gold_digest
        )

    def carried_out(self, request: Request) -> bool:
        """Whether the records say about this request what the gold records say."""
        mine, gold = self.session.database, self.gold
        if request.kind == "transfer":
            return mine.transfers == gold.transfers
        return mine.orders[request.order_id] == gold.orders[request.order_id]

    def step(self, text: str) -> StepResult:
        self.steps += 1
        action = parse_action(text)
        if action.call is not None:
            observation, info, terminated = self._call(action.call)
        else:
            observation, info, terminated = self._speak(action)
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

    def _call(self, call: ToolCall) -> tuple[str, dict[str, Any], bool]:
        info: dict[str, Any] = {
            "valid": True,
            "feedback_kind": FeedbackKind.OK,
            "parse_ok": True,
            "executed_action": call.to_json(),
            "role": "tool",
        }
        try:
            answer = json.dumps(execute(self.session, call))
        except ToolError as error:
            answer = f"Error: {error}"
            info |= {"valid": False, "feedback_kind": FeedbackKind.INVALID_ACTION}
            return answer, info, False
        return answer, info, call.name == "transfer_to_human"

    def _speak(self, action: Action) -> tuple[str, dict[str, Any], bool]:
        reply: Reply
        if action.parse_ok:
            reply = self.customer.reply(action.text, self.carried_out)
            kind = FeedbackKind.OK if reply.helpful else FeedbackKind.INSUFFICIENT
        else:
            reply = self.customer.not_understood()
            kind = FeedbackKind.PARSE_ERROR
        self.session.confirmed |= reply.confirms
        info: dict[str, Any] = {
            "valid": action.parse_ok,
            "feedback_kind": kind,
            "parse_ok": action.parse_ok,
            "executed_action": action.text if action.parse_ok else None,
            "role": "user",
        }
        return reply.text, info, reply.leaves
