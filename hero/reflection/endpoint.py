"""A stronger model behind an OpenAI-compatible endpoint reflects: an ablation of the paper."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from urllib.parse import urlsplit

from hero.config import ReflectionConfig
from hero.reflection.models import Answer
from hero.renderer import Renderer
from hero.types import Fault

WORKERS = 8
"""Requests under way at the same time."""


class ReflectionError(Fault):
    """The endpoint gave no answer. Nothing is trained on an episode that was not read."""


class Endpoint:
    """Any endpoint that speaks OpenAI's chat completions: a hosted model, vLLM, llama.cpp, Ollama.

    Args:
        config: address, model, temperature and length of an answer.
        renderer: counts the tokens of answers where the endpoint does not.
        timeout: seconds to wait for one answer.

    Raises:
        ImportError: the openai package is missing.
        ValueError: no base_url, no model, or no API key for an endpoint elsewhere than on this
            machine.
    """

    def __init__(
        self, config: ReflectionConfig, renderer: Renderer, timeout: float = 120.0
    ) -> None:
        if not config.base_url or not config.model:
            raise ValueError(
                "reflection.reflector=openai needs reflection.base_url and reflection.model, got "
                f"{config.base_url!r} and {config.model!r}."
            )
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "reflection.reflector=openai needs the openai package: "
                "pip install 'hero-kernels[openai]'"
            ) from error
        self.config = config
        self.renderer = renderer
        self.client = openai.OpenAI(
            base_url=config.base_url, api_key=_api_key(config), timeout=timeout
        )

    def answer(self, requests: Sequence[str], seed: int) -> list[Answer]:
        # The first failure is raised at once; requests that have not been sent are dropped with it.
        with ThreadPoolExecutor(min(WORKERS, len(requests))) as pool:
            return list(pool.map(partial(self._ask, seed=seed), requests))

    def _ask(self, request: str, seed: int) -> Answer:
        import openai

        try:
            reply = self.client.chat.completions.create(
                model=self.config.model,
                messages=[{"role": "user", "content": request}],
                temperature=self.config.temperature,
                max_tokens=self.config.max_tokens,
                seed=seed,
            )
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise self._error(f"{type(error).__name__}: {error}") from error
        # The client does not validate: an error page arrives as a str, an error without choices.
        choices = getattr(reply, "choices", None)
        if not choices:
            raise self._error(f"no chat completion, but {str(reply)[:200]!r}")
        text = choices[0].message.content or ""
        usage = reply.usage
        num_tokens = usage.completion_tokens if usage else len(self.renderer.encode(text))
        return Answer(text=text, num_tokens=num_tokens)

    def _error(self, cause: str) -> ReflectionError:
        return ReflectionError(
            f"The reflector at {self.config.base_url} (model {self.config.model!r}) failed:"
            f" {cause}. Check that the endpoint runs and that reflection.base_url, reflection.model"
            f" and the key in {self.config.api_key_env} are right, or set "
            "--reflection.reflector self."
        )


def _api_key(config: ReflectionConfig) -> str:
    if key := os.environ.get(config.api_key_env):
        return key
    if _is_loopback(config.base_url):
        return "none"  # local servers ask for no key, but the client insists on one
    raise ValueError(
        f"The environment variable {config.api_key_env} holds no API key for {config.base_url}: "
        "export it, or name another variable with --reflection.api-key-env."
    )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
