"""Endpoints that stall, flood or lie: one error, in bounded time and memory.

Oracle: servers on loopback that write what they are told.
"""

from __future__ import annotations

import gzip
import json
import re
import socketserver
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from endpoint_helpers import BARE, OK, ask

from hero.reflection import ReflectionError
from hero.renderer import Renderer


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


@pytest.mark.parametrize("kind", MALFORMED)
def test_every_malformed_answer_is_one_error(renderer: Renderer, endpoint: Any, kind: str) -> None:
    endpoint.reply = lambda request: (200, "application/json", MALFORMED[kind])
    with pytest.raises(ReflectionError, match=re.escape(endpoint.url)) as caught:
        ask(renderer, endpoint.url)
    assert len(str(caught.value)) < 1000


class Raw:
    """A server that writes what it is told, byte for byte, as long as somebody listens."""

    def __init__(self, parts: Callable[[], Iterator[bytes]]) -> None:
        outer = self
        self.sent = 0

        class Server(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                length = 0  # what is not read of a request resets the connection at its end
                while (line := self.rfile.readline()).strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                self.rfile.read(length)
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
    monkeypatch.setattr("hero.client.PAUSE", 0.01)
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
    with pytest.raises(ReflectionError, match=r"no complete answer after 0\.5 s"):
        ask(renderer, raw(STALLING[kind]).url, timeout=0.5)
    assert time.monotonic() - started < 5


def test_a_proxy_that_never_answers_is_cut(
    renderer: Renderer, raw: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is any connection to the endpoint itself."""
    monkeypatch.setenv("https_proxy", raw(STALLING["status"]).url)
    monkeypatch.setenv("OPENAI_API_KEY", "some-key-of-mine")
    started = time.monotonic()
    with pytest.raises(ReflectionError, match=r"no complete answer after 0\.5 s"):
        ask(renderer, "https://endpoint.invalid/v1", timeout=0.5)
    assert time.monotonic() - started < 5


BOMB = gzip.compress(b"{" * 100_000_000, 1)
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
