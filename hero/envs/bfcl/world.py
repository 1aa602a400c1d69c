"""One task under way: the agent's APIs, the gold ones beside them, and the package's verdict."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import sys
from contextlib import suppress
from typing import Any

from hero.envs.bfcl.package import Package
from hero.toolcalls import ToolCall

Call = tuple[str, list[Any], dict[str, Any]]
"""Name, positional and named arguments."""


class Apis:
    """The simulated APIs of a task in their present state."""

    def __init__(self, package: Package, task: dict[str, Any]) -> None:
        self.instances: dict[str, Any] = {}
        self.methods: dict[str, Any] = {}
        for api in task["involved_classes"]:
            instance = getattr(sys.modules[package.classes[api]], api)()
            if api not in package.stateless:
                config = copy.deepcopy(task["initial_config"].get(api, {}))
                instance._load_scenario(config, long_context="long_context" in task["id"])
            self.instances[api] = instance
            found = inspect.getmembers(instance, predicate=inspect.ismethod)
            self.methods |= {name: method for name, method in found if name[0] != "_"}

    def call(self, name: str, positional: list[Any], named: dict[str, Any]) -> str:
        """What a call answers, in the package's words."""
        try:
            if name not in self.methods:
                raise NameError(f"name {name!r} is not defined")
            answer = self.methods[name](*positional, **named)
            if isinstance(answer, dict):
                with suppress(TypeError, ValueError):
                    return json.dumps(answer)
            return str(answer)  # which Python refuses for integers of more than 4300 digits
        except Exception as error:  # simulators raise what they like
            return f"Error during execution: {error}"

    def as_call(self, expression: str) -> ToolCall:
        """A gold call with all its arguments named."""
        name, positional, named = read_gold(expression)
        bound = inspect.signature(self.methods[name]).bind(*positional, **named)
        return ToolCall(name=name, arguments=dict(bound.arguments))


def read_gold(expression: str) -> Call:
    """A call that the package writes as a Python expression."""
    call = ast.parse(expression.strip(), mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name), expression
    named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    return call.func.id, [ast.literal_eval(value) for value in call.args], named


class World:
    """The agent's APIs and the gold ones, turn of the user by turn."""

    def __init__(self, package: Package, task: dict[str, Any]) -> None:
        self.package, self.task = package, task
        self.own, self.gold = Apis(package, task), Apis(package, task)
        self.answers: list[str] = []
        """Of all calls so far."""
        self.turn = 0
        """Of the user, from 0."""
        self.steps = 0
        """Answers in this turn."""
        self.called = False
        """Whether anything was called in this turn."""
        self.fault = ""
        """What was wrong with the first turn that was; "" if none was."""

    def call(self, calls: tuple[ToolCall, ...]) -> list[str]:
        self.called = True
        found = [self.own.call(call.name, [], call.arguments) for call in calls]
        self.answers += found
        return found

    def end_turn(self) -> None:
        """Judge the user's turn as the package does, and go on to the next."""
        gold = self.task["gold"][self.turn]
        wanted = [self.gold.call(*read_gold(expression)) for expression in gold]
        if gold and not self.fault and (fault := self._fault(wanted)):
            self.fault = f"Request {self.turn + 1} is not met: {fault}."
        self.turn, self.steps, self.called = self.turn + 1, 0, False

    def _fault(self, wanted: list[str]) -> str:
        checker = self.package.checker
        if not self.called:
            return "nothing was called"
        state = checker.state_checker(self.own.instances, self.gold.instances)
        if not state["valid"]:
            # "Model instance for TravelAPI does not match the state with ground truth instance."
            api = state["error_message"].removeprefix("Model instance for ").partition(" ")[0]
            return f"the state of {api} is not what it should be"
        if not checker.response_checker(self.answers, wanted, self.turn)["valid"]:
            return "something that was asked for has not been looked up"
        return ""
