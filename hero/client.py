"""A server that speaks OpenAI's protocol: its address, the key, and asking again."""

from __future__ import annotations

import json
import os
import time
from base64 import b64encode
from collections.abc import Mapping
from http.client import HTTPException
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from hero.config.secrets import check_variable
from hero.wire import exchange

NO_KEY = "none"
RETRIES = 2
"""Of a request that may succeed the second time: no connection, too many requests, 5xx."""
KEY_CHARS = 8
"""Of a key that is looked for in answers: in those of a shorter one it may be a word."""
PAUSE = 0.5
"""Seconds before the first retry; doubled for the next."""
FAILURES = (OSError, ValueError, RecursionError, HTTPException)
"""What asking, and reading the answer, can raise."""


class Refused(ValueError):
    """The server answered with another status than 200."""

    def __init__(self, status: int, data: bytes) -> None:
        super().__init__(f"HTTP {status}, {shown(data)}")
        self.status = status


class Client:
    """Requests to one server.

    Args:
        base_url: what the paths of requests are appended to, such as http://localhost:8000/v1. A
            user and a password in it go into a header.
        api_key_env: environment variable that holds the key.
        option: of the command line, that names another variable.
        timeout: seconds for one answer, retries included, however slowly it comes.

    Raises:
        ValueError: no address, or no API key for a server elsewhere than on this machine.
    """

    def __init__(self, base_url: str, api_key_env: str, option: str, timeout: float) -> None:
        self.base_url, self.timeout = base_url, timeout
        parts = _parts(base_url)
        if parts.username:
            password = unquote(parts.password or "")
            user = f"{unquote(parts.username)}:{password}"
            key, kind = b64encode(user.encode()).decode(), "Basic"
        else:
            key, kind, password = _api_key(base_url, api_key_env, option), "Bearer", ""
        self.headers = {"Authorization": f"{kind} {key}"}
        secrets = {key, password} - {NO_KEY, ""}
        written = {w for s in secrets for w in (s, s.replace("/", r"\/"), quote(s, safe=""))}
        self._secrets = sorted(written, key=len, reverse=True)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The body of the answer, asked for again where that may help and time is left.

        Args:
            path: of the request, with its slash.
            body: posted as JSON; None gets the path.

        Raises:
            Refused, and the others of `FAILURES`.
        """
        url, end = self._url(path), time.monotonic() + self.timeout
        for attempt in range(RETRIES + 1):
            pause = PAUSE * 2**attempt
            last = attempt == RETRIES or time.monotonic() + pause >= end
            try:
                status, data = exchange(url, body, self.headers, end - time.monotonic())
                data = self._without_keys(data)
            except TimeoutError:
                raise TimeoutError(f"no complete answer after {self.timeout:g} s") from None
            except (OSError, HTTPException):
                if last:
                    raise
            else:
                if status == 200:
                    return data
                if last or (status not in (408, 409, 429) and status < 500):
                    raise Refused(status, data)
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def without_key(self, text: str) -> str:
        """A text that the server may have written, its echo of the key blotted out."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _without_keys(self, data: bytes) -> bytes:
        """An answer before any of it is cut away: half a key would not be found any more."""
        for secret in self._secrets:
            if len(secret) >= KEY_CHARS:
                data = data.replace(secret.encode(), b"***")
        return data

    def _url(self, path: str) -> str:
        parts = urlsplit(self.base_url)
        _, _, host = parts.netloc.rpartition("@")
        return urlunsplit((parts.scheme, host, f"{parts.path.rstrip('/')}{path}", parts.query, ""))


def read_json(data: bytes) -> Any:
    """An answer's content.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"an answer that is not JSON ({error}): {shown(data)}") from error


def shown(data: bytes) -> str:
    """The beginning of an answer, for messages."""
    return repr(data[:200].decode("utf-8", "replace"))


def _parts(url: str) -> SplitResult:
    """The parts of an address.

    Raises:
        ValueError: it is none; it is shown only if there is no password in it.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # of the port, or of brackets
        pass
    got = (
        repr(url) if "@" not in url else f"{len(url)} characters, not shown for the password's sake"
    )
    raise ValueError(
        f"Expected an address such as http://localhost:8000/v1, in which / and @ of a password are "
        f"written %2F and %40; got {got}."
    )


def _api_key(url: str, variable: str, option: str) -> str:
    check_variable(option, variable)
    if key := os.environ.get(variable, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"The environment variable {variable} holds no API key: expected printable ASCII "
                "characters. Copy the key again."
            )
        return key
    if _is_loopback(url):
        return NO_KEY  # local servers ask for no key, but some insist on a header
    raise ValueError(
        f"The environment variable {variable} holds no API key for {url}: export it, or name "
        f"another variable with {option}."
    )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
