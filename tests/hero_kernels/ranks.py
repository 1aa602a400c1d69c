"""Runs a function on the ranks of a gloo process group, on CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2


def on_ranks(function: Callable[[int], Any]) -> list[Any]:
    """What `function`, of a module's top level, returns on each rank."""
    mp.set_forkserver_preload(
        ["torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (function, folder), WORLD_SIZE, start_method="forkserver")
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(WORLD_SIZE)
        ]


def _worker(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    try:
        torch.save(function(rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
