"""Sampling by a vLLM server: token ids in, ids and log-probabilities out, over HTTP.

docs/integrations.md has the command that starts the server. Nothing is decoded or tokenised on the
way, so what is trained is what was sampled.
"""

from __future__ import annotations

import math
import queue
import reprlib
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hero.client import FAILURES, Client, Refused, read_json, shown
from hero.config import TrainConfig, redacted
from hero.engines.base import WAIT, HandedWeights
from hero.policy import Policy
from hero.sampling import Completion, Sampling, Stream
from hero.text import harmless
from hero.types import Fault

MAX_NAME = 300
"""Characters of a model's name that are read."""
PLAIN = {
    "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "ignore_eos": True, "skip_special_tokens": False,
}  # fmt: skip
"""Of a request: else the server takes what the model's generation_config.json says."""
REMEDIES = {
    "/load_lora_adapter": "Start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, "
    "--enable-lora and a --max-lora-rank of at least --model.lora-rank; it must read "
    "--engine.weights-dir at the same path.",
    "/collective_rpc": "Start the server with VLLM_SERVER_DEV_MODE=1, which lets it take new "
    "weights; it must read --engine.weights-dir at the same path.",
    "/reset_prefix_cache": "Start the server with VLLM_SERVER_DEV_MODE=1.",
}
"""By the path of a request that was refused."""


class ServerError(Fault):
    """The server cannot be sampled from, or not any more."""


