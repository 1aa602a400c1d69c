"""What works on this machine: the lines of `hero doctor`."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator

import torch
import torch.distributed as dist

import hero_kernels
from hero.report.facts import versions

EXTRAS = {
    "peft": "LoRA (model.lora_rank)",
    "bitsandbytes": "moments in 8 bits or pages (optim.kind), QLoRA (model.quantize)",
    "triton": "Triton kernels",
    "wandb": "report_to=wandb",
    "trackio": "report_to=trackio",
    "tensorboard": "report_to=tensorboard",
}


def checkup() -> Iterator[str]:
    """One finding a line; what is missing says what to do."""
    yield "  ".join(f"{name} {number}" for name, number in versions().items())
    yield f"{platform.platform()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        yield f"ok       CUDA device: {name}, sm_{major}{minor}"
    else:
        yield "missing  CUDA device: everything runs on the CPU"
    for impl in ("torch", "cpu", "cuda", "triton"):
        device = "cuda" if impl in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
        reason = hero_kernels.supports(impl, device=device)
        found = "ok      " if reason is None else "missing "
        yield f"{found} divergence impl={impl}" + (f": {reason}" if reason else "")
    talk = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available", bool)()]
    found, said = ("ok      ", " and ".join(talk)) if talk else ("missing ", "gloo, in this torch")
    yield f"{found} several processes (torchrun -m hero train): {said}"
    yield "ok       engine hero: the weights that are trained sample"
    yield "ok       engine transformers: continuous batching with paged attention"
    found = "ok      " if importlib.util.find_spec("vllm") else "missing "
    yield f"{found} engine vllm: vLLM in this process (pip install 'hero-kernels[vllm]')"
    yield "ok       engine server: wants --engine.base-url, where a vLLM server runs"
    for package, purpose in EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        yield f"{'ok      ' if there else 'missing '} {package}: {purpose}"
