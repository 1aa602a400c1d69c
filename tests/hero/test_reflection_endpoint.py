"""The reflector behind an endpoint. Oracle: an HTTP server on loopback, and what it was sent."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socketserver
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hero.config import ReflectionConfig
from hero.prompts import StandardPrompts
from hero.reflection import Endpoint, ModelReflector, ReflectionError
from hero.renderer import Renderer
from hero.types import Trajectory

BARE = '{"turn": 1, "hint": "h"}'
Episode = Callable[..., Trajectory]


class Handler(BaseHTTPRequestHandler):
    """Answers chat completions with `server.reply(request)` -> (status, content type, body)."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.requests.append((self.path, self.headers["Authorization"], request))
        status, kind, body = server.reply(request)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "10")  # the client's own retries need not wait
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def completion(content: str | None, tokens: int | None) -> tuple[int, str, bytes]:
    message = {"role": "assistant", "content": content}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": tokens
        and {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens},
    }
    return 200, "application/json", json.dumps(body).encode()


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
        ((200, "application/json", b'{"error": "overloaded"}'), "overloaded"),
        ((200, "application/json", b"{not json"), "not json|JSON|Expecting"),
    ],
    ids=["500", "404", "html", "no_choices", "broken_json"],
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


# ---- endpoints that stall, flood or lie ----------------------------------------------------------

OK = completion(BARE, 7)[2]


def with_message(message: Any) -> bytes:
    return json.dumps({"choices": [{"message": message}]}).encode()


