"""One exchange of JSON over HTTP that ends in time and reads no more than it should.

The standard library's client waits for each byte anew, follows redirects with the key in hand, and
unpacks whatever it is sent; here one clock cuts the connection, and both limits hold.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

MAX_BYTES = 4_000_000
"""Of an answer, packed and unpacked: a hundred times the longest reflection or turn."""
PACKED = {"gzip", "x-gzip", "deflate"}


class _Clock:
    """Shuts every connection opened through it once the time is up, whatever it is waiting for."""

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._sockets: list[Any] = []
        self._timer = threading.Timer(max(seconds, 0.0), self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Clock:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def _cut(self) -> None:
        self.expired = True
        for sock in self._sockets:
            with suppress(OSError):  # already gone
                sock.shutdown(socket.SHUT_RDWR)

    def watched(self, base: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        """`base`, its socket watched."""
        clock = self

        class Watched(base):  # type: ignore[misc, valid-type]
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                # At once, as a proxy may stall before `connect` is through.
                self._create_connection: Any = clock._opened(socket.create_connection)

            def connect(self) -> None:
                super().connect()
                clock._watch(self.sock)  # where it is encrypted, another one

        return Watched

    def _opened(self, create: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: self._watch(create(*arguments, **named))

    def _watch(self, sock: Any) -> Any:
        self._sockets.append(sock)
        if self.expired:  # between the end of the time and now
            self._cut()
        return sock


class _Watching(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens connections that a clock can cut."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self.clock = clock

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self.clock.watched(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self.clock.watched(http.client.HTTPSConnection), request)


def exchange(
    url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str], seconds: float
) -> tuple[int, bytes]:
    """Status and unpacked body of the answer to a POST; without `body` to a GET.

    Redirects are answers; proxies are as usual.

    Raises:
        TimeoutError: the answer was not complete after `seconds`.
        ValueError: it is too long, packed in an unknown way or badly.
        OSError, http.client.HTTPException: no connection, or what came is not HTTP.
    """
    request = urllib.request.Request(
        url,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json", "Accept-Encoding": "identity", **headers},
    )
    with _Clock(seconds) as clock:
        opener = urllib.request.OpenerDirector()  # without files, FTP, redirects and errors raised
        for handler in (urllib.request.ProxyHandler(), _Watching(clock)):
            opener.add_handler(handler)
        try:
            response = opener.open(request, timeout=max(seconds, 0.001))
            if response is None:
                raise ValueError(f"expected an address that begins with http:// or https://: {url}")
            with response:
                packed = _read(response.read1)
                data = _unpack(packed, response.headers.get("Content-Encoding", ""))
                status = int(response.status)
        except (OSError, ValueError, http.client.HTTPException):
            if not clock.expired:
                raise
        if clock.expired:  # the connection was cut: whatever was read is not the answer
            raise TimeoutError(f"no complete answer after {seconds:.0f} s")
        if response.length:
            raise ConnectionError(f"the connection ended {response.length} bytes too early")
    return status, data


def _read(read: Callable[[int], bytes]) -> bytes:
    parts, size = [], 0
    while part := read(65536):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise ValueError(f"the answer has more than {MAX_BYTES} bytes")
    return b"".join(parts)


def _unpack(data: bytes, coding: str) -> bytes:
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return data
    if coding not in PACKED:
        raise ValueError(f"the answer is packed as {coding!r}, though plain text was asked for")
    unpacker = zlib.decompressobj(47)  # both headers, gzip and zlib
    try:
        data = unpacker.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"the answer cannot be unpacked: {error}") from error
    if unpacker.unconsumed_tail:
        raise ValueError(f"the answer has more than {MAX_BYTES} bytes when unpacked")
    if not unpacker.eof:
        raise ValueError("the packed answer is cut off")
    return data
