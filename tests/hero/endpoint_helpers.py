"""A chat endpoint on loopback that answers as it is told, and one question to it."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from hero.config import ReflectionConfig
from hero.reflection import Endpoint
from hero.renderer import Renderer

BARE = '{"turn": 1, "hint": "h"}'


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


OK = completion(BARE, 7)[2]
"""The body of a right answer."""


def ask(renderer: Renderer, url: str, **limits: Any) -> Any:
    config = ReflectionConfig(reflector="openai", base_url=url, model="m")
    [answer] = Endpoint(config, renderer, **limits).answer(["hello"], seed=0)
    return answer