def with_usage(usage: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": BARE}}], "usage": usage}).encode()


MALFORMED: dict[str, bytes] = {
    **{
        f"json {text}": text.encode()
        for text in (
            "", " ", "null", "true", "0", "NaN", '"text"', "[]", "{}", "[[]]", "[{}]", "{", "[1",
            '{"choices": null}', '{"choices": []}', '{"choices": {}}', '{"choices": "abc"}',
            '{"choices": 1}', '{"choices": [null]}', '{"choices": [[]]}', '{"choices": ["a"]}',
            '{"choices": [{}]}', '{"choices": [{"text": "a"}]}', '{"choices": [{"delta": {}}]}',
            '{"error": {"message": "no"}}', "<html></html>", "data: {}\n\ndata: [DONE]\n\n",
        )
    },
    **{
        f"message {message!r}": with_message(message)
        for message in (
            None, [], {}, "a", 3, True, {"content": []}, {"content": {}}, {"content": 1},
            {"content": False}, {"content": [{"type": "text", "text": "a"}]}, {"text": "a"},
        )
    },
    **{
        f"usage {usage!r}": with_usage(usage)
        for usage in (
            [], "x", 1, True, [7], {"completion_tokens": "7"}, {"completion_tokens": -1},
            {"completion_tokens": 1.5}, {"completion_tokens": []}, {"completion_tokens": True},
            {"completion_tokens": 10**30}, {"completion_tokens": float("inf")},
        )
    },
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "long number": b'{"choices": ' + b"9" * 10_000 + b"}",
    "latin-1": '{"choices": [{"message": {"content": "é"}}]}'.encode("latin-1"),
    "utf-7": OK.decode().encode("utf-7"),
    "bytes": bytes(range(256)) * 10,
    "half": OK[: len(OK) // 2],
    "two answers": OK + OK,
    "flood": b"{" * 5_000_000,
    "spaces": b" " * 5_000_000 + OK,
}  # fmt: skip


def ask(renderer: Renderer, url: str, **limits: Any) -> Any:
    config = ReflectionConfig(reflector="openai", base_url=url, model="m")
    [answer] = Endpoint(config, renderer, **limits).answer(["hello"], seed=0)
    return answer


@pytest.mark.parametrize("kind", MALFORMED)
def test_every_malformed_answer_is_one_error(renderer: Renderer, endpoint: Any, kind: str) -> None:
    endpoint.reply = lambda request: (200, "application/json", MALFORMED[kind])
    with pytest.raises(ReflectionError, match=re.escape(endpoint.url)) as caught:
        ask(renderer, endpoint.url)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_in_every_form_is_read(renderer: Renderer, endpoint: Any, encoding: str) -> None:
    body = OK.decode().encode(encoding)
    endpoint.reply = lambda request: (200, "application/json", body)
    assert (ask(renderer, endpoint.url).text, ask(renderer, endpoint.url).num_tokens) == (BARE, 7)


class Raw:
    """A server that writes what it is told, byte for byte, as long as somebody listens."""

    def __init__(self, parts: Callable[[], Iterator[bytes]]) -> None:
        outer = self
        self.sent = 0

        class Server(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.request.recv(65536)
                try:
                    for part in parts():
                        self.request.sendall(part)
                        outer.sent += len(part)
                except OSError:
                    pass

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Server)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Raw]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made: list[Raw] = []

    def make(parts: Callable[[], Iterator[bytes]]) -> Raw:
        made.append(Raw(parts))
        return made[-1]

    yield make
    for server in made:
        server.server.shutdown()
        server.server.server_close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def slowly(start: bytes, part: bytes) -> Callable[[], Iterator[bytes]]:
    def parts() -> Iterator[bytes]:
        yield start
        for _ in range(200):
            time.sleep(0.1)
            yield part

    return parts


STALLING = {
    "silence": slowly(b"", b""),
    "status": slowly(b"", b"H"),
    "headers": slowly(HEAD, b"x"),
    "continue": slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": slowly(HEAD + b"Content-Length: 1000\r\n\r\n", b" "),
    "endless body": slowly(HEAD + b"\r\n", b" "),
    "chunk size": slowly(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "chunks": slowly(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@pytest.mark.parametrize("kind", STALLING)
def test_an_answer_that_never_ends_is_cut(
    renderer: Renderer, raw: Callable[..., Raw], kind: str
) -> None:
    started = time.monotonic()
    with pytest.raises(ReflectionError, match="no complete answer after 1 s"):
        ask(renderer, raw(STALLING[kind]).url, timeout=1.0)
    assert time.monotonic() - started < 5


BOMB = gzip.compress(b"{" * 300_000_000, 1)
PACKED = gzip.compress(OK)


@pytest.mark.parametrize(
    ("coding", "body"),
    [("gzip", BOMB), ("gzip", PACKED[:-9]), ("gzip", b"plain"), ("br", OK), ("gzip, gzip", PACKED)],
    ids=["bomb", "cut off", "not packed", "unknown", "twice"],
)
def test_packed_answers_are_bounded(
    renderer: Renderer, raw: Callable[..., Raw], coding: str, body: bytes
) -> None:
    head = HEAD + f"Content-Encoding: {coding}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    tracemalloc.start()
    with pytest.raises(ReflectionError, match="packed"):
        ask(renderer, raw(lambda: iter([head, body])).url)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_a_packed_answer_is_read(renderer: Renderer, raw: Callable[..., Raw]) -> None:
    head = HEAD + f"Content-Encoding: gzip\r\nContent-Length: {len(PACKED)}\r\n\r\n".encode()
    assert ask(renderer, raw(lambda: iter([head, PACKED])).url).text == BARE


def test_a_flood_is_not_read_to_its_end(renderer: Renderer, raw: Callable[..., Raw]) -> None:
    server = raw(lambda: iter([HEAD + b"\r\n", *[b"{" * 1_000_000] * 200]))
    with pytest.raises(ReflectionError, match="more than 4000000 bytes"):
        ask(renderer, server.url)
    assert server.sent < 50_000_000


@pytest.mark.parametrize("said", [b"", b"garbage\r\n\r\n", b"HTTP/9.9 abc\r\n\r\n",
                                  HEAD + b"a: b\r\n" * 500, HEAD + b"x" * 100_000,
                                  HEAD + b"Content-Length: 99\r\n\r\n{}"])  # fmt: skip
def test_what_is_not_http(renderer: Renderer, raw: Callable[..., Raw], said: bytes) -> None:
    with pytest.raises(ReflectionError):
        ask(renderer, raw(lambda: iter([said])).url)


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
