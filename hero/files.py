"""Files and folders that are always whole: written aside, then put in place in one step."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hero.types import Fault

LOCK = "lock"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, mark: str) -> None:
    """Before an hour of work: that a file can be written; "" is none.

    Args:
        path: of the file.
        mark: stands near the beginning of all that the command has written before.

    Raises:
        ValueError: it is a folder, a device, or somebody's file.
        OSError: its folder cannot be made or written to.
    """
    file = Path(path)
    if path and file.exists() and not file.is_file():  # what is written takes its place
        kind = "a folder" if file.is_dir() else "a device or a pipe"
        raise ValueError(f"{path} is {kind}; expected the name of a file to write.")
    if path and file.is_file():
        with file.open("rb") as opened:
            begins = opened.read(4096)
        if begins and mark.encode() not in begins:
            raise ValueError(
                f"{path} is there already, and no file of this command's: it is not replaced. Name "
                "another file, or remove it first."
            )
    if path:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A folder to fill in; if all goes well it takes the place of `path`, else nothing changes."""
    new, old = path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for inside in (*new.rglob("*"), new):
            flush(inside)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    # A crash here leaves only `old`, which `sweep` puts back.
    new.rename(path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Make sure that a file or the entries of a folder are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sweep(folder: Path) -> None:
    """Tidy up what killed writes left in a folder that is ours."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob("*.new"):
        shutil.rmtree(path, ignore_errors=True)
    for old in folder.glob("*.old"):
        if not (path := old.with_suffix("")).exists():
            old.rename(path)


@contextmanager
def only_writer(folder: Path, what: str, option: str) -> Iterator[None]:
    """Nobody else writes in a folder meanwhile; the lock of a killed process does not hold.

    Args:
        folder: is there already.
        what: writes there, for the message.
        option: that names another folder.

    Raises:
        Fault: another process has the folder.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Fault(
                f"{folder} is being written by another {what} ({file.read().strip()}). Wait for "
                f"its end, stop it, or name another {option}."
            ) from None
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        yield


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
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(
            f"{folder} is there already and not empty; nothing in it is replaced. Name another "
            "folder, or remove it first."
        )
