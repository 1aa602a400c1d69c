"""Random problems for the CUDA kernel, its emulator, and what nvcc makes of it."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tile_cases import FLOATS, FORWARD_KL, JSD, REVERSE_KL, Case, make_case
from torch import Tensor

from hero_kernels import cuda
from hero_kernels.constants import NUM_STATS
from hero_kernels.cpu import rows_problem
from hero_kernels.objective import Objective
from hero_kernels.types import RowTensors, Tile

SOURCES = Path(__file__).parents[2] / "csrc"
EMULATOR = Path(__file__).parent / "emulator"

Patch = tuple[str, str, str]
"""File of csrc/cuda, a text that it holds once, and what takes its place."""


class Setting(NamedTuple):
    """How the emulated GPU is used."""

    clusters: int = 2
    cluster_size: int = 2
    warps: int = 2
    """That compute; each works on 256 columns at once."""
    stages: int = 0
    """Tiles held at once; 0 for the whole row, read once."""


DEFAULT_SETTING = Setting()


class Limits(ctypes.Structure):
    """`Limits` of csrc/cuda/plan.h, in bytes."""

    _fields_ = (
        ("shared_per_block", ctypes.c_int32),
        ("shared_per_processor", ctypes.c_int32),
        ("max_cluster", ctypes.c_int32),
    )


class Plan(ctypes.Structure):
    """`Plan` of csrc/cuda/plan.h, field for field."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            *("cluster_size", "warps", "slice_columns", "tiles", "stages", "resident", "vectors"),
            *("teacher_stage", "student_stage", "student_offset", "shared_bytes"),
        )
    )


def random_case(seed: int) -> tuple[Case, torch.dtype]:
    """Any shape, storage and options, and the type of the gradient."""
    draw = random.Random(seed)
    vocab = draw.choice([draw.randint(2, 700), draw.randint(700, 2300), 8 * draw.randint(1, 250)])
    rows, padding = draw.randint(1, 5), draw.choice([0, 0, draw.randint(1, 40)])
    delta = draw.random() < 0.5
    case = make_case(
        draw.choice([JSD, FORWARD_KL, REVERSE_KL]),
        delta,
        rows,
        vocab + padding,
        scale=draw.choice([1.0, 0.3, 1e-2 if delta else 3.0]),
        seed=seed,
        beta=draw.choice([0.5, 0.2]),
        temperature=draw.choice([1.0, 1.4]),
        logit_scale=draw.choice([1.0, 0.8]),
        softcap=draw.choice([None, None, 9.0]),
        num_real=vocab,
        with_stats=draw.random() < 0.5,
    )
    case.student = case.student.to(draw.choice(FLOATS))
    case.teacher = case.teacher.to(draw.choice(FLOATS))
    case.teacher[:, vocab:] = torch.nan
    case.student[:, vocab:] = torch.nan
    if draw.random() < 0.4:
        case.student_bias, case.teacher_bias = torch.randn(2, vocab + padding)
        if draw.random() < 0.3:
            case.student_bias = None
    if draw.random() < 0.2:
        case.temperatures = 0.5 + torch.rand(rows)
    if draw.random() < 0.5:
        case.target_ids = torch.randint(-1, vocab, (rows,))
        if draw.random() < 0.5:
            case.old_logprobs = case.truth()[0][:, 2].float() + 0.3 * torch.randn(rows)
            case.is_clip = draw.choice([None, 1.1])
    grad_dtype = draw.choice(FLOATS)
    if draw.random() < 0.5 or grad_dtype == torch.float16:
        # Small gradients would be subnormal in fp16: the loop scales them by a power of two.
        case.row_weights = torch.rand(rows) * (2**12 if grad_dtype == torch.float16 else 1)
    return case, grad_dtype


class DeadlockError(Exception):
    """No thread of the emulated GPU can go on."""


class Emulator:
    """The kernel's text compiled for the CPU, every thread a fibre."""

    def __init__(self, folder: Path, patches: Sequence[Patch] = ()) -> None:
        for part in ("cuda", "cpu"):
            shutil.copytree(SOURCES / part, folder / part)
        for header in SOURCES.glob("*.h"):
            shutil.copy(header, folder)
        for name, text, replacement in patches:
            path = folder / "cuda" / name
            source = path.read_text()
            assert source.count(text) == 1, f"{name} holds {text!r} {source.count(text)} times"
            path.write_text(source.replace(text, replacement))
        path = folder / "emulator.so"
        # longjmp between stacks is what fortified libraries take for an error.
        options = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-shared"]
        warnings = ["-Wall", "-Wextra", "-Wno-unused", "-Wno-unknown-pragmas"]
        include = [f"-I{folder / part}" for part in ("cuda", "cpu")]
        command = ["g++", *options, *warnings, *include, EMULATOR / "emulator.cpp", "-o", path]
        subprocess.run(command, check=True, timeout=120)
        self._library = ctypes.CDLL(str(path))

    def divergence_rows(
        self,
        tile: Tile,
        rows: RowTensors,
        objective: Objective,
        with_stats: bool,
        setting: Setting = DEFAULT_SETTING,
        seed: int = 0,
    ) -> Tensor:
        """As `hero_kernels.cuda.divergence_rows`, under the schedule that `seed` draws.

        Raises:
            DeadlockError: the schedule ended in one.
        """
        stats = torch.full((len(tile.student), NUM_STATS), torch.nan)
        problem = rows_problem(tile, rows, objective, with_stats, stats)
        status = self._library.hero_emulated_divergence_rows(
            ctypes.byref(problem), *setting, ctypes.c_uint32(seed)
        )
        if status == 1:
            raise DeadlockError
        assert status == 0, f"status {status}"
        return stats

    def plan(self, student: Tensor, teacher: Tensor, limits: Limits) -> Plan:
        """How a GPU with these limits would work on rows of this shape and these types."""
        tile = Tile(student, teacher, num_real=student.shape[1])
        weights = torch.ones(len(student))
        problem = rows_problem(tile, RowTensors(weights), Objective(), False, weights)
        plan = Plan()
        self._library.hero_emulated_plan(
            ctypes.byref(problem), ctypes.byref(limits), ctypes.byref(plan)
        )
        return plan


def on_cuda(tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool) -> Tensor:
    """`cuda.divergence_rows` on copies of CPU tensors, each where it was relative to 16 bytes."""
    moved = {
        name: _to_cuda(value) if isinstance(value, Tensor) else value
        for name, value in tile._asdict().items()
    }
    for name in ("student", "teacher"):
        if tile.grad is getattr(tile, name):
            moved["grad"] = moved[name]
    of_rows = RowTensors(*(None if value is None else value.cuda() for value in rows))
    stats = cuda.divergence_rows(Tile(**moved), of_rows, objective, with_stats)
    if tile.grad is not None:
        tile.grad.copy_(moved["grad"])
    return stats.cpu()


def _to_cuda(tensor: Tensor) -> Tensor:
    """With the strides and the storage offset of the original."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).cuda()
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
