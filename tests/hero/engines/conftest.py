"""The agent that engines sample from, and the servers they ask."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hero.models import SHIPPED
from tests.hero import vllm_reference
from tests.hero.vllm_stub import VllmStub, serving


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped agent, its head a matrix of its own: vLLM on a CPU cannot reload a tied one."""
    folder = tmp_path_factory.mktemp("agent")
    tied = AutoModelForCausalLM.from_pretrained(SHIPPED["tiny-shop"])
    model = LlamaForCausalLM(
        type(tied.config)(**tied.config.to_dict() | {"tie_word_embeddings": False})
    )
    model.load_state_dict(tied.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED["tiny-shop"]).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("hero.client.PAUSE", 0.01)


@pytest.fixture
def stub(agent: Path) -> Iterator[VllmStub]:
    with serving(VllmStub(agent)) as server:
        yield server


@pytest.fixture(scope="session")
def vllm(agent: Path) -> Iterator[str]:
    """The address of a real server."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is missing: .ci/extras vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(agent),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", "8",
    ]  # fmt: skip
    flags = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
             "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    server = subprocess.Popen(command, env=os.environ | flags, stdout=subprocess.DEVNULL)
    try:
        end, answered = time.monotonic() + 900, 1
        while answered != 0:
            assert server.poll() is None and time.monotonic() < end, "no server, or it has ended"
            time.sleep(1)
            with socket.socket() as tried:
                answered = tried.connect_ex(("127.0.0.1", port))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(params=["stub", "vllm", "transformers", "reference", "colocated"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings of each engine that can run here, or of what stands in for it."""
    kind, installed = request.param, importlib.util.find_spec("vllm") is not None
    if kind == "transformers":
        return {"kind": kind}
    if kind in ("stub", "vllm"):
        found = request.getfixturevalue(kind)
        return {"kind": "server", "base_url": getattr(found, "url", found)}
    if installed != (kind == "colocated"):
        pytest.skip("vllm is missing: .ci/extras vllm" if not installed else "the real one runs")
    if not installed:
        vllm_reference.install(monkeypatch)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    return {"kind": "vllm"}
