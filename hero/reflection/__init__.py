"""Hindsight reflection: a finished episode in, one diagnosis for each of its turns out.

base.py        Reflector, Reflections, ReflectionStats: the contract
parse.py       text of a model -> diagnoses, however badly written
filters.py     hints that are too long, or that tell what could not be known, are removed
reflectors.py  who diagnoses: the student, its teacher, or the environment's rules
endpoint.py    who diagnoses: an OpenAI-compatible endpoint
shuffle.py     the control experiment: hints of another task
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from hero.config import ReflectionConfig
from hero.envs.base import Environment, HasDiagnosis
from hero.generation.base import Generator
from hero.prompts import Prompts
from hero.reflection.base import Reflections, ReflectionStats, Reflector
from hero.reflection.endpoint import OpenAIReflector, ReflectionError
from hero.reflection.filters import HintFilter, Verdict
from hero.reflection.parse import parse_diagnoses
from hero.reflection.reflectors import ModelReflector, RuleReflector
from hero.reflection.shuffle import ShuffledReflector, shuffle_hints
from hero.renderer import Renderer

__all__ = [
    "HintFilter",
    "ModelReflector",
    "OpenAIReflector",
    "ReflectionError",
    "ReflectionStats",
    "Reflections",
    "Reflector",
    "RuleReflector",
    "ShuffledReflector",
    "Verdict",
    "make_reflector",
    "parse_diagnoses",
    "shuffle_hints",
]


def make_reflector(
    config: ReflectionConfig,
    *,
    env: Environment,
    generator: Generator,
    renderer: Renderer,
    prompts: Prompts,
    teacher_weights: Callable[[], AbstractContextManager[object]],
    max_prompt_tokens: int | None = None,
) -> Reflector:
    """The reflector that `config` asks for, with its hints shuffled if `config.shuffle_hints`.

    Args:
        teacher_weights: makes a context in which `generator` samples from the teacher's weights.
        max_prompt_tokens: longest reflection prompt the model can read; None for no limit.

    Raises:
        ValueError: `rules` for an environment that has no `diagnose`, or a setting that the
            reflector cannot work with.
    """
    reflector: Reflector
    if config.reflector == "rules":
        if not isinstance(env, HasDiagnosis):
            raise ValueError(
                f"reflection.reflector=rules needs an environment with a diagnose method, and "
                f"{type(env).__name__} has none: write diagnose(trajectory) -> list[Diagnosis], or "
                "set --reflection.reflector self."
            )
        reflector = RuleReflector(env.diagnose, renderer, config)
    elif config.reflector == "openai":
        reflector = OpenAIReflector(
            config, prompts, renderer, env.system_prompt, max_prompt_tokens=max_prompt_tokens
        )
    else:
        reflector = ModelReflector(
            generator,
            renderer,
            prompts,
            config,
            source=config.reflector,
            policy=env.system_prompt,
            weights=teacher_weights if config.reflector == "teacher" else nullcontext,
            max_prompt_tokens=max_prompt_tokens,
        )
    return ShuffledReflector(reflector) if config.shuffle_hints else reflector
