"""WebShop's files and prompts, on a hand-made catalogue.

Oracles: the prompts of verl-agent and RAGEN written out by hand from their sources; Porter's own
examples; Lucene's byte of a length, by its definition.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shop_helpers import LAMP, finish, trajectory, write_catalogue

from hero.checks import check
from hero.cli import main
from hero.commands.arguments import parse
from hero.envs import border
from hero.envs.base import make_env
from hero.envs.webshop import WebShopEnv, files, shops
from hero.envs.webshop.files import entries
from hero.envs.webshop.index import rounded
from hero.envs.webshop.words import stemmed_words

pytest.importorskip("Stemmer", reason="the extra webshop is not installed (PyStemmer)")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalogue(tmp_path_factory.mktemp("webshop"))


def test_verl_agents_prompts(data: str) -> None:
    env = WebShopEnv(data, prompt="verl-agent")
    first, info = env.reset("test-0")
    task = info["instruction"]
    end = (
        "\n\nNow it's your turn to take one action for the current step.\nYou should first reason "
        "step-by-step about the current situation, then think carefully which admissible action "
        "best advances the shopping goal. This reasoning process MUST be enclosed within <think> "
        "</think> tags. \nOnce you've finished your reasoning, you should choose an admissible "
        "action for current step and present it within <action> </action> tags.\n"
    )
    assert env.system_prompt == "" and first == (
        "\nYou are an expert autonomous agent operating in the WebShop e‑commerce environment. \n"
        f"Your task is to: {task}.\nYour current observation is: 'Search'.\n"
        "Your admissible actions of the current situation are: \n"
        "[\n'search[<your query>]',\n'click[search]',\n]." + end
    )
    page, _, _, _, info = env.step("<think>hm</think> <action>search[Desk]</action>")
    assert page.startswith("Instruction: [SEP] ") and info["executed_action"] == "search[desk]"
    results = (
        f"'Back to Search' [SEP] 'Page 1 (Total results: 1)' [SEP] 'Next >' [SEP] '{LAMP}' [SEP] "
        "'Bright Desk Lamp' [SEP] '$12.5'"
    )
    assert info["next_prompt"] == (
        "\nYou are an expert autonomous agent operating in the WebShop e‑commerce environment.\n"
        f"Your task is to: {task}.\nPrior to this step, you have already taken 1 step(s). Below "
        "are the most recent 1 observations and the corresponding actions you took: "
        "[Observation 1: ''Search'', Action 1: 'search[desk]']\n"
        f"You are now at step 2 and your current observation is: {results}.\n"
        "Your admissible actions of the current situation are: \n[\n'click[back to search]',\n"
        f"'click[next >]',\n'click[{LAMP.lower()}]',\n]." + end
    )
    env.step("no tags, click[next >]")
    info = env.step(f"<action>click[{LAMP}]</action>")[4]
    told = info["next_prompt"].split("you took: ")[1].split("\nYou are now at step 4")[0]
    second, third = told.split("\n")  # of a history of two
    assert second.startswith("[Observation 2: '") and third.startswith("[Observation 3: '")
    assert second.endswith("', Action 2: ' tags, click[next >]']")  # the last 20 characters
    item = info["next_prompt"].split("[\n'")[1].split("\n]")[0]
    assert item.startswith(
        "click[back to search]',\n'click[< prev]',\n'click[description]',\n'click[features]',\n"
        "'click[reviews]',\n'click[buy now]',\n'click["
    )


def test_ragens_prompts(data: str) -> None:
    env = WebShopEnv(data, prompt="ragen")
    assert env.system_prompt == "You're a helpful assistant. " and env.max_steps == 9
    first, info = env.reset("test-0")
    assert first.startswith("You are browsing an online shop.")
    end = (
        "You have {left} actions left. Always output: <think> [Your thoughts] </think> <answer> "
        "[your answer] </answer> with no extra text. Strictly follow this format. Max response "
        "length: 400 words (tokens).\n"
    )
    state = f"\nTurn 1:\nState:\nWebShop [SEP] Instruction: [SEP] {info['instruction']} [SEP] "
    assert f"{state}Search.We must buy a product within 10 actions." in first
    choice = "\n You must choose from these actions:{actions}.\n"
    assert first.endswith(choice.format(actions="search[<content>]") + end.format(left=9))
    seen, _, _, _, info = env.step("<think>a</think><answer>search[desk] || click[x]</answer>")
    assert info["executed_action"] == "search[desk]" and "next_prompt" not in info
    assert seen.startswith("Reward:\n0\n\nTurn 2:\nState:\nInstruction: [SEP] ")
    shown = f"click[back to search], click[next >], click[{LAMP.lower()}]"
    assert seen.endswith(choice.format(actions=shown) + end.format(left=8))
    seen, _, _, _, info = env.step("click[next >]")  # no answer: a turn, but no action
    assert not info["parse_ok"] and seen.endswith(end.format(left=8)) and "\nTurn 3:\n" in seen
    seen = env.step("<answer>click[next >]</answer>")[0]  # an empty page
    assert "actions:click[back to search], click[< prev].\n" in seen


@pytest.mark.parametrize("prompt", ["hero", "official", "verl-agent", "ragen"])
def test_oracle_and_diagnosis_speak_the_prompts_language(data: str, prompt: str) -> None:
    env = WebShopEnv(data, prompt=prompt, hints="answer")
    env.reset("test-1")
    said = env.oracle()
    twin = pickle.loads(pickle.dumps(env))
    assert twin.step(said) == env.step(said)
    assert finish(env)[0] == 1.0
    env.reset("test-1")
    for diagnosis in env.diagnose(trajectory("test-1", ["what?", said])):
        assert (diagnosis.corrected_action, bool(diagnosis.hint)) in [(said, True), ("", False)]


def test_a_whole_prompt_passes_the_border(data: str) -> None:
    env = WebShopEnv(data, prompt="verl-agent")
    border.reset(env, "test-0")
    step = border.step(env, "<action>search[desk]</action>", "test-0", 0)
    assert step.next_prompt.startswith("\nYou are an expert") and "expert" not in step.observation


def test_human_goals(tmp_path: Path) -> None:
    folder = Path(write_catalogue(tmp_path / "data"))
    entry = {
        "asin": LAMP, "attributes": ["bright light"], "options": ["size: sizea"],
        "instruction_attributes": ["bright light"],
    }  # fmt: skip
    written = [
        {**entry, "instruction": f"i want lamp number {i}.",
         "instruction_options": ["sizea", "shadeb"][: i % 3]} for i in range(1600)
    ]  # fmt: skip
    written += [{**entry, "instruction": "never", "instruction_options": [],
                 "instruction_attributes": []}]  # fmt: skip
    (folder / "items_human_ins.json").write_text(json.dumps({LAMP: written}))
    for index_dir in (None, str(tmp_path / "index")):
        env = WebShopEnv(str(folder), goals="human", index_dir=index_dir)
        assert [len(env.tasks(split)) for split in ("test", "dev", "train")] == [500, 1000, 100]
        for task in env.tasks("test")[:12]:
            _, info = env.reset(task)
            assert info["instruction"].startswith("i want lamp number ")
            assert ", and price lower than " in info["instruction"]
            number = int(info["instruction"].split("number ")[1].split(",")[0])
            reward, steps = finish(env)
            assert (reward, steps) == (1.0, 3 + min(number % 3, 2))


@pytest.mark.parametrize("mode", ["hero", "env_only", "full_demo", "grpo"])
def test_the_recipe_and_its_arms(data: str, mode: str) -> None:
    words = ["train", "webshop", "--mode", mode, "--env.options.data-dir", data]
    if mode == "grpo":
        words += ["--rollout.group-size", "8", "--rollout.tasks-per-update", "4"]
    config = parse(words).settings  # type: ignore[attr-defined]
    check(config)
    env = make_env(config.env.name, **config.env.options)
    assert (config.model.lora_rank, config.env.options["data_dir"]) == (32, data)
    assert env.system_prompt.startswith("You shop online") and env.tasks("dev")


@pytest.mark.parametrize("prompt", ["official", "verl-agent"])
def test_an_update_of_the_small_agent(data: str, prompt: str, tmp_path: Path) -> None:
    words = f"train --env.name webshop --env.options.prompt {prompt} --mode env_only --updates 1"
    words += " --threads 1 --rollout.tasks-per-update 2 --rollout.max-turns 3 --eval.dev-tasks 1"
    words += " --rollout.max-turn-tokens 8 --rollout.max-episode-tokens 1000 --eval.test-tasks 0"
    run = tmp_path / "run"
    places = ["--env.options.data-dir", data, "--output-dir", str(run)]
    assert main([*words.split(), *places]) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["optim/steps"] == 1 and metrics[-1]["divergence/mean"] > 0


def test_an_index_is_not_taken_for_another(data: str, tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    WebShopEnv(data, index_dir=index)
    shops.open_webshop.cache_clear()
    WebShopEnv(data, index_dir=index)  # built once, opened again
    with pytest.raises(ValueError, match=r"other data: \{'seed': 0\}, expected \{'seed': 3\}"):
        WebShopEnv(data, index_dir=index, seed=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        WebShopEnv(data, index_dir=str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"needs WebShop's files: --env.options.data-dir"),
        ({"data_dir": "nowhere"}, r"is not a folder"),
        ({"prompt": "verl"}, r"expected one of \['hero', 'official', 'ragen', 'verl-agent'\]"),
        ({"goals": "mine"}, r"expected one of \['human', 'synthetic'\]"),
        ({"prompt": "ragen", "observation": "text_rich"}, r"shows observation='text'"),
        ({"history": -1}, r"expected a number of steps"),
        ({"split": "x"}, r"cannot be made with the options"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_env("webshop", **options)


def test_files_that_are_not_webshops(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    products, notes = (
        Path(data, f"{name}_12.json").read_text() for name in ("items_shuffle", "items_ins_v2")
    )
    for name, text, said in [
        ("items_shuffle_1.json", None, "holds [] for 'items_shuffle*.json'"),
        ("items_shuffle_1.json", "hello", "must hold a JSON array"),
        ("items_shuffle_1.json", '[{"asin": "B1"}]', "a product lacks customization_options"),
        ("items_shuffle_1.json", '[{"asin": "B1", ', "is cut short"),
        ("title_nouns.json", "[]", "must hold a JSON object"),
        ("title_nouns.json", "{}", f"lacks the product '{LAMP}': it must hold a list for each"),
        ("items_shuffle_1.json", products.replace('"Lamp "', "null"), f"product '{LAMP}' is not"),
        ("items_shuffle_1.json", products.replace('"$12.50"', '"dear"'), f"'{LAMP}' is not as in"),
        ("items_ins_v2_1.json", notes.replace('"instruction_attr', '"attr'), f"'{LAMP}' is not as"),
        ("items_ins_v2_1.json", '{"other": {}}', "all are of the same products"),
    ]:
        folder = tmp_path / f"{abs(hash((name, text)))}"
        folder.mkdir()
        for path in Path(data).iterdir():
            (folder / path.name.replace("_12", "_1")).write_text(path.read_text())
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
        words = ["env", "check", "webshop", "--env.options.data-dir", str(folder)]
        for more in ([], ["--env.options.index-dir", f"{folder}-index"]):
            assert main([*words, *more]) == 1
            assert said in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_json_is_read_as_a_stream(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    values: list[Any] = [{"a": [1, 2.5, "x]},{"]}, [], "ü\\", 12345, None, -1e-9, True]
    path = tmp_path / "values.json"
    for text in (json.dumps(values), json.dumps(values, indent=2)):
        path.write_text(text)
        assert list(entries(path)) == values
    table = {str(i): value for i, value in enumerate(values)}
    path.write_text(json.dumps(table))
    assert dict(entries(path, "{")) == table
    path.write_text(json.dumps(values)[:-1])
    with pytest.raises(ValueError, match="cut short"):
        list(entries(path))


def test_words_are_cut_and_stemmed_as_lucene_does() -> None:
    text = (
        "The Men's Running-shoes, 3.5 inch u.s.a. size:large 1,000 foo_bar ❤️ 红色 assembly stably"
    )
    assert stemmed_words(text) == [
        "men", "run", "shoe", "3.5", "inch", "u.s.a", "size:larg", "1,000", "foo_bar", "❤️", "红",
        "色", "assembl", "stabli",
    ]  # fmt: skip
    porter = {"caresses": "caress", "ponies": "poni", "plastered": "plaster", "relational": "relat",
              "technology": "technolog", "us": "us", "possibly": "possibl"}  # fmt: skip
    assert stemmed_words(" ".join(porter)) == list(porter.values())


def test_lengths_are_rounded_as_in_lucenes_byte() -> None:
    """SmallFloat: up to 24 as they are, then the four first binary digits of what is above."""
    lengths = np.arange(0, 3000)
    for length, found in zip(lengths, rounded(lengths), strict=True):
        rest = max(int(length) - 24, 0)
        shift = max(rest.bit_length() - 4, 0)
        assert found == min(length, 24) + ((rest >> shift) << shift)
