"""The recipes of the paper's setting, rendered with their model family's chat template.

data/qwen3-instruct-2507.jinja is the template of Qwen3-4B-Instruct-2507 (Apache-2.0), as TRL keeps
it. The oracle is the template itself, applied to whole conversations.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shop_helpers import DATA

from hero.algorithms import MODES, Experience
from hero.checks import check, from_dict
from hero.config import TrainConfig
from hero.envs.base import HasOracle, HasTools, make_env
from hero.envs.bfcl.package import data_folder
from hero.envs.registry import worlds
from hero.prompts import make_prompts
from hero.recipes import load_recipe
from hero.renderer import Renderer
from hero.teacher import TeacherContext
from hero.types import Diagnosis, StopReason, Trajectory
from tests.hero import made

TEMPLATE = Path(__file__).parent / "data" / "qwen3-instruct-2507.jinja"
ARMS = ("", "-full", "-env-only", "-full-demo", "-grpo")
RECIPES = [f"{world}{arm}" for world in ("tau-retail", "webshop") for arm in ARMS]
HINT = "Look first, then act."
CLOSE = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def qwen(tiny_tokenizer: Any) -> Renderer:
    """The family's template over a token for each character."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return Renderer(tokenizer)


def environment(config: TrainConfig) -> Any:
    """The recipe's, or a skip that says what is missing."""
    name = config.env.name
    if missing := worlds()[name].missing:
        pytest.skip(f"{name} lacks {', '.join(missing)}: {worlds()[name].install}")
    if name == "bfcl" and not data_folder().is_dir():
        pytest.skip("no data: hero envs get bfcl")
    if name == "webshop" and not DATA.is_dir():
        pytest.skip(f"no WebShop data in {DATA.name}: set HERO_WEBSHOP_DATA")
    more = {"data_dir": str(DATA)} if name == "webshop" else {}
    return make_env(name, **config.env.options, **more)


def played(env: Any, renderer: Renderer, task: str) -> tuple[Trajectory, list[dict[str, str]]]:
    """Two turns of the oracle, and the conversation as messages."""
    if isinstance(env, HasTools):
        env.tool_format = renderer.tool_format
    first, info = env.reset(task)
    messages = [
        {"role": "system", "content": env.system_prompt},
        {"role": "user", "content": first},
    ]
    prompt, turns = renderer.start(messages, tools_of(env)), []
    for _ in range(2):
        assert isinstance(env, HasOracle)
        action = env.oracle()
        seen, _, done, cut, after = env.step(action)
        ids = [*renderer.encode(action), renderer.end_id]
        turns.append(made.turn(action, seen, ids, prompt_ids=prompt))
        role = after.get("role", "user")
        messages += [{"role": "assistant", "content": action}, {"role": role, "content": seen}]
        prompt = prompt + ids + renderer.observe(ids, role, seen)
        if done or cut:
            break
    given = {"instruction": info["instruction"], "reward": 0.5, "stop_reason": StopReason.MAX_TURNS}
    return made.episode(task, *turns, **given), messages


def tools_of(env: Any) -> list[dict[str, Any]]:
    return env.tools() if isinstance(env, HasTools) else []


@pytest.mark.parametrize("name", [*RECIPES, "tau-airline", "bfcl"])
def test_a_recipe_is_rendered_as_its_model_s_template_would(name: str, qwen: Renderer) -> None:
    config = from_dict(load_recipe(name))
    check(config)
    assert config.model.path == "Qwen/Qwen3-4B-Instruct-2507"
    env = environment(config)

    def text(ids: list[int]) -> str:
        return qwen.tokenizer.decode(ids).replace("<unk>", "")

    def rendered(messages: list[dict[str, str]], tools: list[dict[str, Any]]) -> str:
        whole = qwen.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        return text(qwen.encode(whole))

    episode, messages = played(env, qwen, env.tasks("train")[0])
    tools = tools_of(env)
    for k, turn in enumerate(episode.turns):
        assert text(turn.prompt_ids) == rendered(messages[: 2 + 2 * k], tools)
    prompts = make_prompts(config.prompts)
    context = TeacherContext(config.teacher, qwen, prompts)
    told = [Diagnosis(turn=k, hint=HINT) for k in range(len(episode.turns))]
    batch = Experience(
        trajectories=[episode, episode],
        diagnoses=[told, told],
        gold={episode.task_id: (("a", "b"),)},
    )
    samples = MODES[config.mode](context, config.loss).samples(batch)
    for sample in samples if MODES[config.mode].distils else ():
        own = rendered(messages[: 2 + 2 * sample.turn], tools)
        block = text(sample.privileged_ids)  # at the end of the last message, behind tool answers
        assert block and own.endswith(CLOSE)
        assert text(sample.teacher_prompt_ids) == own.removesuffix(CLOSE) + block + CLOSE
    clip = partial(qwen.clip, max_tokens=config.reflection.max_observation_tokens)
    request = prompts.reflection(episode, qwen.clip(env.system_prompt, 2000), clip)
    asked = [{"role": "user", "content": request}]
    assert text(qwen.start(asked)) == rendered(asked, []) and episode.instruction in request
