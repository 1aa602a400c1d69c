"""The reflector behind an endpoint. Oracle: an HTTP server on loopback, and what it was sent."""

from __future__ import annotations

import base64
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

import pytest
from endpoint_helpers import BARE, OK, Handler, ask, completion

from hero.config import ReflectionConfig
from hero.prompts import StandardPrompts
from hero.reflection import Endpoint, ModelReflector, ReflectionError
from hero.renderer import Renderer
from hero.types import Trajectory

Episode = Callable[..., Trajectory]


def openai_reflector(renderer: Renderer, url: str, **settings: Any) -> ModelReflector:
    config = ReflectionConfig(reflector="openai", base_url=url, model="m", **settings)
    endpoint = Endpoint(config, renderer)
    return ModelReflector(endpoint, config, StandardPrompts(), renderer, rules="be kind")


def test_endpoint_answers_in_order_and_is_filtered(
    renderer: Renderer, episode: Episode, endpoint: Any
) -> None:
    def reply(request: dict[str, Any]) -> tuple[int, str, bytes]:
        text = request["messages"][0]["content"]
        number = text.split("task number ")[1].split("\n")[0]
        if number == "3" and request["seed"] == 0:
            return completion(None, None)  # a refusal: unreadable, asked again
        return completion(f'{{"turn": 1, "hint": "hint {number}"}}\n{{"turn": 2, "hint": "W9"}}', 7)

    endpoint.reply = reply
    trajectories = [episode(["s", "s"], instruction=f"task number {i}") for i in range(10)]
    reflections = openai_reflector(renderer, endpoint.url).reflect(trajectories, seed=0)
    assert [ds[0].hint for ds in reflections.diagnoses] == [f"hint {i}" for i in range(10)]
    assert [ds[1].hint for ds in reflections.diagnoses] == [""] * 10
    assert reflections.diagnoses[0][0].source == "openai"
    stats = reflections.stats
    assert (stats.leaked, stats.retried, stats.generated_tokens) == (10, 1, 70)
    path, key, request = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer none"
    assert request | {"messages": 0} == {
        "model": "m",
        "messages": 0,
        "temperature": 0.7,
        "max_tokens": 1024,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ((500, "application/json", b'{"error": {"message": "out of memory"}}'), "out of memory"),
        ((404, "application/json", b'{"error": {"message": "no model m"}}'), "no model m"),
        ((200, "text/html", b"<html>log in first</html>"), "log in first"),
    ],
    ids=["500", "404", "html"],
)
def test_endpoint_errors_are_never_empty_hints(
    renderer: Renderer, episode: Episode, endpoint: Any, reply: tuple[int, str, bytes], cause: str
) -> None:
    endpoint.reply = lambda request: reply
    reflector = openai_reflector(renderer, endpoint.url)
    with pytest.raises(ReflectionError, match=cause) as caught:
        reflector.reflect([episode(["s"])], seed=0)
    assert endpoint.url in str(caught.value)
    assert "reflection.base_url" in str(caught.value)


