"""Any OpenEnv server, through its client."""

from __future__ import annotations

import json
from typing import Any

from hero.envs.base import StepResult
from hero.envs.seeded import Info, Seeded
from hero.types import FeedbackKind


class OpenEnv(Seeded):
    """A running OpenEnv server; each instance has a session of its own there. Not picklable.

    Args:
        url: of the server, `http://localhost:8000`.
        action: field of the server's action that takes the agent's text; "" if the agent writes the
            whole action as a JSON object.
        observation: field of the server's observation that is shown; "" shows it all as JSON.
        rules: said to the agent first.
        success: reward of an episode from which it counts as solved.
        timeout: seconds that an answer may take.
        max_steps, num_train, num_dev, num_test: as for every seeded world.
    """

    def __init__(
        self, url: str = "", *, action: str = "message", observation: str = "", rules: str = "",
        success: float = 1.0, timeout: float = 60.0, max_steps: int = 30, num_train: int = 1000,
        num_dev: int = 100, num_test: int = 100,
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://", "ws://", "wss://")):
            raise ValueError(f"openenv needs a server: --env.options.url http://…, got {url!r}.")
        from openenv.core import GenericEnvClient

        super().__init__(
            max_steps=max_steps, num_train=num_train, num_dev=num_dev, num_test=num_test
        )
        self.system_prompt, self.success = rules, success
        self._action, self._observation, self._total = action, observation, 0.0
        client = GenericEnvClient(base_url=url, message_timeout_s=timeout)
        self._client: Any = client.sync()
        try:
            self._client.connect()
        except Exception as error:
            raise ValueError(f"No OpenEnv server answers at {url}: {error}. Start it.") from error

    def reset(self, task_id: str) -> tuple[str, Info]:
        answer = self._client.reset(seed=self.seed_of(task_id))
        self._steps, self._total = 0, 0.0
        return self._words(answer.observation), {"task_id": task_id}

    def step(self, text: str) -> StepResult:
        action: Any = {self._action: text}
        if not self._action:
            try:
                action = json.loads(text)
                if not isinstance(action, dict):
                    raise ValueError("it is not an object")
            except (ValueError, RecursionError) as error:
                said: Info = {"valid": False, "parse_ok": False}
                said["feedback_kind"] = FeedbackKind.PARSE_ERROR
                seen = f"Write the action as a JSON object: {error}."
                return seen, 0.0, False, self.cut(False), said
        answer = self._client.step(action)
        reward, done = float(answer.reward or 0.0), bool(answer.done)
        self._total += reward
        won = done and self._total >= self.success
        return self._words(answer.observation), reward, done, self.cut(done), {"success": won}

    def _words(self, observation: dict[str, Any]) -> str:
        if not self._observation:
            return json.dumps(observation, ensure_ascii=False)
        if self._observation not in observation:
            raise ValueError(
                f"The server's observation has no {self._observation!r}, only "
                f"{', '.join(observation)}: set --env.options.observation."
            )
        return str(observation[self._observation])

    def close(self) -> None:
        self._client.close()
