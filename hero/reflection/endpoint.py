"""A stronger model behind an OpenAI-compatible endpoint reflects: an ablation of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from hero.client import FAILURES, Client, read_json, shown
from hero.config import ReflectionConfig, redacted
from hero.reflection.models import Answer
from hero.renderer import Renderer
from hero.text import harmless
from hero.types import Fault, Message

WORKERS = 8
"""Requests under way at the same time."""

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
        option = "--reflection.api-key-env"
        self.client = Client(config.base_url, config.api_key_env, option, timeout)
        self._pool = ThreadPoolExecutor(WORKERS)
        self._early: dict[tuple[str, int], Future[Answer]] = {}

    def early(self, request: str, seed: int) -> None:
        self._early[request, seed] = self._pool.submit(self._ask, request, seed)

    def answer(self, requests: Sequence[str], seed: int) -> list[Answer]:
        sent, self._early = self._early, {}
        asked = [sent.get((r, seed)) or self._pool.submit(self._ask, r, seed) for r in requests]
        try:
            return [future.result() for future in asked]
        except BaseException:  # requests that have not been sent are dropped with the first failure
            for future in asked:
                future.cancel()
            raise

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
            text, num_tokens = _read_completion(self.client.ask("/chat/completions", body))
        except FAILURES as error:
            raise self._error(f"{type(error).__name__}: {error}") from error
        return text[: CHARS_PER_TOKEN * self.config.max_tokens], num_tokens

    def _error(self, cause: str) -> ReflectionError:
        return ReflectionError(redacted(
            f"{self.who} at {self.config.base_url} (model {self.config.model!r}) failed:"
            f" {harmless(self.client.without_key(cause))}. Check that the endpoint runs and that"
            f" {self.base_url}, {self.model} and the key in {self.config.api_key_env} are right, or"
            f" set {self.remedy}."
        ))  # fmt: skip


def _read_completion(data: bytes) -> tuple[str, int | None]:
    """Text of a chat completion, and its tokens if they were counted.

    A refusal, whose content is null, is an empty text.

    Raises:
        ValueError: the answer is anything else.
    """
    reply = read_json(data)
    try:
        choice = reply["choices"][0]
        text, usage = choice["message"]["content"], reply.get("usage")
        num_tokens = None if usage is None else usage.get("completion_tokens")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"no chat completion, but {shown(data)}") from error
    if not isinstance(text, str | None):
        raise ValueError(f"no text, but {shown(data)}")
    if num_tokens is not None and (type(num_tokens) is not int or not 0 <= num_tokens < MAX_TOKENS):
        raise ValueError(f"no number of tokens, but {shown(data)}")
    return harmless(text or ""), num_tokens
