"""A stronger model behind an OpenAI-compatible endpoint reflects: an ablation of the paper."""

from __future__ import annotations

import json
import os
import time
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from hero.config import ReflectionConfig, redacted
from hero.reflection.models import Answer
from hero.reflection.wire import post
from hero.renderer import Renderer
from hero.text import harmless
from hero.types import Fault, Message

WORKERS = 8
"""Requests under way at the same time."""


NO_KEY = "none"
RETRIES = 2
"""Of a request that may succeed the second time: no connection, too many requests, 5xx."""
PAUSE = 0.5
"""Seconds before the first retry; doubled for the next."""
CHARS_PER_TOKEN = 64
"""Of `max_tokens`: an endpoint that sends more does not keep to them, and is not read further."""
MAX_TOKENS = 10**9
"""Of one answer, as the endpoint counts them: more is no count."""


class ReflectionError(Fault):
    """The endpoint gave no answer. Nothing is trained on an episode that was not read."""


class Endpoint:
    """Any endpoint that speaks OpenAI's chat completions: a hosted model, vLLM, llama.cpp, Ollama.

    Args:
        config: address, model, temperature and length of an answer.
        renderer: counts the tokens of answers where the endpoint does not; None for `chat` alone.
        timeout: seconds for one answer, retries included, however slowly it comes.

    Raises:
        ValueError: no base_url, no model, or no API key for an endpoint elsewhere than on this
            machine.
    """

    who, asked_by = "The reflector", "reflection.reflector=openai"
    base_url, model = "reflection.base_url", "reflection.model"
    remedy = "--reflection.reflector self"

    def __init__(
        self, config: ReflectionConfig, renderer: Renderer | None, timeout: float = 120.0
    ) -> None:
        if not config.base_url or not config.model:
            raise ValueError(
                f"{self.asked_by} needs {self.base_url} and {self.model}, got "
                f"{config.base_url!r} and {config.model!r}."
            )
        self.config = config
        self.renderer = renderer
        self.timeout = timeout
        self.url, self.headers = _address(config)

    def answer(self, requests: Sequence[str], seed: int) -> list[Answer]:
        # The first failure is raised at once; requests that have not been sent are dropped with it.
        with ThreadPoolExecutor(min(WORKERS, len(requests))) as pool:
            return list(pool.map(partial(self._ask, seed=seed), requests))

    def _ask(self, request: str, seed: int) -> Answer:
        text, num_tokens = self.chat([{"role": "user", "content": request}], seed)
        if num_tokens is None:
            assert self.renderer is not None
            num_tokens = len(self.renderer.encode(text))
        return Answer(text=text, num_tokens=num_tokens)

    def chat(self, messages: Sequence[Message], seed: int) -> tuple[str, int | None]:
        """The answer to a conversation, and its tokens where the endpoint counts them."""
        body = {
            "model": self.config.model,
            "messages": list(messages),
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            "seed": seed,
        }
        try:
            text, num_tokens = _read_completion(self._post(body))
        except (OSError, ValueError, RecursionError, HTTPException) as error:
            raise self._error(f"{type(error).__name__}: {error}") from error
        return text[: CHARS_PER_TOKEN * self.config.max_tokens], num_tokens

    def _post(self, body: dict[str, Any]) -> bytes:
        """The body of the answer, asked for again where that may help and time is left."""
        end = time.monotonic() + self.timeout
        for attempt in range(RETRIES + 1):
            pause = PAUSE * 2**attempt
            last = attempt == RETRIES or time.monotonic() + pause >= end
            try:
                status, data = post(self.url, body, self.headers, end - time.monotonic())
            except TimeoutError:
                raise TimeoutError(f"no complete answer after {self.timeout:g} s") from None
            except (OSError, HTTPException):
                if last:
                    raise
            else:
                if status == 200:
                    return data
                if last or (status not in (408, 409, 429) and status < 500):
                    raise ValueError(f"HTTP {status}, {_shown(data)}")
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _error(self, cause: str) -> ReflectionError:
        secret = self.headers["Authorization"].partition(" ")[2]
        if secret != NO_KEY:  # an endpoint may echo it
            cause = cause.replace(secret, "***")
        return ReflectionError(redacted(
            f"{self.who} at {self.config.base_url} (model {self.config.model!r}) failed:"
            f" {harmless(cause)}. Check that the endpoint runs and that {self.base_url},"
            f" {self.model} and the key in {self.config.api_key_env} are right, or set "
            f"{self.remedy}."
        ))  # fmt: skip


def _read_completion(data: bytes) -> tuple[str, int | None]:
    """Text of a chat completion, and its tokens if they were counted.

    A refusal, whose content is null, is an empty text.

    Raises:
        ValueError: the answer is anything else.
    """
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"an answer that is not JSON ({error}): {_shown(data)}") from error
    try:
        choice = reply["choices"][0]
        text, usage = choice["message"]["content"], reply.get("usage")
        num_tokens = None if usage is None else usage.get("completion_tokens")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"no chat completion, but {_shown(data)}") from error
    if not isinstance(text, str | None):
        raise ValueError(f"no text, but {_shown(data)}")
    if num_tokens is not None and (type(num_tokens) is not int or not 0 <= num_tokens < MAX_TOKENS):
        raise ValueError(f"no number of tokens, but {_shown(data)}")
    return harmless(text or ""), num_tokens


def _shown(data: bytes) -> str:
    return repr(data[:200].decode("utf-8", "replace"))


def _address(config: ReflectionConfig) -> tuple[str, dict[str, str]]:
    """Where to ask, and as whom: a user and password in the address go into a header."""
    parts = urlsplit(config.base_url)
    _, _, host = parts.netloc.rpartition("@")
    url = urlunsplit(
        (parts.scheme, host, f"{parts.path.rstrip('/')}/chat/completions", parts.query, "")
    )
    if parts.username:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return url, {"Authorization": f"Basic {b64encode(user.encode()).decode()}"}
    return url, {"Authorization": f"Bearer {_api_key(config)}"}


def _api_key(config: ReflectionConfig) -> str:
    if key := os.environ.get(config.api_key_env, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"The environment variable {config.api_key_env} holds no API key: expected "
                "printable ASCII characters. Copy the key again."
            )
        return key
    if _is_loopback(config.base_url):
        return NO_KEY  # local servers ask for no key, but some insist on a header
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