class ServerEngine(HandedWeights):
    """Samples from a vLLM server, which is handed new weights before it samples from them.

    LoRA adapters are loaded beside its model, under a new name each time; full weights take the
    place of the model's. After that its log-probabilities are compared with the trainer's.

    Raises:
        ServerError: no server there, or not the one model that is asked for.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        super().__init__(policy, config)
        engine = config.engine
        base, option = engine.base_url.rstrip("/"), "--engine.api-key-env"
        self.api = Client(base, engine.api_key_env, option, engine.timeout)
        root = base.removesuffix("/v1")  # of what is no part of OpenAI's protocol
        self.root = Client(root, engine.api_key_env, option, engine.timeout)
        self.base_model, self.context = self._served()
        self.model = self.base_model
        """What requests name: the adapter, with LoRA."""
        self._run = uuid.uuid4().hex[:8]

    def stream(self, rows: int, sampling: Sampling, longest: int) -> Stream:
        longest = min(longest, self.policy.context)
        if longest > self.context:
            raise ServerError(
                f"The server at {redacted(self.api.base_url)} takes sequences of up to "
                f"{self.context} tokens, and an episode may have {longest}: start it with "
                f"--max-model-len {longest}, or lower --rollout.max-episode-tokens."
            )
        self.hand_over()
        return _Requests(partial(self._complete, sampling))

    def rest(self) -> None:
        """The server has a device, or a share of one, of its own."""

    # ---- weights ------------------------------------------------------------------------------

    def _read(self, folder: Path) -> None:
        path = str(folder.resolve())
        if self.policy.adapter is None:
            call = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            self._ask(self.root, "/collective_rpc", call)
            self._ask(self.root, "/reset_prefix_cache", {})  # keys and values of the old weights
            return
        before, self.model = self.model, f"hero-{self._run}-{self.policy.version}"
        self._ask(self.api, "/load_lora_adapter", {"lora_name": self.model, "lora_path": path})
        if before != self.base_model:
            self._ask(self.api, "/unload_lora_adapter", {"lora_name": before})

    # ---- requests -----------------------------------------------------------------------------

    def _served(self) -> tuple[str, int]:
        """Name and longest sequence of the model to be sampled from."""
        asked = self.config.engine.model
        try:
            listed = read_json(self._ask(self.api, "/models"))["data"]
            found = {
                str(m["id"])[:MAX_NAME]: int(m.get("max_model_len") or 2**31)
                for m in listed if not m.get("parent")
            }  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise self._error(f"no list of models ({error!r:.200})") from error
        if asked not in found and (asked or len(found) != 1):
            names = harmless(", ".join(map(repr, found)))
            raise ServerError(
                f"The server at {redacted(self.api.base_url)} serves {names[:500]}; expected "
                f"{repr(asked) if asked else 'one model'}. Set --engine.model to the name under "
                "which it serves the run's model."
            )
        name = asked or next(iter(found))
        return name, found[name]

    def _complete(self, sampling: Sampling, prompt: list[int], seed: int) -> Completion:
        """One completion; from a thread of its own."""
        body = PLAIN | {
            "model": self.model, "prompt": prompt, "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed,
            "stop_token_ids": list(self.policy.renderer.stop_ids), "logprobs": 0,
            "return_token_ids": True,
        }  # fmt: skip
        data = self._ask(self.api, "/completions", body)
        try:
            vocabulary = self.policy.head.weight.shape[0]
            return read_completion(data, prompt, vocabulary, sampling.max_tokens)
        except ValueError as error:
            raise self._error(str(error)) from error

    def _ask(self, client: Client, path: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            return client.ask(path, body)
        except FAILURES as error:
            remedy = REMEDIES.get(path, "") if isinstance(error, Refused) else ""
            raise self._error(f"{path}: {type(error).__name__}: {error}", remedy) from error

    def _error(self, cause: str, remedy: str = "") -> ServerError:
        remedy = remedy or (
            "Check that it runs (vllm serve, as in docs/integrations.md) and that engine.base_url, "
            "engine.model and the key in engine.api_key_env are right, or set --engine.kind hero."
        )
        cause = harmless(self.api.without_key(cause))
        return ServerError(
            redacted(f"The vLLM server at {self.api.base_url} failed: {cause}. {remedy}")
        )


class _Requests:
    """A stream of requests under way, a thread each: the server batches them."""

    def __init__(self, complete: Callable[[list[int], int], Completion]) -> None:
        self.complete = complete
        self.under_way = 0
        self.done: queue.SimpleQueue[tuple[int, Completion | BaseException]] = queue.SimpleQueue()

    def submit(self, row: int, prompt: list[int], seed: int) -> None:
        self.under_way += 1
        # A daemon, as nobody waits for an answer once another request has failed.
        threading.Thread(target=self._run, args=(row, prompt, seed), daemon=True).start()

    def _run(self, row: int, prompt: list[int], seed: int) -> None:
        try:
            self.done.put((row, self.complete(prompt, seed)))
        except BaseException as error:
            self.done.put((row, error))

    def step(self) -> list[tuple[int, Completion]]:
        """What has been answered; raises the first error."""
        found: list[tuple[int, Completion]] = []
        with suppress(queue.Empty):
            while self.under_way:
                row, answer = self.done.get(timeout=0.0 if found else WAIT)
                self.under_way -= 1
                if isinstance(answer, BaseException):
                    raise answer
                found.append((row, answer))
        return found


def read_completion(data: bytes, prompt: list[int], vocabulary: int, max_tokens: int) -> Completion:
    """Ids and log-probabilities of a completion that was asked for as `ServerEngine` does.

    Raises:
        ValueError: it has none, or they cannot be those of this prompt and vocabulary.
    """
    reply = read_json(data)
    try:
        [choice] = reply["choices"]
        ids, read = choice.get("token_ids"), choice.get("prompt_token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"no completion, but {shown(data)}") from error
    if not ids or read is None or not isinstance(ids, list):
        raise ValueError(
            "an answer without token ids, of which the text alone cannot be trained: expected a "
            "server that knows return_token_ids (vLLM 0.10.2 or newer)"
        )
    if read != prompt:
        number = len(read) if isinstance(read, list) else "no"
        raise ValueError(f"it read {number} other ids than the {len(prompt)} that were sent")
    if len(ids) > max_tokens:
        raise ValueError(f"{len(ids)} tokens, where at most {max_tokens} were asked for")
    told = logprobs if isinstance(logprobs, list) else []
    if len(told) != len(ids) or not all(map(_is_logprob, told)):
        raise ValueError(
            f"no log-probability of each of its {len(ids)} tokens: got {reprlib.repr(logprobs)}"
        )
    if foreign := [i for i in ids if type(i) is not int or not 0 <= i < vocabulary]:
        raise ValueError(
            f"an id {reprlib.repr(foreign[0])}, and the model that is trained has {vocabulary}: "
            "another vocabulary, so another model"
        )
    return Completion(ids=ids, logprobs=[float(value) for value in told])


def _is_logprob(value: object) -> bool:
    if type(value) is int:  # of thousands of digits it is no float
        return -(10**6) < value <= 0
    return isinstance(value, float) and math.isfinite(value) and value <= 1e-3
