"""BFCL: verdicts against the package's own checker, requests, splits, and a whole update.

Skipped without the package's data: hero envs get bfcl.
"""

from __future__ import annotations

import json
import pickle
import random
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hero.checks import from_dict
from hero.cli import main
from hero.config import ModelConfig, ScratchConfig
from hero.envs import border
from hero.envs.base import HasOracle, HasTools, make_env
from hero.envs.bfcl import BfclEnv, package
from hero.envs.bfcl.package import CATEGORIES, data_folder, load_package
from hero.envs.bfcl.world import Apis, World, read_gold
from hero.envs.check import Verdict, check
from hero.envs.workers import open_workers
from hero.files import new_folder
from hero.policy import Policy
from hero.scratch import build_model
from hero.toolcalls import FORMATS, ToolCall, write_calls
from hero.trainer import Trainer
from hero.types import FeedbackKind, StopReason

HERE = (data_folder() / "bfcl_eval").is_dir()
needs_data = pytest.mark.skipif(not HERE, reason="no data: run `hero envs get bfcl`")
numbers = (f"verdict-{number}" for number in range(10**9))
"""Names under which the package keeps its instances."""


@pytest.fixture
def env() -> Iterator[BfclEnv]:
    made = BfclEnv("all")
    yield made
    made.close()


def play(env: BfclEnv, task: str, requests: list[list[list[ToolCall]]]) -> tuple[float, str]:
    """Reward and last observation of these answers with calls to each request."""
    env.reset(task)
    for answers in requests:
        for calls in answers:
            env.step(write_calls(calls, env.tool_format))
        seen, reward, done, cut, _ = env.step("Done.")
    assert done and not cut
    return reward, seen


def expression(call: ToolCall) -> str:
    """How the package writes it (model_handler/utils.py, convert_to_function_call)."""
    return f"{call.name}({','.join(f'{k}={v!r}' for k, v in call.arguments.items())})"


def verdict(task: str, requests: list[list[list[ToolCall]]]) -> bool:
    """The package's own, of the same answers."""
    found = load_package("")
    entry = found.tasks[task]
    decoded = [[[expression(c) for c in calls] for calls in answers] for answers in requests]
    judged = found.checker.multi_turn_checker(decoded, entry["gold"], entry, "", next(numbers))
    return bool(judged["valid"])


def gold_answers(task: str) -> list[list[list[ToolCall]]]:
    """One answer with all gold calls to each request that has some."""
    found = load_package("")
    apis = Apis(found, found.tasks[task])
    return [[[apis.as_call(e) for e in gold]] if gold else [] for gold in found.tasks[task]["gold"]]


@needs_data
@pytest.mark.parametrize("category", CATEGORIES)
def test_gold_pays_1_on_every_task(category: str) -> None:
    env = BfclEnv(category)
    tasks = [task for split in ("train", "dev", "test") for task in env.tasks(split)]
    assert len(tasks) == len(set(tasks)) == 200
    for task in tasks:
        env.reset(task)
        done, reward, turns = False, 0.0, 0
        while not done:
            _, reward, done, _, info = env.step(env.oracle())
            turns += 1
        assert reward == 1.0 and info["success"], task
        assert len(env._said) == turns
    assert sum(verdict(task, gold_answers(task)) for task in tasks) == 200


def corrupted(requests: list[list[list[ToolCall]]], draw: random.Random) -> Any:
    """The gold answers with one thing wrong, or only otherwise."""
    wrong = [[list(calls) for calls in answers] for answers in requests]
    turn = draw.choice([i for i, answers in enumerate(wrong) if answers])
    calls = wrong[turn][0]
    place = draw.randrange(len(calls))
    match draw.choice(["drop", "twice", "nothing", "argument", "name", "late", "reorder", "split"]):
        case "drop":
            del calls[place]
        case "twice":
            calls.insert(place, calls[place])
        case "nothing":
            wrong[turn] = []
        case "argument":
            old = calls[place]
            arguments = {
                key: "other" if isinstance(value, str) else 7
                for key, value in old.arguments.items()
            }
            calls[place] = ToolCall(name=old.name, arguments=arguments or {"no_such": 1})
        case "name":
            calls[place] = ToolCall(name="no_such_function", arguments={"a": "b"})
        case "late" if turn + 1 < len(wrong):
            wrong[turn + 1] = [calls, *wrong[turn + 1]]
            wrong[turn] = []
        case "reorder":
            calls.reverse()
        case "split":
            wrong[turn] = [[call] for call in calls]
    return [[answer for answer in answers if answer] for answers in wrong]


@needs_data
def test_corrupted_answers_get_the_package_s_verdict(env: BfclEnv) -> None:
    draw, found = random.Random(0), []
    for task in draw.sample(sorted(load_package("").tasks), 300):
        answers = corrupted(gold_answers(task), draw)
        reward, seen = play(env, task, answers)
        assert reward == float(verdict(task, answers)), (task, answers, seen)
        assert (reward == 1.0) != ("is not met" in seen)
        found.append(reward)
    assert 0.2 < sum(found) / len(found) < 0.8  # both kinds were among them


