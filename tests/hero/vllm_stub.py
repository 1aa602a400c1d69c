"""A server on loopback that answers as `vllm serve` does: paths, fields and messages of vLLM 0.32.

Behind it is a transformers model of its own, read from the folders it is told, that computes each
token from the whole sequence. engines/test_engines.py asks the real server the same, where vllm
is installed.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Reply = tuple[int, Any]


def refusal(status: int, message: str) -> Reply:
    return status, {"error": {"message": message, "type": "BadRequestError", "code": status}}


class VllmStub:
    """What the server knows; `changed` alters its answers, to see what a client makes of it."""

    def __init__(self, path: Path, dev: bool = True, max_model_len: int = 1024) -> None:
        self.path, self.dev, self.max_model_len = path, dev, max_model_len
        self.model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.adapters: dict[str, Any] = {}
        self.asked: list[str] = []
        self.changed: Any = lambda path, reply: reply
        self.url = ""

    def get(self, path: str) -> Reply:
        if path != "/v1/models":
            return 404, {"detail": "Not Found"}
        card = {"object": "model", "owned_by": "vllm"}
        base = {**card, "id": "student", "root": str(self.path), "parent": None,
                "max_model_len": self.max_model_len}  # fmt: skip
        adapters = [{**card, "id": name, "parent": "student"} for name in self.adapters]
        return 200, {"object": "list", "data": [base, *adapters]}

    def post(self, path: str, body: dict[str, Any]) -> Reply:
        self.asked.append(path)
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/load_lora_adapter":
            return self.load_adapter(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return 200, "Success: LoRA adapter removed successfully."
        if self.dev and path == "/collective_rpc":
            assert body["method"] == "reload_weights" and set(body["kwargs"]) == {"weights_path"}
            self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            return 200, {"results": [None]}
        if self.dev and path == "/reset_prefix_cache":
            return 200, {"success": True}
        return 404, {"detail": "Not Found"}

    def load_adapter(self, name: str, folder: str) -> Reply:
        from peft import PeftModel

        if name in self.adapters:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        base = AutoModelForCausalLM.from_pretrained(self.path)
        self.adapters[name] = PeftModel.from_pretrained(base, folder).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def complete(self, body: dict[str, Any]) -> Reply:
        models = {"student": self.model, **self.adapters}
        prompt, name, tokens = body["prompt"], body["model"], body.get("max_tokens", 16)
        if name not in models:
            return refusal(404, f"The model `{name}` does not exist.")
        if len(prompt) + tokens > self.max_model_len:
            return refusal(
                400, f"This model's maximum context length is {self.max_model_len} tokens."
            )
        ids, logprobs = self.sample(models[name], prompt, tokens, body)
        stopped = ids[-1] in body.get("stop_token_ids", [])
        return 200, {
            "id": "cmpl-1", "object": "text_completion", "model": name,
            "choices": [{
                "index": 0, "text": self.tokenizer.decode(ids), "stop_reason": None,
                "finish_reason": "stop" if stopped else "length",
                "logprobs": {"token_logprobs": logprobs, "tokens": [str(i) for i in ids],
                             "text_offset": [0] * len(ids), "top_logprobs": [{}] * len(ids)},
                "token_ids": ids if body.get("return_token_ids") else None,
                "prompt_token_ids": prompt if body.get("return_token_ids") else None,
            }],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
        }  # fmt: skip

    @torch.no_grad()
    def sample(
        self, model: Any, prompt: list[int], tokens: int, body: dict[str, Any]
    ) -> tuple[list[int], list[float]]:
        """Log-probabilities at temperature 1, as --logprobs-mode raw_logprobs has them."""
        drawn, ids, logprobs = random.Random(body["seed"]), [], []
        while len(ids) < tokens:
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
            temperature, at = body["temperature"], drawn.random()
            chances = (logits / (temperature or 1.0)).log_softmax(-1).double().exp().cumsum(-1)
            token = int(torch.searchsorted(chances, at * chances[-1], right=True))
            ids.append(token if temperature else int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
            if ids[-1] in body.get("stop_token_ids", []):
                break
        return ids, logprobs


@contextmanager
def serving(stub: VllmStub) -> Iterator[VllmStub]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: Any) -> None:
            status, content = stub.changed(self.path, (status, content))
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self.answer(*stub.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                reply = stub.post(self.path, body)
            self.answer(*reply)

        def log_message(self, *arguments: object) -> None: ...

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
