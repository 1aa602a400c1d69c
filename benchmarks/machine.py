"""What a result was measured on, whether the machine was free, and how results are written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hero_kernels import cpu, cpu_gemm

PACKAGES = ("torch", "triton", "liger-kernel", "trl", "transformers", "numpy")
ROOT = Path(__file__).resolve().parents[1]
BUSY_SHARE = 0.25
"""Load average by core above which a machine does something else too."""


def device_type() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> float:
    """Seconds: with a GPU once its queue is empty, else the processor's. Of one thread these are
    the clock's, less what others take of it."""
    if device_type() == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def describe(device: str) -> dict[str, Any]:
    """Device, processor, threads, load, versions, date and commit, for JSON.

    To be called before anything is measured: later the load average is that of the measurement.
    """
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernel_instruction_set": cpu.instruction_set() if cpu.available() is None else None,
        "bf16_products": cpu_gemm.kind() if device == "cpu" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
    }


def busy(machine: Mapping[str, Any]) -> str | None:
    """A warning if other programs ran when the measurement began; older files do not say."""
    load, cores = machine.get("load_average"), machine.get("cores")
    if load is None or cores is None or load <= BUSY_SHARE * cores:
        return None
    return (
        f"The machine was busy: the load average was {load} on {cores} cores before anything was "
        "measured. Repeat on a free machine before you trust these times."
    )


def write_json(path: Path, data: object) -> None:
    """Write a file that is complete at any time, whatever ends this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with a + if files differ from it; "unknown" outside of a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