@needs_data
def test_requests_follow_one_another(env: BfclEnv) -> None:
    task = load_package("").tasks["multi_turn_miss_func_0"]
    hidden = task["missed_function"]["3"][0]
    first, info = env.reset(task["id"])
    assert first == info["instruction"] == task["question"][0][0]["content"]
    names = [tool["function"]["name"] for tool in env.tools()]
    assert hidden not in names and "grep" in names
    kinds = [tool["function"]["parameters"]["type"] for tool in env.tools()]
    assert set(kinds) == {"object"}
    seen = env.step(write_calls([ToolCall(name="pwd"), ToolCall(name="ls")], "react"))
    assert seen[0].count("\n") == 1 and seen[4]["role"] == "tool" and seen[4]["valid"]
    said = [env.step("That is done.") for _ in range(3)]
    assert [s[4]["role"] for s in said] == ["user"] * 3
    assert said[0][0] == task["question"][1][0]["content"]
    added, _, words = said[2][0].rpartition("\n")
    assert [schema["name"] for schema in json.loads(added)] == [hidden]
    assert words == "I have updated some more functions you can choose from. What about now?"
    env.step("Fine.")
    last, reward, done, _, info = env.step("Done.")
    assert (reward, done, info["feedback_kind"]) == (0.0, True, FeedbackKind.INSUFFICIENT)
    assert last.endswith("Request 1 is not met: the state of GorillaFileSystem is not what it "
                         "should be.")  # fmt: skip
    with pytest.raises(RuntimeError, match="reset"):
        env.step("More?")


@needs_data
@pytest.mark.parametrize("format", FORMATS)
def test_calls_of_every_format_and_what_cannot_be_read(env: BfclEnv, format: str) -> None:
    env.tool_format = format
    env.reset("multi_turn_base_0")
    seen, _, _, _, info = env.step('Sure: {"name": "cd", "argu')
    assert (info["parse_ok"], info["feedback_kind"]) == (False, FeedbackKind.PARSE_ERROR)
    assert "could not be read" in seen and info["role"] == "tool"
    for call, words in (
        (ToolCall(name="cd", arguments={"folder": "nowhere"}), "No such file"),
        (ToolCall(name="fly"), "name 'fly' is not defined"),
        (ToolCall(name="cd", arguments={"x": 1}), "unexpected keyword argument"),
    ):
        seen, _, _, _, info = env.step(write_calls([call], format))
        assert words in seen and info["feedback_kind"] is FeedbackKind.INVALID_ACTION
    seen, _, _, _, info = env.step(write_calls([ToolCall(name="pwd")], format))
    assert "current_working_directory" in seen and info["feedback_kind"] is FeedbackKind.OK


@needs_data
def test_a_request_that_does_not_end_is_given_up_as_in_the_package(env: BfclEnv) -> None:
    env.reset("multi_turn_base_0")
    steps = [env.step(write_calls([ToolCall(name="pwd")], "react")) for _ in range(21)]
    assert [s[3] for s in steps] == [False] * 20 + [True]
    assert steps[-1][1] == 0.0 and steps[-1][4]["feedback_kind"] is FeedbackKind.BUDGET
    with pytest.raises(RuntimeError, match="reset"):
        env.step("More?")


@needs_data
def test_splits_share_no_scenario_and_no_data() -> None:
    tasks = load_package("").tasks
    seen: dict[str, str] = {}
    for split, size in (("train", 100), ("dev", 20), ("test", 80)):
        one = [task.rpartition("_")[2] for task in BfclEnv("base").tasks(split)]
        for category in CATEGORIES:
            ids = BfclEnv(category).tasks(split)
            assert [task.rpartition("_")[2] for task in ids] == one and len(ids) == size
            for task in ids:
                config = json.dumps(tasks[task]["initial_config"], sort_keys=True)
                assert seen.setdefault(config, split) == split
        assert len(BfclEnv("all").tasks(split)) == 4 * size


@needs_data
def test_instances_pickle_within_an_episode(env: BfclEnv) -> None:
    env.reset("multi_turn_long_context_150")
    for _ in range(3):
        env.step(env.oracle())
    other = pickle.loads(pickle.dumps(env))
    done = False
    while not done:
        action = env.oracle()
        assert other.oracle() == action
        expected = env.step(action)
        assert other.step(action) == expected
        done = expected[2]
    assert expected[1] == 1.0
    assert pickle.loads(pickle.dumps(BfclEnv())).tasks("dev") == BfclEnv().tasks("dev")