def test_closed_port(renderer: Renderer, episode: Episode, endpoint: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/v1"
    reflector = openai_reflector(renderer, url)
    with pytest.raises(ReflectionError, match=r"refused.*--reflection\.reflector self") as caught:
        reflector.reflect([episode(["s"])], seed=0)
    assert url in str(caught.value)


def test_api_key(
    renderer: Renderer, episode: Episode, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"MY_KEY holds no API key for https://example\.org"):
        openai_reflector(renderer, "https://example.org/v1", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint.reply = lambda request: completion(BARE, None)
    reflector = openai_reflector(renderer, endpoint.url, api_key_env="MY_KEY")
    stats = reflector.reflect([episode(["s"])], seed=0).stats
    assert endpoint.requests[0][1] == "Bearer secret"
    assert stats.generated_tokens == len(BARE)  # the endpoint counted none: the student's tokens


def test_missing_settings(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match=r"needs reflection\.base_url"):
        openai_reflector(renderer, "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_in_every_form_is_read(renderer: Renderer, endpoint: Any, encoding: str) -> None:
    body = OK.decode().encode(encoding)
    endpoint.reply = lambda request: (200, "application/json", body)
    assert (ask(renderer, endpoint.url).text, ask(renderer, endpoint.url).num_tokens) == (BARE, 7)


def test_the_key_goes_nowhere(
    renderer: Renderer, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    endpoint.reply = lambda request: (401, "text/plain", b"no: Bearer sk-very-secret")
    with pytest.raises(ReflectionError, match="Bearer") as caught:
        ask(renderer, endpoint.url)
    assert "secret" not in str(caught.value)
    for key in ("a\nb", "schlüssel"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="holds no API key") as refused:
            ask(renderer, endpoint.url)
        assert key not in str(refused.value)


def test_addresses(renderer: Renderer, endpoint: Any) -> None:
    endpoint.reply = lambda request: (200, "application/json", OK)
    ask(renderer, endpoint.url.replace("//", "//user:p%40ss@") + "/?version=2")
    path, key, _ = endpoint.requests[-1]
    assert path == "/v1/chat/completions?version=2"
    assert base64.b64decode(key.removeprefix("Basic ")) == b"user:p@ss"
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/x", "127.0.0.1:80", "http://127.0.0.1 /"):
        with pytest.raises((ReflectionError, ValueError)):
            ask(renderer, url)


def test_a_busy_endpoint_is_asked_again(renderer: Renderer, endpoint: Any) -> None:
    answers = iter([(503, "text/plain", b"busy"), (200, "application/json", OK)])
    endpoint.reply = lambda request: next(answers)
    assert ask(renderer, endpoint.url).text == BARE


def test_a_password_in_the_address_is_not_in_the_error(renderer: Renderer, endpoint: Any) -> None:
    endpoint.reply = lambda request: (401, "text/plain", b"X-Api-Key: abcdef is not yours")
    address = endpoint.url.replace("://", "://me:s3cret@") + "?api-key=t0ken"
    with pytest.raises(ReflectionError) as caught:
        ask(renderer, address)
    assert not any(word in str(caught.value) for word in ("s3cret", "t0ken", "abcdef"))


KEY = "a/long-key+of=40-characters/0123456789abc"


@pytest.mark.parametrize("echo", [KEY, KEY.replace("/", r"\/"), quote(KEY, safe="")])
@pytest.mark.parametrize("before", [0, 170, 190])
def test_an_echo_of_the_key_is_blotted_out_however_it_is_cut(
    renderer: Renderer, endpoint: Any, monkeypatch: pytest.MonkeyPatch, echo: str, before: int
) -> None:
    """Messages show the beginning of an answer, which may hold the beginning of the key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for status in (401, 200):
        body = b"x" * before + echo.encode()
        endpoint.reply = lambda request, s=status, b=body: (s, "text/plain", b)
        with pytest.raises(ReflectionError) as caught:
            ask(renderer, endpoint.url)
        assert "a/lo" not in str(caught.value) and "0123" not in str(caught.value)
    endpoint.reply = lambda request: completion(f"the key {KEY}", 7)
    assert "0123" not in ask(renderer, endpoint.url).text


@pytest.mark.parametrize(
    "address",
    ["me:hunter2@host/v1", "//me:hunter2@host/v1", "http://me:hunter2/x@host/v1",
     "http://me:hunter2@host:x/v1", "http://[me:hunter2@host/v1", "http://", "host:80/v1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_its_password(
    renderer: Renderer, address: str
) -> None:
    with pytest.raises(ValueError, match="Expected an address such as http") as refused:
        ask(renderer, address)
    assert "hunter" not in str(refused.value)
    assert ("@" in address) != (repr(address) in str(refused.value))


def test_a_key_in_the_place_of_its_variable_is_not_shown(renderer: Renderer) -> None:
    config = ReflectionConfig(base_url="https://host/v1", model="m", api_key_env="9f86d081884c")
    with pytest.raises(ValueError, match="got 12 characters") as refused:
        Endpoint(config, renderer)
    assert "9f86" not in str(refused.value)
