"""The C++ row kernel on ARM: built by the cross compiler, run under qemu's emulation, where both
are installed (Debian: g++-aarch64-linux-gnu, qemu-user)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from hero_kernels.constants import NUM_STATS
from hero_kernels.cpu import RowsProblem, rows_problem
from hero_kernels.objective import Objective
from hero_kernels.types import RowTensors, Tile

ROOT = Path(__file__).parents[2]
COMPILER, RUNNER = "aarch64-linux-gnu-g++", "qemu-aarch64"
_POINTERS = [name for name, kind in RowsProblem._fields_ if kind is ctypes.c_void_p]


def missing() -> str | None:
    """Which program is not installed, or None."""
    return next(
        (f"there is no {name}" for name in (COMPILER, RUNNER) if not shutil.which(name)), None
    )


class Arm:
    """The kernel as a program for ARM."""

    def __init__(self, folder: Path) -> None:
        """Build it in `folder`; a warning is an error."""
        self._program = folder / "one_call"
        sources = [
            *(ROOT / "csrc/cpu").glob("*.cpp"),
            Path(__file__).parent / "emulator/one_call.cpp",
        ]
        flags = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp"
        macros = f"-static -DHERO_ROW_FUNCTION=hero_row_baseline -DPOINTERS={len(_POINTERS)}"
        warnings = f"-Wall -Wextra -Werror -I{ROOT / 'csrc'}"
        options = f"{flags} {macros} {warnings}".split()
        command = [COMPILER, *options, *map(str, sources), "-o", str(self._program)]
        subprocess.run(command, check=True, timeout=300)

    def divergence_rows(
        self, tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool
    ) -> Tensor:
        """As `hero_kernels.cpu.divergence_rows`."""
        stats = torch.full((len(tile.student), NUM_STATS), torch.nan)
        problem = rows_problem(tile, rows, objective, with_stats, stats)
        memory, places = bytearray(ctypes.sizeof(problem)), {}
        for tensor in (*tile, *rows, stats):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in places:
                    memory.extend(bytes(-len(memory) % 64))
                    places[storage.data_ptr()] = len(memory), storage
                    memory.extend(bytes(storage))
        for name in _POINTERS:
            if address := getattr(problem, name):
                start = max(place for place in places if place <= address)
                setattr(problem, name, places[start][0] + address - start)
        memory[: ctypes.sizeof(problem)] = bytes(problem)
        done = subprocess.run(
            [RUNNER, self._program], input=memory, capture_output=True, check=True, timeout=60
        )
        for start, storage in places.values():
            ctypes.memmove(storage.data_ptr(), done.stdout[start:], storage.nbytes())
        return stats