@needs_data
def test_the_contract_is_kept_in_milliseconds(env: BfclEnv) -> None:
    assert isinstance(env, HasOracle) and isinstance(env, HasTools)
    assert not [f for f in check("bfcl", {}, 5) if f.verdict is Verdict.FAULT]
    tasks = sorted(load_package("").tasks)[::8]
    began = time.perf_counter()
    for task in tasks:
        World(load_package(""), load_package("").tasks[task])
    assert (time.perf_counter() - began) / len(tasks) < 0.1  # 3 ms alone on the machine


@needs_data
def test_a_long_computation_stops_nobody_else(env: BfclEnv) -> None:
    task = next(t["id"] for t in env._package.tasks.values() if "MathAPI" in t["involved_classes"])
    workers = open_workers("auto", BfclEnv, env, 1, timeout=0.3)
    power = ToolCall(name="power", arguments={"base": 7, "exponent": 30_000_000})
    found, began = [], 0.0
    for job in ((border.begin, task, "react", None),
                (border.step, write_calls([power], "react"), task, 0)):  # fmt: skip
        began = time.perf_counter()
        workers.submit(0, *job)
        found += [answer for _, answer in workers.done(wait=True)]
    assert time.perf_counter() - began < 5  # it would take longer
    workers.close()
    assert "no answer within rollout.step_timeout=0.3 s" in str(found[1])


@needs_data
def test_an_integer_that_cannot_be_written_is_an_error_of_the_call(env: BfclEnv) -> None:
    task = next(t for t in env._package.tasks.values() if "MathAPI" in t["involved_classes"])
    answer = Apis(env._package, task).call("power", [], {"base": 7, "exponent": 8000})
    assert answer.startswith("Error during execution: Exceeds the limit (4300 digits)")


@needs_data
def test_mistakes_are_said(env: BfclEnv) -> None:
    with pytest.raises(ValueError, match="expected base, miss_func"):
        make_env("bfcl", category="memory")
    with pytest.raises(ValueError, match="split='x'"):
        env.tasks("x")
    with pytest.raises(KeyError, match="no task 'x'"):
        env.reset("x")
    assert read_gold("sort('final.pdf')") == ("sort", ["final.pdf"], {})


def test_without_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_package.cache_clear()
    assert main(["rollout", "tiny-shop", "--env.name", "bfcl"]) == 1
    assert "Run: hero envs get bfcl" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="does not hold the package"):
        BfclEnv(data_dir=str(tmp_path))
    load_package.cache_clear()
    assert main(["envs", "get", "shop"]) == 1
    assert "expected bfcl" in capsys.readouterr().err


def test_another_wheel_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip takes the wheel from a folder: one that is not the tested one."""
    wheel = tmp_path / f"bfcl_eval-{package.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = f"bfcl_eval-{package.VERSION}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: bfcl-eval\n"
                         f"Version: {package.VERSION}\n")  # fmt: skip
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be downloaded: .*Expected sha256 3bb6dfa5"):
        package.fetch(lambda text: None)
    wheel.unlink()
    with pytest.raises(ValueError, match=r"bfcl-eval==\S+ could not be downloaded: No matching"):
        package.fetch(lambda text: None)
    with new_folder(data_folder()) as folder:  # nothing was left behind
        assert not list(folder.iterdir())


@needs_data
def test_a_whole_update_and_an_evaluation(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ScratchConfig(width=32, layers=1, heads=2, context=40000)
    policy = Policy(build_model(shape, tiny_tokenizer), tiny_tokenizer, ModelConfig(device="cpu"))
    data = {
        "env": {"name": "bfcl"}, "updates": 1, "eval": {"dev_tasks": 1, "test_tasks": 0},
        "rollout": {"tasks_per_update": 1, "max_turns": 2, "max_turn_tokens": 8,
                    "max_episode_tokens": 30000, "batch_size": 2},
        "reflection": {"max_tokens": 16, "retries": 0}, "teacher": {"max_privileged_tokens": 64},
    }  # fmt: skip
    run = tmp_path / "run"
    summary = Trainer(from_dict(data), run, policy=policy).run()
    assert summary["world"]["environment"] == "bfcl multi-turn base, bfcl-eval 2026.3.23"
    episodes = [json.loads(line) for line in (run / "trajectories.jsonl").read_text().splitlines()]
    assert episodes and all(e["stop_reason"] != StopReason.ENV_ERROR for e in episodes)
    policy.save(tmp_path / "model")
    caps = [f"--rollout.{name.replace('_', '-')}={value}" for name, value in data["rollout"].items()
            if name != "tasks_per_update"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert (
        main(["eval", "model", "--env.name", "bfcl", "--tasks", "1", *caps, "--output", "o"]) == 0
    )
    assert json.loads((tmp_path / "o/model/eval.json").read_text())["success"] == 0.0
    words = ["rollout", "model", "--env.name", "bfcl", "--tasks", "1", *caps]
    assert main([*words, "--output", "e.jsonl"]) == 0
    [episode] = map(json.loads, (tmp_path / "e.jsonl").read_text().splitlines())
    assert episode["turns"] and episode["stop_reason"] != "env_error"
