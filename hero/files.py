"""Files and folders that are always whole: written aside, then put in place in one step."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reading metrics and reports needs no torch
    import torch
    from torch import Tensor

CHECKPOINT = "checkpoint"


class BrokenCheckpoint(ValueError):
    """A checkpoint that cannot be read."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A folder to fill in; if all goes well it takes the place of `path`, else nothing changes."""
    new, old = path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    # A crash here leaves only `old`, which `find_checkpoint` knows.
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill in; it gets the name `path` when all went well, else nothing is left of it.

    Raises:
        ValueError: something is there already.
    """
    refuse_to_replace(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        new = Path(scratch) / path.name
        new.mkdir()
        yield new
        if path.exists():
            path.rmdir()
        new.rename(path)


def refuse_to_replace(folder: Path) -> None:
    """Raise a ValueError if something is there already: it may be somebody's only copy."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(
            f"{folder} is there already and not empty; nothing in it is replaced. Name another "
            "folder, or remove it first."
        )


def save_checkpoint(
    run_dir: Path,
    *,
    state: dict[str, Any],
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    optimizer: dict[str, Any],
) -> None:
    """Write `run_dir/checkpoint`: counters, trained weights, teacher's weights, optimiser state."""
    import torch
    from safetensors.torch import save_file

    with replacing(run_dir / CHECKPOINT) as folder:
        for name, tensors in (("student", student), ("teacher", teacher)):
            # Copies: safetensors refuses tensors that share memory.
            plain = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
            save_file(plain, folder / f"{name}.safetensors")
        torch.save(optimizer, folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def load_checkpoint(run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Read it back: keys state, student, teacher, optimizer.

    Raises:
        BrokenCheckpoint: there is none, or a part of it cannot be read.
    """
    import torch
    from safetensors.torch import load_file

    folder = find_checkpoint(run_dir)
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


def find_checkpoint(run_dir: Path) -> Path | None:
    """The run's checkpoint folder: the last one, or the one before if a crash came between."""
    for folder in (run_dir / CHECKPOINT, run_dir / f"{CHECKPOINT}.old"):
        if (folder / "state.json").is_file():
            return folder
    return None
