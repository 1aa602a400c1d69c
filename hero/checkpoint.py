"""State of a run on disk: written aside and renamed, so that there is always a whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "checkpoint"


class BrokenCheckpoint(ValueError):
    """A checkpoint that cannot be read."""


def save_state(
    run_dir: Path,
    *,
    state: dict[str, Any],
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    optimizer: Any,
) -> None:
    """Write `run_dir/checkpoint`: trained weights, teacher weights, optimiser, counters."""
    with Replacing(run_dir / NAME) as folder:
        save_file(_plain(student), folder / "student.safetensors")
        save_file(_plain(teacher), folder / "teacher.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def load_state(run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Read it back: keys state, student, teacher, optimizer.

    Raises:
        BrokenCheckpoint: there is none, or a part of it cannot be read.
    """
    folder = find_state(run_dir)
    if folder is None:
        raise BrokenCheckpoint(
            f"{run_dir} holds no checkpoint to go on from. Start anew with --resume never and "
            "another --output-dir."
        )
    try:
        return {
            "state": json.loads((folder / "state.json").read_text(encoding="utf-8")),
            "student": load_file(folder / "student.safetensors", device=str(device)),
            "teacher": load_file(folder / "teacher.safetensors", device=str(device)),
            "optimizer": torch.load(
                folder / "optimizer.pt", map_location=device, weights_only=True
            ),
        }
    except Exception as error:  # each format raises classes of its own
        raise BrokenCheckpoint(
            f"The checkpoint {folder} cannot be read ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). "
            f"The best model so far is {run_dir / 'best'}: start from it with --model.path."
        ) from error


def find_state(run_dir: Path) -> Path | None:
    """The run's checkpoint folder: the last one, or the one before if a crash came between."""
    for folder in (run_dir / NAME, run_dir / f"{NAME}.old"):
        if (folder / "state.json").is_file():
            return folder
    return None


class Replacing:
    """A folder to fill in; when all went well it takes the place of `path`, else nothing has
    changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new = path.with_name(f"{path.name}.new")
        self.old = path.with_name(f"{path.name}.old")

    def __enter__(self) -> Path:
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir(parents=True)
        return self.new

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            shutil.rmtree(self.new, ignore_errors=True)
            return
        if self.path.exists():
            shutil.rmtree(self.old, ignore_errors=True)
            self.path.rename(self.old)
        self.new.rename(self.path)
        shutil.rmtree(self.old, ignore_errors=True)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
