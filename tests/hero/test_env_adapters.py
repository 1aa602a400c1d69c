"""Worlds of other packages, each with its package.

Oracles: the contract check; the packages' own answers to the same seeds and actions.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from short_runs import train_eval_and_rollout

from hero.envs.base import make_env
from hero.envs.check import Verdict, check
from hero.envs.seeded import Seeded, chosen


def has(module: str, extra: str) -> Any:
    return pytest.importorskip(module, reason=f"the extra {extra} is not installed")


def keeps_the_contract(name: str, **options: Any) -> None:
    found = check(name, options, episodes=3)
    assert not [finding for finding in found if finding.verdict is Verdict.FAULT]


def test_seeds_of_splits_never_meet() -> None:
    world = Seeded(max_steps=3, num_train=1_000_000, num_dev=5, num_test=1_000_000)
    ends = [world.seed_of(f"{split}-{i}") for split in ("train", "test") for i in (0, 999_999)]
    assert len(set(ends) | {world.seed_of(task) for task in world.tasks("dev")}) == 9
    for task in ("dev-5", "dev--1", "train", "x-1", "dev-" + "9" * 5000):
        with pytest.raises(KeyError):
            world.seed_of(task)
    with pytest.raises(ValueError, match="num_train=0"):
        Seeded(max_steps=3, num_train=0)


@pytest.mark.parametrize(
    ("said", "action"),
    [("Left", "left"), ("I go `turn left`.", "turn left"), ("go  turn\nleft", "turn left"),
     ("leftover", None), ("", None), ("left, I think", None)],
)  # fmt: skip
def test_the_action_of_an_answer(said: str, action: str | None) -> None:
    assert chosen(said, ["left", "turn left", "right"]) == action


# ---- gymnasium -----------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1"])
def test_gymnasiums_toy_worlds(id: str) -> None:
    has("gymnasium", "gym")
    keeps_the_contract("gym", id=id)


def test_gymnasium_plays_the_same_game() -> None:
    gymnasium = has("gymnasium", "gym")
    env = make_env("gym", id="Taxi-v4")
    first, _ = env.reset("dev-3")
    plain = gymnasium.make("Taxi-v4", render_mode="ansi")
    _, info = plain.reset(seed=1_000_003)
    names = ["south", "north", "east", "west", "pickup", "dropoff"]
    possible = ", ".join(n for n, on in zip(names, info["action_mask"], strict=True) if on)
    assert first.endswith(f"Actions: {possible}.") and "\x1b" not in first
    for number in (0, 3, 4, 5, 1):
        _, reward, terminated, _, _ = plain.step(number)
        assert env.step(f"I go {names[number]}")[1:3] == (reward, terminated)
    seen, _, _, _, said = env.step("fly")
    assert "not an action" in seen and not said["parse_ok"]


def test_gymnasium_success_and_describer() -> None:
    has("gymnasium", "gym")
    env = make_env("gym", id="FrozenLake-v1", is_slippery=False, describe=f"{__name__}:tell")
    assert env.reset("train-0")[0] == "cell 0 of 16"
    for action in ("down", "down", "right", "right", "down"):
        assert not env.step(action)[2]
    seen, reward, terminated, _, info = env.step("right")
    assert (seen, reward, terminated, info["success"]) == ("cell 15 of 16", 1.0, True, True)


def tell(observation: Any, world: Any) -> str:
    return f"cell {observation} of {world.observation_space.n}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"id": "NoSuchWorld-v0"}, "gymnasium cannot make 'NoSuchWorld-v0'"),
        ({"actions": "left,right"}, "has 4 actions, got names for 2"),
        ({"success": "maybe"}, "expected 'positive' or 'terminated'"),
    ],
)
def test_gymnasium_options(options: dict[str, Any], said: str) -> None:
    has("gymnasium", "gym")
    with pytest.raises(ValueError, match=said):
        make_env("gym", **options)


# ---- TextArena -----------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["TowerOfHanoi-v0", "GuessTheNumber-v0", "Mastermind-v0"])
def test_textarenas_games(id: str) -> None:
    has("textarena", "textarena")
    keeps_the_contract("textarena", id=id)


def test_textarena_is_won_and_says_what_was_wrong() -> None:
    has("textarena", "textarena")
    env = make_env("textarena", id="TowerOfHanoi-v0")
    first, _ = env.reset("train-0")
    assert "Tower of Hanoi" in first or "disk" in first.lower()
    seen, _, _, _, info = env.step("[C A]")
    assert "invalid move" in seen and not info["valid"] and "[Player]" not in seen
    for move in ("[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]"):
        assert not env.step(move)[2]
    _, reward, terminated, _, info = env.step("[A C]")
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    with pytest.raises(ValueError, match="textarena cannot make 'NoSuch-v0'"):
        make_env("textarena", id="NoSuch-v0")


# ---- TextWorld-Express ---------------------------------------------------------------------------


def test_textworld_express() -> None:
    has("textworld_express", "textworld")
    keeps_the_contract("textworld")
    env = make_env("textworld", params="numLocations=2")
    first, info = env.reset("dev-0")
    assert info["instruction"].startswith("Your task is to search") and "\nActions: " in first
    assert "Unknown action" in env.step("sing")[0]
    env.reset("test-0")
    total, ended, success = 0.0, False, False
    while not ended:
        _, reward, terminated, truncated, said = env.step(env.oracle())  # type: ignore[attr-defined]
        total, ended, success = total + reward, terminated or truncated, said["success"]
    assert (total, success) == (1.0, True)
    env.close()
    with pytest.raises(ValueError, match=r"expected one of .*coin"):
        make_env("textworld", game="chess")


# ---- OpenEnv -------------------------------------------------------------------------------------

SERVER = """
import sys
import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

class Say(Action):
    message: str = ""

class Heard(Observation):
    text: str = ""

class Guess(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **_):
        self.number = (seed or 0) % 10
        return Heard(text=f"Guess a digit behind {self.number - 1}.", done=False, reward=0.0)

    def step(self, action, timeout_s=None, **_):
        won = action.message.strip() == str(self.number)
        return Heard(text="Right." if won else "Wrong.", done=won, reward=float(won))

    @property
    def state(self):
        return State(episode_id="", step_count=0)

app = create_fastapi_app(Guess, Say, Heard, max_concurrent_envs=20)
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    has("openenv", "openenv")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "server.py").write_text(SERVER)
    with subprocess.Popen([sys.executable, str(tmp_path / "server.py"), str(port)]) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def test_openenv(server: str) -> None:
    keeps_the_contract("openenv", url=server, observation="text")
    env = make_env("openenv", url=server, observation="text")
    assert env.reset("dev-4")[0] == "Guess a digit behind 3."
    assert env.step("9")[:3] == ("Wrong.", 0.0, False)
    seen, reward, terminated, _, info = env.step("4")
    assert (seen, reward, terminated, info["success"]) == ("Right.", 1.0, True, True)
    whole = make_env("openenv", url=server, action="")
    whole.reset("train-0")
    assert not whole.step("no json")[4]["parse_ok"]
    assert '"Right."' in whole.step('{"message": "0"}')[0]
    for one in (env, whole):
        one.close()


def test_train_eval_and_rollout_in_openenv(
    server: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--env.options", "url", server, "observation", "text"]
    train_eval_and_rollout(["--env.name", "openenv", *options], str(model_folder))


def test_openenv_without_a_server() -> None:
    has("openenv", "openenv")
    with pytest.raises(ValueError, match="No OpenEnv server answers"):
        make_env("openenv", url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="needs a server"):
        make_env("openenv")
