"""From settings to a reflector."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from hero.config import ReflectionConfig
from hero.envs.base import Environment, HasDiagnosis
from hero.envs.border import diagnose, system_prompt, tools
from hero.prompts import Prompts
from hero.reflection.base import Reflector
from hero.reflection.endpoint import Endpoint
from hero.reflection.models import ChatModel, OwnModel
from hero.reflection.reflectors import ModelReflector, RuleReflector
from hero.reflection.shuffle import ShuffledReflector
from hero.reflection.verify import VerifiedReflector
from hero.reflection.votes import VotingReflector
from hero.renderer import Renderer
from hero.sampling import Sampler
from hero.toolcalls import example


def make_reflector(
    config: ReflectionConfig,
    *,
    env: Environment,
    sampler: Sampler,
    teacher_sampler: Sampler | None = None,
    renderer: Renderer,
    prompts: Prompts,
    teacher_weights: Callable[[], AbstractContextManager[object]],
    context: int,
) -> Reflector:
    """The reflector that `config` asks for: asked several times, verified, its hints shuffled.

    Args:
        teacher_sampler: samples from another model that is the teacher; None is `sampler`.
        teacher_weights: makes a context in which it samples from the teacher's weights.
        context: longest sequence of the model that is asked.

    Raises:
        ValueError: `rules` for an environment that has no `diagnose`, or a setting that the
            reflector cannot work with.
    """
    reflector: Reflector
    shared = getattr(env, "action_words", "")
    if config.reflector == "rules":
        if not isinstance(env, HasDiagnosis):
            raise ValueError(
                f"reflection.reflector=rules needs an environment with a diagnose method, and "
                f"{type(env).__name__} has none: write diagnose(trajectory) -> list[Diagnosis], or "
                "set --reflection.reflector self."
            )
        reflector = RuleReflector(partial(diagnose, env), renderer, config, shared)
    else:
        model: ChatModel
        room: int | None = None  # the length of an endpoint's context is not known
        if config.reflector == "openai":
            model = Endpoint(config, renderer)
        else:
            if config.reflector == "teacher":
                model = OwnModel(teacher_sampler or sampler, renderer, config, teacher_weights)
            else:
                model = OwnModel(sampler, renderer, config)
            room = _room(config, context)
        reflector = ModelReflector(
            model,
            config,
            prompts,
            renderer,
            rules=_rules(env, renderer),
            max_prompt_tokens=room,
            shared=shared,
        )
    if config.votes > 1:
        reflector = VotingReflector(reflector, config.votes)
    if config.verify:
        reflector = VerifiedReflector(reflector, env)
    if config.shuffle_hints == "off":
        return reflector
    return ShuffledReflector(reflector, config.shuffle_hints)


def _rules(env: Environment, renderer: Renderer) -> str:
    """The rules of the agent; at their end, which is kept when they are shortened, its tools."""
    rules = system_prompt(env)
    if not (schemas := tools(env)):
        return rules
    names = ", ".join(schema["function"]["name"] for schema in schemas)
    return f"{rules}\n\nTools: {names}\nAn action that calls one: {example(renderer.tool_format)}"


def _room(config: ReflectionConfig, context: int) -> int:
    """Tokens left for a request."""
    if config.max_tokens >= context:
        raise ValueError(
            f"reflection.max_tokens={config.max_tokens} leaves no room for the episode in the "
            f"model's context of {context} tokens: lower --reflection.max-tokens."
        )
    return context - config.max_tokens
