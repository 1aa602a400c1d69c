"""The checkpoint of a run: written whole, with a checksum of each file, and checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hero.files import replacing

if TYPE_CHECKING:  # looking for a checkpoint needs no torch
    import torch
    from torch import Tensor

CHECKPOINT = "checkpoint"
STATE = "state.json"
WRITTEN = ("student.safetensors", "teacher.safetensors", "optimizer.pt")


class BrokenCheckpoint(ValueError):
    """A checkpoint that cannot be read or does not fit."""


def save_checkpoint(
    run_dir: Path,
    *,
    state: dict[str, Any],
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
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
        files = {path.name: checksum(path) for path in sorted(folder.iterdir())}
        sums = {"files": files, "self": _sum_of(state)}
        (folder / STATE).write_text(json.dumps({**state, **sums}), encoding="utf-8")


def load_checkpoint(
    run_dir: Path, device: torch.device, read_state: Callable[[dict[str, Any]], Any] = dict
) -> tuple[dict[str, Any], str]:
    """Read it back: keys state, student, teacher, optimizer; and what has to be said about it.

    A broken checkpoint is passed over if the one before it is still there and good. `read_state`
    makes of the counters what is returned as state; it raises ValueError if they are none.

    Raises:
        BrokenCheckpoint: there is none that can be read.
    """
    broken: BrokenCheckpoint | None = None
    for folder in checkpoints(run_dir):
        try:
            found = _load(folder, device, read_state)
        except BrokenCheckpoint as error:
            broken = broken or error
            continue
        return found, f"{broken} Going on from the one before, {folder}." if broken else ""
    if broken is None:
        raise BrokenCheckpoint(
            f"{run_dir} holds no checkpoint to go on from. Start anew with --resume never and "
            "another --output-dir."
        )
    best = run_dir / "best"
    hint = f" The best model so far is {best}: start from it with --model.path." * best.is_dir()
    raise BrokenCheckpoint(f"{broken}{hint}")


def _load(
    folder: Path, device: torch.device, read_state: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    def read(name: str) -> Any:
        path = folder / name
        try:
            if path.suffix == ".json":
                return json.loads(path.read_text(encoding="utf-8"))
            if path.suffix == ".safetensors":
                return load_file(path, device=str(device))
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # each format raises classes of its own
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise BrokenCheckpoint(f"{path} cannot be read ({reason}).") from error

    state = read(STATE)
    if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
        raise BrokenCheckpoint(
            f"{folder / STATE} is not the state of a run of this version: it has no checksums."
        )
    files, own = state.pop("files"), state.pop("self", None)
    try:
        found: dict[str, Any] = {"state": read_state(state)}
    except ValueError as error:
        raise BrokenCheckpoint(
            f"{folder / STATE} does not fit this run ({error}): it is of another version, or was "
            "changed."
        ) from error
    sums = {STATE: (own, _sum_of(state))}
    for name, expected in {**dict.fromkeys(WRITTEN), **files}.items():
        if not (folder / name).is_file():
            raise BrokenCheckpoint(f"{folder / name} is missing.")
        sums[name] = (expected, checksum(folder / name))
    for name, (expected, present) in sums.items():
        if expected != present:
            raise BrokenCheckpoint(
                f"{folder / name} cannot be read (its checksum is not the one it was written with)."
            )
    for name in WRITTEN:
        found[Path(name).stem] = content = read(name)
        for key, value in _tensors(content):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise BrokenCheckpoint(f"{folder / name} holds NaN or infinity in {key}.")
    return found


def _tensors(content: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries and lists, with the names that lead there."""
    if hasattr(content, "is_floating_point"):
        yield key, content
    elif isinstance(content, dict | list):
        parts = content.items() if isinstance(content, dict) else enumerate(content)
        for name, part in parts:
            yield from _tensors(part, f"{key}.{name}".strip("."))


def _sum_of(state: dict[str, Any]) -> str:
    """Of the counters, as they are after they were written and read."""
    text = json.dumps(json.loads(json.dumps(state)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first: a crash may have left the one before as well."""
    folders = (run_dir / CHECKPOINT, run_dir / f"{CHECKPOINT}.old")
    return [folder for folder in folders if folder.is_dir()]


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
