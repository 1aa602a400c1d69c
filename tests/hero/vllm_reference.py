"""The part of vllm's Python interface that hero/engines/colocated.py calls, with vLLM 0.32's
signatures: engines/test_engines.py compares them with the installed ones where there is a vllm.
A transformers model computes, one token a step for every request under way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.hero.vllm_stub import VllmStub


class SamplingParams:
    def __init__(
        self, *, temperature: float, top_p: float, seed: int, max_tokens: int, logprobs: int,
        ignore_eos: bool, detokenize: bool, stop_token_ids: list[int],
    ) -> None:  # fmt: skip
        assert logprobs == 0 and ignore_eos and not detokenize
        self.body = {"temperature": temperature, "seed": seed, "stop_token_ids": stop_token_ids}
        self.max_tokens = max_tokens


class LoRARequest:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        assert lora_int_id > 0
        self.lora_name, self.lora_path = lora_name, lora_path


class LLMEngine:
    def __init__(self, stub: VllmStub) -> None:
        self.stub, self.waiting = stub, list[tuple[Any, ...]]()

    def add_request(
        self, request_id: str, prompt: dict[str, list[int]], params: SamplingParams,
        lora_request: LoRARequest | None = None,
    ) -> None:  # fmt: skip
        self.waiting.append((request_id, prompt["prompt_token_ids"], params, lora_request))

    def step(self) -> list[Any]:
        request_id, prompt, params, lora = self.waiting.pop(0)
        model = self.stub.model
        if lora is not None:
            if lora.lora_name not in self.stub.adapters:
                self.stub.load_adapter(lora.lora_name, lora.lora_path)
            model = self.stub.adapters[lora.lora_name]
        ids, logprobs = self.stub.sample(model, prompt, params.max_tokens, params.body)
        told = [{i: SimpleNamespace(logprob=value)} for i, value in zip(ids, logprobs, strict=True)]
        done = SimpleNamespace(token_ids=tuple(ids), logprobs=told)
        return [
            SimpleNamespace(request_id="of another", finished=False),
            SimpleNamespace(request_id=request_id, finished=True, outputs=[done]),
        ]


class LLM:
    def __init__(
        self, model: str, *, seed: int, dtype: str, max_model_len: int, max_num_seqs: int,
        generation_config: str, enable_sleep_mode: bool, gpu_memory_utilization: float,
        logprobs_mode: str, enable_lora: bool = False, max_loras: int = 1, max_lora_rank: int = 16,
    ) -> None:  # fmt: skip
        assert generation_config == "vllm" and logprobs_mode == "raw_logprobs"
        self.stub = VllmStub(Path(model), max_model_len=max_model_len)
        self.llm_engine = LLMEngine(self.stub)
        self.cache_is_stale = False

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> None:
        status, _ = self.stub.post("/collective_rpc", {"method": method, "kwargs": kwargs})
        assert status == 200

    def reset_prefix_cache(self) -> bool:
        return True

    def sleep(self, level: int = 1) -> None: ...

    def wake_up(self) -> None: ...


def install(patch: pytest.MonkeyPatch) -> None:
    """As the package `vllm`, until the test has ended."""
    whole, lora, request = (ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    whole.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, lora=lora)
    request.__dict__.update(LoRARequest=LoRARequest)
    for module in (whole, lora, request):
        patch.setitem(sys.modules, module.__name__, module)
