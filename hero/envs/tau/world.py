"""One episode's state of tau2's world: calls, the transcript, and the package's own reward.

The package replays a whole transcript in a new environment to judge it. Here the live environment
is the one that is judged, and the hash of the gold one is kept for each task; the evaluators of
actions and of what was communicated are the package's.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from hero.envs.tau.package import Domain, load_domain
from hero.toolcalls import ToolCall

MAX_ERRORS = 10
"""Failed calls of an episode, as in the package's orchestrator."""


class World:
    """A task under way.

    The base environment is copied when something is about to be written; a copy of airline's
    database takes a third of a second and 20 MB, and most episodes begin with reading.
    """

    def __init__(self, domain: Domain, task: Any) -> None:
        self.domain, self.task = domain, task
        self.transcript: list[Any] = []
        self.errors = 0
        self._own: Any = None
        if task.initial_state is not None:
            self.transcript = copy.deepcopy(task.initial_state.message_history or [])
            _begin(self._writable(), task)

    @property
    def environment(self) -> Any:
        return self.domain.base if self._own is None else self._own

    def _writable(self) -> Any:
        if self._own is None:
            self._own = copy.deepcopy(self.domain.base)
        return self._own

    def __getstate__(self) -> dict[str, Any]:
        kept = {**self.__dict__, "task": self.task.id}
        kept["domain"] = self.domain.key
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.domain = load_domain(*state["domain"])
        self.task = self.domain.tasks[state["task"]]

    def call(self, calls: list[ToolCall], requestor: str = "assistant") -> list[tuple[str, bool]]:
        """Run calls in order: (answer, whether it failed) of each."""
        from tau2.data_model import message as m

        made = [
            m.ToolCall(id=f"call{len(self.transcript)}-{i}", name=c.name,
                       arguments=copy.deepcopy(c.arguments), requestor=requestor)
            for i, c in enumerate(calls)
        ]  # fmt: skip
        kind = m.AssistantMessage if requestor == "assistant" else m.UserMessage
        self.transcript.append(kind(role=kind.model_fields["role"].annotation.__args__[0],
                                    tool_calls=made))  # fmt: skip
        answers = []
        for call in made:
            environment = self.environment if self._reads(call.name) else self._writable()
            answer = environment.get_response(call)
            self.errors += answer.error
            self.transcript.append(answer)
            answers.append((str(answer.content), bool(answer.error)))
        return answers

    def _reads(self, name: str) -> bool:
        """Whether a tool only reads; telecom's look at a phone that changes: never."""
        tools = self.domain.base.tools
        if self.domain.base.user_tools is not None or not tools.has_tool(name):
            return False
        return bool(tools.tool_type(name).value != "write")

    def say(self, role: str, text: str) -> None:
        """Put a message of "assistant" or "user" into the transcript."""
        from tau2.data_model.message import AssistantMessage, UserMessage

        kind = AssistantMessage if role == "assistant" else UserMessage
        self.transcript.append(kind(role=role, content=text))

    def reward(self) -> float:
        """The package's reward of what was done and said: 0 or 1.

        Raises:
            ValueError: the task is judged by assertions in natural language, which need a model.
        """
        from tau2.evaluator.evaluator_action import ActionEvaluator
        from tau2.evaluator.evaluator_communicate import CommunicateEvaluator

        criteria = self.task.evaluation_criteria
        if criteria is None:
            return 1.0
        basis = {kind.value for kind in criteria.reward_basis}
        if not criteria.nl_assertions:
            basis.discard("NL_ASSERTION")
        if unknown := basis - {"DB", "ENV_ASSERTION", "ACTION", "COMMUNICATE"}:
            raise ValueError(f"Task {self.task.id!r} is judged by {unknown}; expected none of it.")
        judged = criteria.actions is not None or criteria.env_assertions is not None
        reward = 1.0
        if "DB" in basis and judged:
            reward *= self._hashes() == gold_hashes(*self.domain.key, self.task.id)
        if "ENV_ASSERTION" in basis and judged:
            for assertion in criteria.env_assertions or ():
                reward *= self._holds(assertion)
        for kind, evaluator in (("ACTION", ActionEvaluator), ("COMMUNICATE", CommunicateEvaluator)):
            if kind in basis:
                reward *= evaluator.calculate_reward(self.task, self.transcript).reward
        return float(reward)

    def _holds(self, assertion: Any) -> bool:
        """One that cannot be judged ("Task task_2 not found") does not hold; tau2 would raise."""
        try:
            environment = self._writable()
            return bool(environment.run_env_assertion(assertion, raise_assertion_error=False))
        except Exception:  # tools raise what they like
            return False

    def _hashes(self) -> tuple[Any, Any]:
        if self._own is None:
            return _first_hashes(self.domain.name, self.domain.solo)
        return _hashes(self._own)


def _hashes(environment: Any) -> tuple[Any, Any]:
    return environment.get_db_hash(), environment.get_user_db_hash()


def _begin(environment: Any, task: Any) -> None:
    state = task.initial_state
    environment.set_state(
        state.initialization_data, state.initialization_actions, state.message_history or []
    )


@cache
def _first_hashes(domain: str, solo: bool) -> tuple[Any, Any]:
    return _hashes(load_domain(domain, solo).base)


@cache
def gold_hashes(domain: str, solo: bool, version: str, task_id: str) -> tuple[Any, Any]:
    """Hashes of both databases after the gold actions; one that fails is skipped, as in tau2."""
    loaded = load_domain(domain, False)  # the package's gold environment has a user
    task = load_domain(domain, solo, version).tasks[task_id]
    actions = task.evaluation_criteria.actions or []
    if task.initial_state is None and not any(_may_write(loaded.base, a.name) for a in actions):
        return _first_hashes(domain, False)
    environment = copy.deepcopy(loaded.base)
    if task.initial_state is not None:
        _begin(environment, task)
    for action in actions:
        try:
            environment.make_tool_call(
                tool_name=action.name, requestor=action.requestor,
                **copy.deepcopy(action.arguments),
            )  # fmt: skip
        except Exception:  # tools raise what they like
            continue
    return _hashes(environment)


def _may_write(base: Any, name: str) -> bool:
    known = base.user_tools is None and base.tools.has_tool(name)
    return not known or base.tools.tool_type(name).value == "write"
