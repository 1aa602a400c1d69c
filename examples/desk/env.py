"""`DeskEnv`: the tool desk behind the environment contract.

Reward 1.0 iff, when the episode ends, the records equal the gold records and the customer was told
all that he wanted to know; else 0.0. Every task takes a change of the records or a fact from them,
so doing nothing, or refusing everything, solves none (0 % in every split; a test counts).
"""

from __future__ import annotations

from typing import Any

from desk.diagnosis import diagnose
from desk.episode import Episode
from desk.planner import plan
from desk.tasks import TASK_IDS, load_task
from desk.tools import TOOLS
from hero.envs.base import StepResult
from hero.types import Diagnosis, Trajectory

POLICY = """You are the customer service desk of an online shop.

Each of your turns is a tool call, or plain text, which goes to the customer.

Policy:
1. Identify the customer first: ask for the e-mail address and call find_user_by_email. Serve only \
this customer's own orders.
2. Look an order up before you speak about it or change it. If the customer does not know the \
number, get_user lists the orders. Never invent ids.
3. Before each change of an order, say what you will do and ask the customer to confirm. One \
confirmation covers one change.
4. Only pending orders can be cancelled (reason: no longer needed, or ordered by mistake) or sent \
to another address.
5. Only items of delivered orders can be returned or exchanged, and only once per order. An \
exchange is for another available variant of the same product.
6. If the policy rules a request out, say that it is not possible, change nothing, and give the \
information that the customer asks for instead.
7. Transfer to a human only what none of your tools can do, and only after rule 1.
8. When a request is carried out, tell the customer that it is done. State amounts and numbers \
exactly."""


class DeskEnv:
    """Customer service in the spirit of tau-bench: tools, a policy, a scripted customer.

    Args:
        max_steps: turns of an episode, tool calls included; then it is truncated. Gold solutions
            take between 3 and 13.
        patience: unhelpful messages (broken tool calls included) that the customer takes; at one
            more he leaves, which ends the episode.

    Raises:
        ValueError: `max_steps` below 1 or `patience` below 0.
    """

    system_prompt = POLICY

    def __init__(self, max_steps: int = 15, patience: int = 3) -> None:
        if max_steps < 1:
            raise ValueError(
                f"max_steps must be at least 1, got {max_steps}: gold solutions take 3 to 13."
            )
        if patience < 0:
            raise ValueError(f"patience must be 0 or more unhelpful messages, got {patience}.")
        self.max_steps = max_steps
        self.patience = patience
        self.tool_format = "react"
        self._episode: Episode | None = None

    def tools(self) -> list[dict[str, Any]]:
        return [tool.schema() for tool in TOOLS.values()]

    def tasks(self, split: str) -> list[str]:
        if split not in TASK_IDS:
            raise ValueError(f"Unknown split {split!r}: expected one of {', '.join(TASK_IDS)}.")
        return list(TASK_IDS[split])

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        self._episode = self._start(task_id)
        opening = self._episode.context
        return opening, {"task_id": task_id, "instruction": opening}

    def step(self, text: str) -> StepResult:
        return self._running().step(text)

    def oracle(self) -> str:
        """A best action from what the conversation has shown; a transfer if the task is lost."""
        return plan(self._running())[0].text(self.tool_format)

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        return diagnose(self._start(trajectory.task_id), trajectory)

    def close(self) -> None:
        self._episode = None

    def _start(self, task_id: str) -> Episode:
        task = load_task(task_id)
        return Episode.start(task, self.max_steps, self.patience, self.tool_format)

    def _running(self) -> Episode:
        if self._episode is None or self._episode.ended:
            raise ValueError("No episode is running: call reset(task_id) before the next step.")
        return self._episode
